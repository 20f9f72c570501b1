"""A person at the pages of runs: watches, compares, stops, resumes, deletes, reads why a run failed, signs in.

Every page passes axe-core, in light and dark, and fits a phone.
"""

from __future__ import annotations

import os
import re
import signal

import pytest
from playwright.sync_api import Route, expect

from tests.client.web.browser.conftest import OpenTab, Runs, Site
from tests.support.runs import wait_until

PIXELS = "document.querySelector('figure canvas')?.toDataURL()"
"""Of the first curve; a zoom replaces its canvas."""
KEEP_IDS = """
window.ids = new Set();
const add = EventSource.prototype.addEventListener;
EventSource.prototype.addEventListener = function (name, handle) {
  add.call(this, name, (event) => {
    if (event.lastEventId) window.ids.add(Number(event.lastEventId));
    handle(event);
  });
};
"""
HIDE = """(hidden) => {
  Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}"""


def test_a_run_is_watched_to_its_end_by_a_tab_that_sleeps_meanwhile(open_tab: OpenTab, site: Site) -> None:
    run = site.create(site.spec("watched", steps=30))
    tab = open_tab("/sign-in")
    tab.page.add_init_script(KEEP_IDS)
    metrics = site.data_dir / "runs" / run / "metrics.jsonl"
    pid = site.pid(run)

    def go_on_to(steps: int) -> None:
        os.kill(pid, signal.SIGCONT)
        wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"train/loss") >= steps, "steps")
        os.kill(pid, signal.SIGSTOP)

    go_on_to(2)
    held: list[Route] = []
    tab.page.route("**/events*", lambda route: held.append(route), times=1)  # noqa: PLW0108 - Playwright wraps functions alone
    tab.page.goto(f"/runs/{run}")
    loss = tab.page.locator("figure", has=tab.get("heading", "Loss, nats per token"))
    last = loss.locator(".last")
    expect(loss.locator("canvas")).to_be_visible()
    before = last.inner_text()
    expect(tab.page.locator("#head .state")).to_have_text("running")
    go_on_to(4)
    held[0].continue_()  # the stream begins late, behind points that no event will tell
    expect(last).not_to_have_text(before)
    before = last.inner_text()
    tab.page.evaluate(HIDE, True)
    go_on_to(7)
    tab.page.evaluate(HIDE, False)
    expect(last).not_to_have_text(before)
    os.kill(pid, signal.SIGCONT)
    expect(tab.page.locator("#head .state")).to_have_text("completed")
    expect(last).to_contain_text("eval/cross_entropy")
    ids = sorted(tab.page.evaluate("[...window.ids]"))
    assert ids == list(range(ids[0], ids[0] + len(ids)))
    assert len(ids) > 16
    titles = tab.page.locator("figure:visible h3").all_inner_texts()
    wanted = [
        "Loss, nats per token",
        "KL and other divergences, nats per token",
        "Agreement with the teacher, share",
    ]
    assert titles[:3] == wanted
    assert {"Learning rate", "Speed, tokens per second", "Waiting for the teacher, seconds per step"} <= set(
        titles
    )
    expect(tab.page.locator("#stop")).to_have_count(0)
    expect(tab.page.locator(".events li").first).to_contain_text("completed")
    expect(tab.page.locator(".timeline rect")).to_have_count(1)


def test_curves_are_zoomed_smoothed_and_scaled_by_keyboard(open_tab: OpenTab, runs: Runs) -> None:
    tab = open_tab(f"/runs/{runs.first}")
    page = tab.page
    expect(page.locator("figure canvas").first).to_be_visible()
    drawn = page.evaluate(PIXELS)
    tab.tab_to(page.get_by_label("Smoothing"))
    page.keyboard.press("End")
    expect(page.locator("#smoothing-value")).to_have_text("0.98")
    tab.tab_to(page.get_by_label("Log scale"))
    page.keyboard.press("Space")
    expect(page.get_by_label("Log scale")).to_be_checked()
    tab.tab_to(page.get_by_label("From step"))
    page.keyboard.type("4")
    tab.tab_to(page.get_by_label("To step"))
    page.keyboard.type("8")
    page.keyboard.press("Enter")
    wait_until(lambda: page.evaluate(PIXELS) not in (None, drawn), "another curve")
    tab.tab_to(page.get_by_role("button", name="All steps"))
    page.keyboard.press("Enter")
    expect(page.get_by_label("From step")).to_have_value("")


