"""A person at the pages of a new run and of data: form and text follow each other, a run is made, data are sent and seen."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from playwright.sync_api import Page, expect

from tests.client.web.browser.conftest import OpenTab, Runs, Site

VALID = "The run is valid."
TOKENIZER_MS = 180_000
"""A process that loads a tokenizer may be slow beside others."""


def text_of(page: Page) -> str:
    return page.get_by_role("textbox", name="Run file").input_value()


def field(page: Page, path: str) -> str:
    return f'[id="field-{path}"]'


def test_a_run_is_created_from_the_form(open_tab: OpenTab, site: Site) -> None:
    tab = open_tab("/runs/new")
    page = tab.page
    verdict = page.locator("#verdict")
    expect(verdict).to_have_text("2 problems to correct.")
    page.get_by_role("button", name="Line 3").click()  # student.model, in the text
    expect(page.get_by_role("textbox", name="Run file")).to_be_focused()
    page.locator(field(page, "student.model")).fill(str(site.student))
    page.locator(field(page, "teachers[0].targets")).fill(site.teacher)
    page.locator(field(page, "data.train[0].path")).fill(str(site.rows))
    page.locator(field(page, "optimizer.max_steps")).fill("4")
    page.locator("#settings summary", has_text="General").click()
    page.locator(field(page, "display_name")).fill("from the form")
    page.locator(field(page, "labels")).fill("project: a\nkind: form")
    page.keyboard.press("Tab")
    expect(verdict).to_have_text(VALID)
    expect(page.get_by_role("region", name="Command line")).to_contain_text("--set optimizer.max_steps=4")
    expect(page.locator("#memory")).to_contain_text("weights; about")
    page.get_by_role("button", name="Show rows").click()
    expect(page.locator("#rows .token.target").first).to_be_visible(timeout=TOKENIZER_MS)
    assert text_of(page).startswith("# Every other setting has a default")
    tab.check_looks()
    page.get_by_role("button", name="Create run").click()
    expect(page.get_by_role("heading", name="from the form")).to_be_visible()
    run = page.url.rpartition("/")[2]
    assert site.run(run)["spec"]["labels"] == {"project": "a", "kind": "form"}
    assert site.wait_ended(run) == "COMPLETED"
    expect(page.locator("#head .state")).to_have_text("completed")


def test_form_and_text_follow_each_other(open_tab: OpenTab, site: Site) -> None:
    page = open_tab("/runs/new").page
    text, verdict = page.get_by_role("textbox", name="Run file"), page.locator("#verdict")
    expect(verdict).to_have_text("2 problems to correct.")
    spec = {**site.spec("typed"), "loss": {"terms": [{"divergence": "jsd"}]}}
    text.fill(yaml.safe_dump(spec, sort_keys=False) + "# the end\n")
    expect(verdict).to_have_text(VALID)
    expect(page.locator(field(page, "student.model"))).to_have_value(str(site.student))
    expect(page.locator(field(page, "loss.terms[0].divergence"))).to_have_value("jsd")

    page.get_by_role("button", name="Add lora").press("Enter")
    expect(page.locator(field(page, "student.lora.rank"))).to_be_visible()
    page.locator(field(page, "student.lora.rank")).fill("0")
    page.get_by_role("button", name="Add another term").press("Enter")
    expect(page.locator(field(page, "loss.terms[1].divergence"))).to_be_focused()
    page.keyboard.type("reverse")
    expect(verdict).to_have_text("1 problem to correct.")
    expect(page.locator('[id="problem-student.lora.rank"]')).to_contain_text("it must be in [1, 1024]")
    expect(page.locator("#settings summary", has_text="Student")).to_contain_text("1 problem")
    loaded = yaml.safe_load(text_of(page))
    assert loaded["student"]["lora"] == {"rank": 0}
    assert loaded["loss"]["terms"] == [{"divergence": "jsd"}, {"divergence": "reverse_kl"}]
    assert text_of(page).endswith("# the end\n")
    page.get_by_role("button", name="Remove lora").press("Enter")
    page.get_by_role("button", name="Remove term 2").press("Enter")
    expect(verdict).to_have_text(VALID)
    assert yaml.safe_load(text_of(page)) == spec

    text.fill("student: [\n")
    expect(verdict).to_have_text("1 problem to correct.")
    page.locator(field(page, "student.model")).fill("x")
    page.keyboard.press("Tab")
    expect(page.locator("#notice")).to_contain_text("Correct it first")
    assert text_of(page) == "student: [\n"


def test_a_run_is_cloned_and_edited(open_tab: OpenTab, runs: Runs, site: Site) -> None:
    page = open_tab(f"/runs/{runs.first}").page
    page.get_by_role("link", name="Clone and edit").click()
    expect(page.get_by_role("heading", name="Clone of first")).to_be_visible()
    expect(page.locator("#verdict")).to_have_text(VALID)
    rate = page.locator(field(page, "optimizer.learning_rate"))
    assert float(rate.input_value()) == site.run(runs.first)["spec"]["optimizer"]["learning_rate"]
    rate.fill("5e-4")
    page.keyboard.press("Tab")
    expect(page.get_by_role("region", name="Command line")).to_have_text(
        "stillhouse run create run.yaml --set optimizer.learning_rate=0.0005"
    )
    page.get_by_label("Find a setting").fill("rises from 0")
    expect(page.locator(field(page, "student.model"))).to_be_hidden()
    expect(page.locator(field(page, "optimizer.warmup_fraction"))).to_be_visible()


def test_data_are_sent_and_their_mask_is_seen(open_tab: OpenTab, site: Site, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [json.dumps({"prompt": f"Ada has {number}", "completion": " apples 🍎."}) for number in range(6)]
    path.write_text("\n".join([*rows[:2], '{"prompt": 1}', *rows[2:]]) + "\n")
    tab = open_tab("/data")
    page = tab.page
    tab.check_looks()
    page.get_by_label("File").set_input_files(path)
    page.get_by_label("Name (optional)").fill("browser")
    page.get_by_role("button", name="Upload").click()
    expect(page.get_by_role("heading", name="browser@1")).to_be_visible()
    expect(page.locator("#found")).to_contain_text("JSONL, rows of prompt_completion: 6 rows")
    expect(page.get_by_role("region", name="Refused rows")).to_contain_text("3")
    page.get_by_label("Student's model").fill(str(site.student))
    page.get_by_label("Rows", exact=True).fill("2")
    page.get_by_role("button", name="Inspect").click()
    expect(page.locator("#rows .tokens")).to_have_count(2, timeout=TOKENIZER_MS)
    learnt = "".join(page.locator("#rows .tokens").first.locator(".target").all_inner_texts())
    assert learnt.replace("▫", "").startswith(" apples 🍎.")
    expect(page.get_by_role("region", name="Lengths in tokens")).to_be_visible()
    tab.check_looks()
    page.get_by_role("button", name="Delete…").click()
    page.get_by_role("button", name="Yes").click()
    page.get_by_label("Type browser to confirm").fill("browser")
    page.get_by_role("button", name="Yes").click()
    page.wait_for_url("**/data")
    expect(page.get_by_role("link", name="browser@1")).to_have_count(0)


def test_a_file_that_is_refused_says_why(open_tab: OpenTab, tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("a\n")
    page = open_tab("/data", refusals=(400,)).page
    page.get_by_role("button", name="Upload").click()
    expect(page.get_by_role("status").filter(has_text="Choose a file first.")).to_be_visible()
    page.get_by_label("File").set_input_files(path)
    page.get_by_role("button", name="Upload").click()
    expect(page.locator("#upload-status")).to_contain_text("does not end in one of .jsonl")


def test_a_token_of_a_teacher_alone_makes_no_run(open_tab: OpenTab) -> None:
    for path in ("/runs/new", "/data"):
        page = open_tab(path, person="asker", refusals=(403,)).page
        expect(page.get_by_text("PERMISSION_DENIED")).to_be_visible()
