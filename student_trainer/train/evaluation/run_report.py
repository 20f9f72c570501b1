"""Keeps the scores of a run's first and last evaluation in its directory, across attempts, and writes its report from both."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from stillhouse.protos.evaluation.report import PLACE, make_report
from stillhouse.protos.evaluation.row_sums import RowSums
from stillhouse.protos.files.atomic import write_atomic
from stillhouse.student_trainer.run_dir import Attempt
from stillhouse.student_trainer.train.evaluation.evaluator import Evaluation, SetScores

log = structlog.get_logger()

Subjects = Mapping[str, SetScores]
"""Subject of a report, such as "before", to its scores."""


class RunReport:
    """The report of one run."""

    def __init__(self, attempt: Attempt, generation: Mapping[str, Any]) -> None:
        """`generation` is the sampling of written text."""
        self._attempt = attempt
        self._generation = generation
        self._folder = (attempt.run_dir.path / PLACE).parent

    def keep(self, subject: str, step: int, evaluation: Evaluation) -> None:
        """Stores the scores and texts of `subject`, "before" or "after"; the teacher's own count with the latter."""
        if not evaluation.student or not self._attempt.writes:
            return
        subjects: dict[str, SetScores] = {subject: evaluation.student}
        if subject == "after" and any(evaluation.teacher.values()):
            subjects["teacher"] = evaluation.teacher
        self._attempt.check_fence()
        self._folder.mkdir(exist_ok=True)
        write_atomic(self._stored(subject), _to_bytes(subjects, step))
        if evaluation.texts:
            rows = [
                {"set": name, "text": each.text, "reference": each.reference}
                for name, texts in evaluation.texts.items()
                for each in texts
            ]
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_atomic(self._folder / f"texts_{subject}.jsonl", lines.encode(errors="backslashreplace"))

    def write(self, step: int) -> None:
        """Writes the report of the student of `step`, if its evaluation was kept."""
        after = _from_bytes(self._stored("after")) if self._attempt.writes else None
        if after is None or after[1] != step:
            return
        before = _from_bytes(self._stored("before"))
        subjects = {**(before[0] if before else {}), **after[0]}
        if not _is_of_same_rows(subjects):
            log.warning("the rows changed after the first evaluation; the report lacks it")
            subjects = after[0]
        self.write_scores(subjects, step)

    def write_scores(self, subjects: Subjects, step: int) -> None:
        """Writes the report of `subjects`."""
        names = list(dict.fromkeys(name for scores in subjects.values() for name in scores))
        sets = {
            name: {subject: scores[name] for subject, scores in subjects.items() if scores.get(name)}
            for name in names
        }
        sets = {name: scores for name, scores in sets.items() if scores}
        if not sets:
            return
        report = make_report(sets, {"step": step, "generation": dict(self._generation)})
        self._attempt.check_fence()
        self._folder.mkdir(exist_ok=True)
        data = json.dumps(report, indent=2, ensure_ascii=False, default=str).encode(errors="backslashreplace")
        write_atomic(self._attempt.run_dir.path / PLACE, data + b"\n")

    def _stored(self, subject: str) -> Path:
        """Returns a hidden file, which is no artifact."""
        return self._folder / f".{subject}.npz"


def _is_of_same_rows(subjects: Subjects) -> bool:
    """Returns True if the scores of each set and name are of as many rows for all subjects."""
    numbers: dict[tuple[str, str], int] = {}
    return all(
        numbers.setdefault((place, name), len(rows.sums)) == len(rows.sums)
        for sets in subjects.values()
        for place, scores in sets.items()
        for name, rows in scores.items()
    )


def _to_bytes(subjects: Subjects, step: int) -> bytes:
    heads: list[list[str]] = []
    arrays: dict[str, NDArray[np.float64]] = {}
    for subject, sets in subjects.items():
        for place, scores in sets.items():
            for name, rows in scores.items():
                arrays[f"a{len(heads)}"] = rows.sums
                heads.append([subject, place, name, rows.reduction, rows.signature])
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, head=np.array(json.dumps({"step": step, "rows": heads})), **arrays)
    return buffer.getvalue()


def _from_bytes(path: Path) -> tuple[dict[str, dict[str, dict[str, RowSums]]], int] | None:
    """Returns stored subjects and their step; None if there are none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            head = json.loads(str(file["head"]))
            subjects: dict[str, dict[str, dict[str, RowSums]]] = {}
            for number, (subject, place, name, reduction, signature) in enumerate(head["rows"]):
                rows = RowSums(sums=file[f"a{number}"], reduction=reduction, signature=signature)
                _ = rows.value  # KeyError for a reduction of a later version
                subjects.setdefault(subject, {}).setdefault(place, {})[name] = rows
            return subjects, int(head["step"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        log.warning("stored scores cannot be read; the report lacks them", path=str(path), why=str(error))
        return None