def test_a_run_has_its_log_settings_and_artifacts(open_tab: OpenTab, runs: Runs, site: Site) -> None:
    page = open_tab(f"/runs/{runs.first}").page
    page.get_by_role("heading", name="Log", exact=True).click()
    lines = page.locator("#log-lines li")
    expect(lines.first).to_be_visible()
    everything = lines.count()
    page.get_by_label("From level").select_option("error")
    expect(page.locator("#log-lines li:visible")).to_have_count(0)
    page.get_by_label("From level").select_option("debug")
    assert page.locator("#log-lines li:visible").count() >= everything
    page.get_by_role("heading", name="Settings").click()
    rate = page.locator("tr", has=page.get_by_text("optimizer.learning_rate", exact=True))
    expect(rate).to_contain_text("run file")
    expect(page.locator("tr", has=page.get_by_text("optimizer.weight_decay", exact=True))).to_contain_text(
        "default"
    )
    page.get_by_role("heading", name="Artifacts").click()
    with page.expect_download() as download:
        page.get_by_role("link", name="final/config.json").click()
    stored = site.data_dir / "runs" / runs.first / "final" / "config.json"
    assert download.value.path().read_bytes() == stored.read_bytes()


def test_runs_are_found_and_compared_by_keyboard_alone(open_tab: OpenTab, runs: Runs) -> None:
    tab = open_tab("/")
    page = tab.page
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    tab.tab_to(page.get_by_label("Label"))
    page.keyboard.type("team")
    names = page.locator("#runs td.name a")
    expect(names).to_have_count(2)
    expect(page.get_by_role("img", name=re.compile("Loss from .* to"))).to_have_count(2)
    for name in ("first", "second"):
        tab.tab_to(page.get_by_label(f"Select {name}", exact=True))
        page.keyboard.press("Space")
    tab.tab_to(page.get_by_role("button", name="Compare"))
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Compare 2 runs")).to_be_visible()
    expect(page.locator("figure canvas").first).to_be_visible()
    different = page.get_by_role("region", name="Settings that differ")
    expect(different).to_contain_text("optimizer.learning_rate")
    expect(different).not_to_contain_text("optimizer.max_steps")
    expect(page.get_by_role("region", name="Final metrics")).to_contain_text("eval/kl")


def test_the_list_is_filtered_by_state_and_text(open_tab: OpenTab, runs: Runs) -> None:
    page = open_tab("/").page
    page.get_by_label("State").select_option("FAILED")
    expect(page.locator("#runs td.name a")).to_have_text(["no teacher"])
    page.get_by_label("State").select_option("")
    page.get_by_label("Text").fill("SECOND")
    expect(page.locator("#runs td.name a")).to_have_text(["second"])
    expect(page).to_have_url(re.compile("text=SECOND"))


