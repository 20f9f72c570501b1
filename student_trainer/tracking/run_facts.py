"""Facts of a run that trackers show, read from its directory: settings, state, examples, final model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import structlog

from stillhouse.protos.evaluation.examples import FOLDER
from stillhouse.protos.evaluation.report import PLACE
from stillhouse.student_trainer.config.proto import with_defaults
from stillhouse.student_trainer.config.resources import TRACKERS_FOLDER
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.tracking.tracker import Table, TrackedRun

log = structlog.get_logger()

ENDED = ("COMPLETED", "FAILED", "STOPPED")
"""States of a run without a live attempt."""
MAX_TABLE_ROWS = 100
MAX_CELL_CHARACTERS = 2000
_UNTOLD = frozenset({"notify", "trackers"})
"""Settings that are of no interest there; an address of `notify` may hold a secret."""


def state_path(run_dir: RunDir) -> Path:
    """File in which the run service says in which state the run is."""
    return trackers_path(run_dir) / "state.json"


def trackers_path(run_dir: RunDir) -> Path:
    """Folder of all trackers of a run."""
    return run_dir.path / TRACKERS_FOLDER


def tracked_run(run_dir: RunDir, kind: str) -> TrackedRun:
    """The run in `run_dir` for its tracker `kind`. Raises KeyError if it has none."""
    config = with_defaults(run_dir.effective_spec())
    trackers = {each.kind: each for each in config.trackers}
    values = dataclasses.asdict(config)
    run_id = run_dir.path.resolve().name
    tracker = trackers[kind]
    return TrackedRun(
        id=run_id,
        tracker=tracker,
        folder=trackers_path(run_dir) / kind,
        name=tracker.name or config.display_name or run_id,
        settings=_told({name: each for name, each in values.items() if name not in _UNTOLD}),
        labels=config.labels,
    )


def _told(value: Any) -> Any:
    """A setting as JSON has it, without fields that are unset."""
    if isinstance(value, Mapping):
        told = ((name, _told(each)) for name, each in value.items())
        return {name: each for name, each in told if each not in (None, "", [], {})}
    return [_told(each) for each in value] if isinstance(value, tuple) else value


def state_of(run_dir: RunDir) -> str:
    """The run's state: the service's word, or without a service what its events and its lock say."""
    try:
        return str(json.loads(state_path(run_dir).read_bytes())["state"])
    except FileNotFoundError:
        pass
    if run_dir.locked_by_live_process() is not None:
        return "RUNNING"
    last, offset = "", 0
    while True:
        lines, following = run_dir.read_lines("events.jsonl", offset)
        last = next((str(line.get("kind")) for line in reversed(lines)), last)
        if following == offset:
            break
        offset = following
    known = {"completed": "COMPLETED", "stopped": "STOPPED"}
    return known.get(last, "FAILED")


def page_of(run_dir: RunDir) -> str:
    """Address of the run's page, if the service told one."""
    try:
        return str(json.loads(state_path(run_dir).read_bytes()).get("page", ""))
    except (OSError, ValueError):
        return ""


def links(run_dir: RunDir) -> dict[str, str]:
    """Places of the final model by name; none if the run has no final model."""
    final = run_dir.final_path.resolve()
    if not final.is_dir():
        return {}
    run_id = final.parent.name
    found = {
        "final_model": f"runs/{run_id}/final",
        "final_model_path": str(final),
        "final_model_pull": f"stillhouse run pull {run_id} --to DIRECTORY",
    }
    page = page_of(run_dir)
    return found | ({"run_page": page} if page else {})


def new_tables(run_dir: RunDir, step: int, sent: Mapping[str, str]) -> Iterator[tuple[Table, str, str]]:
    """Tables of examples that are not among those `sent`, each with its key there and its digest; `step` is the last one."""
    root = run_dir.path
    paths = sorted((root / FOLDER).glob("[0-9]*.json"), key=lambda path: (len(path.stem), path.stem))
    for path in (*sorted((root / PLACE).parent.glob("texts_*.jsonl")), *paths):
        key = str(path.relative_to(root))
        try:
            data = path.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            if sent.get(key) != digest:
                yield _table(path, data, step), key, digest
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            log.warning("examples left out of trackers", path=str(path), why=str(error))


def _table(path: Path, data: bytes, step: int) -> Table:
    """Raises ValueError, KeyError, TypeError and IndexError."""
    if path.suffix == ".jsonl":
        name, of_step = path.stem, step
        rows = [json.loads(line) for line in data.splitlines()[:MAX_TABLE_ROWS]]
    else:
        name, of_step = "examples", int(path.stem)
        rows = _examples(json.loads(data))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name, "")) for name in columns] for row in rows]
    return Table(name=name, step=max(step, of_step), of_step=of_step, columns=columns, rows=cells)


def _examples(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the held-out texts of one evaluation, with what the student is farthest from its teacher in."""
    rows = []
    for row in document["rows"][:MAX_TABLE_ROWS]:
        kls = [(target["kl"], target["at"]) for target in row["targets"] if target.get("kl") is not None]
        found = {
            "step": document["step"],
            "set": row["set"],
            "row": row["number"],
            "text": "".join(row["texts"]),
        }
        if kls:
            worst, at = max(kls)
            mean = sum(kl for kl, _ in kls) / len(kls)
            found |= {"mean_kl": mean, "worst_kl": worst, "worst_token": row["texts"][at]}
        rows.append(found)
    return rows


def _cell(value: Any) -> str | float:
    if isinstance(value, int | float):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_CELL_CHARACTERS else text[: MAX_CELL_CHARACTERS - 1] + "…"
