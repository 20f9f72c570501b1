"""Mixtures: those of the recipe bit for bit, ratios, and files that are missing, empty or invalid."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.client.datasets.mix import _in_ratio
from tests.client.datasets.rows import data, read, write

CATEGORIES = ["banks", "households", "other"]
TEXTS = ["naïve ☃", "日本語\n", 'a "quote" \\ back', "\u2028 \x00 \t", "🙂"]


def recipe(root: Path, categories: list[str]) -> None:
    """The recipe in its own words: one seed before the loop; of each category 70 % of the GRPO pool and 30 % of the SFT pool,
    truncated; sampled in this order, then shuffled; a category whose file is missing is skipped."""
    random.seed(42)
    for category in categories:
        grpo = root / f"artifacts/grpo/grpo_{category}.jsonl"
        sft = root / f"artifacts/sft/sft_train_{category}.jsonl"
        if not (grpo.exists() and sft.exists()):
            continue
        pools = [[json.loads(line) for line in path.read_text().splitlines()] for path in (grpo, sft)]
        mixed = random.sample(pools[0], int(len(pools[0]) * 0.7)) + random.sample(
            pools[1], int(len(pools[1]) * 0.3)
        )
        random.shuffle(mixed)
        out = root / f"expected/train_mix_{category}.jsonl"
        out.parent.mkdir(exist_ok=True)
        with out.open("w", encoding="utf-8") as file:
            for row in mixed:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def make_pools(root: Path, sizes: dict[str, tuple[int, int]]) -> None:
    for category, (num_grpo, num_sft) in sizes.items():
        for name, count in (("grpo/grpo", num_grpo), ("sft/sft_train", num_sft)):
            rows = [
                {
                    "id": f"{name}-{at}",
                    "messages": [{"role": "user", "content": TEXTS[at % len(TEXTS)]}],
                    "x": at / 7,
                }
                for at in range(count)
            ]
            write(root / f"artifacts/{name}_{category}.jsonl", rows)


@pytest.mark.parametrize("seed", range(4))
def test_pool_fractions_equal_the_recipe_bit_for_bit(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    sizes = {each: (rng.randrange(2, 400), rng.randrange(2, 200)) for each in CATEGORIES}
    make_pools(tmp_path, sizes)
    recipe(tmp_path, ["banks", "households", "insurance_companies", "other"])
    done = data("mix", "--layout", "artifacts", "--root", tmp_path, "--json")
    assert done.exit_code == 1, "four of the seven categories are not there"
    document = json.loads(done.stdout)
    assert [each["category"] for each in document["mixtures"]] == CATEGORIES
    assert {each["category"] for each in document["skipped"]} == {
        *("insurance_companies", "investment_advisors", "mutual_funds", "pension_funds")
    }
    for category in CATEGORIES:
        made = tmp_path / f"artifacts/distill_data/raw/train_mix_{category}.jsonl"
        assert made.read_bytes() == (tmp_path / f"expected/train_mix_{category}.jsonl").read_bytes()


def test_a_seed_per_category_does_not_depend_on_other_categories(tmp_path: Path) -> None:
    make_pools(tmp_path, dict.fromkeys(CATEGORIES, (20, 20)))
    pools = [
        str(tmp_path / name)
        for name in ("artifacts/grpo/grpo_{category}.jsonl", "artifacts/sft/sft_train_{category}.jsonl")
    ]

    def mixed(out: str, *categories: str, alone: bool = True) -> bytes:
        names = [part for each in categories for part in ("--category", each)]
        extra = ["--seed-per-category"] if alone else []
        done = data("mix", *pools, "--out", tmp_path / out / "{category}.jsonl", *names, *extra)
        assert done.exit_code == 0, done.output
        return (tmp_path / out / "other.jsonl").read_bytes()

    assert mixed("a", *CATEGORIES) == mixed("b", "other") != mixed("c", *CATEGORIES, alone=False)


def test_a_ratio_is_that_of_the_written_rows(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", ({"text": f"a{at}"} for at in range(100)))
    second = write(tmp_path / "b.jsonl", ({"text": f"b{at}"} for at in range(100)))
    out = tmp_path / "mix.jsonl"
    done = data("mix", "--mode", "ratio", "70:30", first, second, "--out", out)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{out}: 142 rows, 99 of 100 + 43 of 100\n"
    rows = [row["text"] for row in read(out)]
    assert Counter(text[0] for text in rows) == {"a": 99, "b": 43}
    assert len(set(rows)) == len(rows)
    assert rows != sorted(rows)
    assert data("mix", "--mode", "ratio", "70:30", first, second, "--out", out, "--rows", 10).exit_code == 0
    assert Counter(row["text"][0] for row in read(out)) == {"a": 7, "b": 3}
    before = out.read_bytes()
    done = data("mix", "--mode", "ratio", "70:30", first, second, "--out", out, "--rows", 1000)
    assert (done.exit_code, "at most 142 rows" in done.stderr) == (2, True)
    assert out.read_bytes() == before


@given(st.lists(st.tuples(st.integers(1, 99), st.integers(0, 300)), min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_a_ratio_is_met_to_less_than_a_row_and_fits_the_pools(pools: list[tuple[int, int]]) -> None:
    shares, sizes = zip(*pools, strict=True)
    counts = _in_ratio(shares, sizes, None)
    total = sum(counts)
    for share, size, count in zip(shares, sizes, counts, strict=True):
        assert abs(count - total * share / sum(shares)) < 1
        assert count <= size


def test_arrays_are_read_and_written(tmp_path: Path) -> None:
    for name in ("grpo", "sft"):
        path = tmp_path / f"data/{name}_data.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps([{"id": f"{name}{at}", "text": "é"} for at in range(10)], indent=1))
    assert data("mix", "--layout", "data", "--root", tmp_path).exit_code == 0
    text = (tmp_path / "data/mixed/train_mix.json").read_text()
    assert len(json.loads(text)) == 10
    assert "é" in text


def test_without_any_category_nothing_is_written(tmp_path: Path) -> None:
    done = data("mix", "--layout", "artifacts", "--root", tmp_path)
    assert (done.exit_code, done.output.count("skipped, since")) == (1, 7), done.output
    assert list(tmp_path.iterdir()) == []


def test_lone_surrogates_stay_escapes(tmp_path: Path) -> None:
    pool = tmp_path / "a.jsonl"
    pool.write_text('{"text": "\\ud83d é"}\n')
    assert data("mix", "100", pool, "--out", tmp_path / "out.jsonl").exit_code == 0
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {"text": "\ud83d é"}


@pytest.mark.parametrize(
    ("rows", "arguments", "said"),
    [
        ("", ["70:30", "a.jsonl", "b.jsonl", "--out", "out.jsonl"], "b.jsonl has no rows"),
        ("[1]\n", ["70:30", "a.jsonl", "b.jsonl", "--out", "out.jsonl"], "b.jsonl, row 1"),
        ('{"text": "x"}\n{', ["70:30", "a.jsonl", "b.jsonl", "--out", "out.jsonl"], "b.jsonl, row 2"),
        ('{"text": "x"}\n', ["70:30", "a.jsonl", "c.jsonl", "--out", "out.jsonl"], "c.jsonl does not exist"),
        ('{"text": "x"}\n', ["70:30", "a.jsonl", "b.jsonl", "--out", "a.jsonl"], "would be overwritten"),
        ('{"text": "x"}\n', ["a.jsonl", "--out", "out.jsonl"], "SHARES of 1 pools"),
        (
            '{"text": "x"}\n',
            ["70.5:29.5", "a.jsonl", "b.jsonl", "--out", "out.jsonl"],
            '"70.5:29.5" are no SHARES',
        ),
        ('{"text": "x"}\n', ["70:", "a.jsonl", "b.jsonl", "--out", "out.jsonl"], '"70:" are no SHARES'),
        ('{"text": "x"}\n', ["70:130", "a.jsonl", "b.jsonl", "--out", "out.jsonl"], "at most 100 percent"),
        ('{"text": "x"}\n', ["0:1", "a.jsonl", "b.jsonl", "--out", "out.jsonl"], "each is at least 1"),
        (
            '{"text": "x"}\n',
            ["1:1", "b.jsonl", "b.jsonl", "--out", "out.jsonl"],
            "1:1 percent of pools with 1 and 1 rows",
        ),
        ('{"text": "x"}\n', ["a{category}.jsonl", "b.jsonl", "--out", "out.jsonl"], "Name the categories"),
        (
            '{"text": "x"}\n',
            ["a.jsonl", "b.jsonl", "--out", "o.jsonl", "--category", "x"],
            "lacks {category}",
        ),
        (
            '{"text": "x"}\n',
            ["a{category}", "b{category}", "--out", "o{category}", "--category", "../x"],
            "is no category",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: str, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", ({"text": "a"} for _ in range(10)))
    (tmp_path / "b.jsonl").write_text(rows)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    done = data("mix", *arguments)
    assert done.exit_code in (2, 4), done.output
    assert said in done.stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
