"""The check on a GPU: ten minutes at most, its table, and parts that have no time left."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from benchmarks.gpu.__main__ import BUDGET_S, main
from benchmarks.gpu.parts import PARTS, Handed, results_of


def test_all_parts_together_have_ten_minutes() -> None:
    assert sum(part.limit_s for part in PARTS) <= BUDGET_S == 600


def test_no_part_installs_anything(tmp_path: Path) -> None:
    handed = Handed(work=tmp_path, peers=tmp_path)
    commands = {part.name: part.command("full", handed, tmp_path / "results") for part in PARTS}
    assert "--no-install" in commands["student"]
    for name in ("small", "qwen", "qwen7b"):
        ratios = str(commands[name][commands[name].index("--only") + 1])
        assert ratios
        assert not {"http", "trl", "grpc"} & set(ratios.split("_"))


def test_parts_without_time_are_named_and_fail_the_check(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    done = CliRunner().invoke(
        main, ["--work", str(tmp_path / "work"), "--budget", "1", "--json", str(results), "--part", "distil"]
    )
    assert done.exit_code == 1
    assert "not begun: the time was over" in done.output
    assert json.loads(results.read_text())["parts"]["distil"]["results"] is None


def test_results_become_lines() -> None:
    lines = {part.name: part.lines for part in PARTS}
    errors = {"largest": 1e-5, "kl": 1e-9, "top_1": 1.0}
    others = {f"{name}_of_transformers": value for name, value in errors.items()}
    ((what, figure), (_, problem)) = lines["conformance"](
        {
            "dtypes": {
                "float32": {"engine": "vllm 0.32.0", "problem": "", **errors, **others},
                "bfloat16": {"engine": "", "problem": "no memory"},
            }
        }
    )
    assert what == "served in float32, vllm 0.32.0"
    assert figure.startswith("largest error 1.00e-05 nats, KL 1.0e-09, top-1 100.00%")
    assert problem == "no memory"
    arm = {"name": "online", "problem": "", "seconds": 2.0, "last_step": 8, "scores": {"8": 0.25}}
    ((what, figure),) = lines["distil"]({"teacher_parameters": 90_000_000, "arms": [arm]})
    assert (what, figure) == (
        "online, a teacher of 90 M",
        "2.0 s for 8 steps; held-out KL 0.2500 at step 8",
    )


def test_a_broken_file_of_results_is_none(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("{")
    assert results_of(tmp_path / "results") is None
