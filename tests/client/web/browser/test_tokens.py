"""A person at the pages of what a run learns, of caches and of teachers, by mouse and by keyboard alone."""

from __future__ import annotations

import math
import re

from playwright.sync_api import expect

from tests.client.web.browser.conftest import OpenTab, Runs, Site


def test_tokens_are_compared_before_along_and_after_training(
    open_tab: OpenTab, runs: Runs, site: Site
) -> None:
    tab = open_tab(f"/runs/{runs.first}/tokens")
    page = tab.page
    with site.client() as client:
        url = f"/api/v1/runs/{runs.first}/examples"
        steps = [each["step"] for each in client.get(url).json()["evaluations"]]
        last = client.get(f"{url}/{steps[-1]}").json()
    assert steps == [0, 6, 12]
    expect(page.locator("#step-text")).to_contain_text("step 12, after training")
    row = last["rows"][0]
    texts = page.locator("#rows section").first.locator(".text")
    expect(texts).to_have_count(2)  # before training, and after it
    tokens = texts.last.locator(".piece")
    expect(tokens).to_have_count(len(row["targets"]))
    target = row["targets"][3]
    expect(tokens.nth(3)).to_have_attribute("title", f"KL {target['kl']:.4f} nats")
    tokens.nth(3).click()
    panel = page.locator("#panel")
    tables = panel.locator("table")
    expect(tables).to_have_count(2)
    for table, side, tail in zip(tables.all(), (1, 2), ("teacher_tail", "student_tail"), strict=True):
        likeliest = max(each[side] for each in target["top"] if each[side] is not None)
        shares = [float(each.inner_text()) for each in table.locator("td.own").all()]
        assert len(shares) == last["top_k"] + 1
        assert math.isclose(shares[0], 100 * math.exp(likeliest), rel_tol=6e-3)
        assert math.isclose(shares[-1], 100 * math.exp(target[tail]), rel_tol=6e-3)
        assert math.isclose(sum(shares), 100, abs_tol=0.5)
    expect(panel).to_contain_text("KL at step 0, before training")
    tab.check_looks()


def test_tokens_are_read_by_keyboard_alone(open_tab: OpenTab, runs: Runs) -> None:
    tab = open_tab(f"/runs/{runs.first}/tokens")
    page = tab.page
    expect(page.locator(".text .piece").first).to_be_visible()
    tab.tab_to(page.get_by_role("slider", name="Evaluation"))
    page.keyboard.press("Home")
    expect(page.locator("#step-text")).to_contain_text("step 0, before training")
    expect(page.locator("#rows section").first.locator(".text")).to_have_count(1)
    page.keyboard.press("ArrowRight")
    expect(page.locator("#step-text")).to_contain_text("step 6, in training")
    tab.tab_to(page.get_by_label("Colour", exact=True))
    page.keyboard.press("ArrowDown")
    expect(page.locator(".text .piece").first).to_have_attribute("title", re.compile(r"^-log q \d"))
    first = page.locator(".text .piece").first
    tab.tab_to(first)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    second = page.locator(".text .piece").nth(1)
    expect(second).to_be_focused()
    expect(page.locator("#panel table")).to_have_count(2)
    chosen = page.locator("#panel h2").inner_text()
    page.keyboard.press("End")
    page.keyboard.press("Space")
    expect(page.locator("#panel h2")).not_to_have_text(chosen)


def test_a_prompt_is_tried_on_a_teacher(open_tab: OpenTab, site: Site) -> None:
    tab = open_tab("/teachers")
    page = tab.page
    expect(page.locator("#teachers")).to_contain_text(site.teacher)
    expect(page.locator("#teachers")).to_contain_text("query logprobs")
    page.get_by_label("Prompt, or a text to score").fill("Number seven: ")
    page.get_by_label("New tokens, at most").fill("12")
    page.get_by_role("button", name="Generate").click()
    outcome = page.locator("#outcome")
    expect(outcome).to_contain_text("tokens after a prompt of")
    written = int(outcome.inner_text().split()[0])  # a text may end by itself
    assert 1 <= written <= 12
    expect(page.locator("#rows .piece")).to_have_count(written)
    page.locator("#rows .piece").nth(0).click()
    expect(page.locator("#panel td.own")).to_have_count(11)
    expect(page.locator("#teachers")).to_contain_text("stillhouse-web")
    tab.check_looks()
    page.get_by_role("button", name="Score").click()
    expect(page.locator("#outcome")).to_contain_text("tokens scored")
    page.get_by_label("Likeliest tokens shown").fill("0")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#outcome")).to_contain_text("tokens scored")  # the browser asks for 1 or more


def test_caches_say_what_they_hold(open_tab: OpenTab, site: Site) -> None:
    spec = site.spec("builds a cache", steps=2, cache={"path": "caches/for-page"})
    assert site.wait_ended(site.create({**spec, "task": "cache"})) == "COMPLETED"
    tab = open_tab("/caches")
    cache = tab.page.locator("section", has=tab.get("heading", "caches/for-page"))
    for text in ("completed", "use: build", "Bytes a token", "Fingerprint of the teacher", "top-16"):
        expect(cache).to_contain_text(text)
    tab.check_looks()


def test_a_phone_shows_the_token_beside_its_panel(open_tab: OpenTab, runs: Runs) -> None:
    page = open_tab(f"/runs/{runs.first}/tokens", width=390, height=844, scheme="dark").page
    token = page.locator(".text .piece").nth(9)
    token.click()
    expect(page.locator("#panel table")).to_have_count(2)
    panel, chosen = page.locator("#panel").bounding_box(), token.bounding_box()
    assert panel is not None
    assert chosen is not None
    assert chosen["y"] >= 0
    assert chosen["y"] + chosen["height"] <= panel["y"]
    assert panel["y"] + panel["height"] <= 844 + 1