def test_a_run_is_stopped_resumed_and_deleted(open_tab: OpenTab, site: Site) -> None:
    run = site.create(site.spec("long", steps=5000, evaluation={"every_steps": 5000}))
    page = open_tab(f"/runs/{run}").page
    state = page.locator("#head .state")
    expect(page.locator("figure canvas").first).to_be_visible()
    page.get_by_role("button", name="Stop…").click()
    page.get_by_role("button", name="Cancel").press("Enter")
    expect(state).to_have_text("running")
    page.get_by_role("button", name="Stop…").press("Enter")
    page.get_by_role("button", name="Yes").press("Enter")
    expect(state).to_have_text("stopped")
    page.get_by_role("button", name="Resume").press("Enter")
    expect(page.locator("tr[data-attempt='2']")).to_contain_text("works")
    expect(state).to_have_text("running")
    page.get_by_role("button", name="Stop…").click()
    page.get_by_role("button", name="Yes").click()
    expect(state).to_have_text("stopped")
    expect(page.locator(".timeline rect")).to_have_count(2)
    page.get_by_role("button", name="Delete…").click()
    page.get_by_role("button", name="Yes").click()
    yes = page.get_by_role("button", name="Yes")
    expect(yes).to_be_disabled()
    page.get_by_label(f"Type {run} to confirm").fill(run)
    yes.click()
    expect(page.get_by_role("heading", name="Runs", exact=True)).to_be_visible()
    with site.client() as client:
        assert client.get(f"/api/v1/runs/{run}").status_code == 404


def test_a_run_without_a_teacher_says_first_why_and_what_to_do(open_tab: OpenTab, runs: Runs) -> None:
    page = open_tab(f"/runs/{runs.failed}").page
    failure = page.locator("#head > *").first
    expect(failure).to_contain_text("127.0.0.1:1")
    expect(failure.get_by_role("heading", name="What to do")).to_be_visible()
    expect(failure).to_contain_text("TEACHER_UNREACHABLE")
    expect(page.locator("#log-lines li.error").first).to_be_visible()


@pytest.mark.parametrize("person", ["eve", "root"])
def test_a_token_controls_what_its_scope_allows(
    open_tab: OpenTab, site: Site, runs: Runs, person: str
) -> None:
    page = open_tab(f"/runs/{runs.failed}", person=person).page
    for name in ("Resume", "Delete…"):
        button = page.get_by_role("button", name=name)
        if person == "root":
            expect(button).to_be_enabled()
        else:
            expect(button).to_be_disabled()
            expect(page.locator("#locked")).to_contain_text("scope admin")


def test_people_sign_in_and_out(open_tab: OpenTab, site: Site, runs: Runs) -> None:
    tab = open_tab(f"/runs/{runs.first}", person="", refusals=(401, 403))
    page = tab.page
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    token = page.get_by_label("Token")
    token.fill("sth_aaaaaaaa_wrong")
    token.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("No service accepts this token")
    token.fill(site.tokens["ada"])
    token.press("Enter")
    expect(page.get_by_role("heading", name="first")).to_be_visible()
    assert site.tokens["ada"] not in page.url + page.content()
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    token.fill(site.tokens["asker"])
    token.press("Enter")
    tab.shown("needs the scope submit")


def test_signing_in_leads_to_no_other_host(open_tab: OpenTab, site: Site) -> None:
    page = open_tab("/sign-in?next=/.//example.org/a", person="", refusals=(404,)).page
    page.get_by_label("Token").fill(site.tokens["ada"])
    page.get_by_label("Token").press("Enter")
    expect(page).to_have_url(f"{site.url}//example.org/a")


PAGES = {
    "list": "/",
    "run": "/runs/{first}",
    "failed run": "/runs/{failed}",
    "comparison": "/compare?run={first}&run={second}",
    "sign-in": "/sign-in",
    "error": "/runs/aaaaaaaaaaaa",
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_accessible_and_fits_a_phone(open_tab: OpenTab, runs: Runs, name: str) -> None:
    path = PAGES[name].format(first=runs.first, second=runs.second, failed=runs.failed)
    tab = open_tab(path, refusals=(404,) if name == "error" else ())
    if name in ("run", "comparison"):
        expect(tab.page.locator("figure canvas").first).to_be_visible()
    tab.page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    if name == "run":
        expect(tab.page.get_by_role("link", name="final/config.json")).to_be_visible()
    tab.check_looks()
    assert tab.page.locator("h1").count() == 1
