"""Writes the examples of a run's evaluations into its directory: one file for each, and an index; a failure is only logged."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import structlog

from stillhouse.protos.evaluation.examples import (
    FOLDER,
    FORMAT,
    INDEX,
    MAX_BYTES,
    MAX_EVALUATIONS,
    place_of,
)
from stillhouse.protos.files.atomic import write_atomic
from stillhouse.student_trainer.run_dir import Attempt
from stillhouse.student_trainer.train.data.token_texts import running_texts, token_bytes, token_text
from stillhouse.student_trainer.train.evaluation.token_examples import TOP_K, ShownExamples

log = structlog.get_logger()

Subject = Literal["before", "along", "after"]


class ExampleFiles:
    """The examples of one run."""

    def __init__(self, attempt: Attempt, tokenizer: Any, *, from_cache: bool) -> None:
        """`from_cache`: the teacher's outputs are those of a cache, with the tokens that it keeps."""
        self._attempt = attempt
        self._tokenizer = tokenizer
        self._from_cache = from_cache
        self._bytes: dict[int, bytes] | None = None

    def write(
        self, step: int, subject: Subject, shown: ShownExamples | None, protected: Collection[int] = ()
    ) -> None:
        """Writes the examples of the evaluation at `step`, instead of those of this and later steps. Raises nothing.

        Beyond MAX_EVALUATIONS those nearest to others are removed, but never the first, this one and `protected` ones.
        """
        if shown is None or not shown.values or not self._attempt.writes:
            return
        try:
            self._write(step, subject, shown, protected)
        except Exception as error:
            log.warning("examples of held-out rows cannot be written", step=step, why=str(error)[:500])

    def _write(self, step: int, subject: Subject, shown: ShownExamples, protected: Collection[int]) -> None:
        root = self._attempt.run_dir.path
        document = self._document(step, subject, shown)
        content = _encoded(document)
        while len(content) > MAX_BYTES and len(document["rows"]) > 1:
            document["rows"].pop()
            document["left_out"] += 1
            content = _encoded(document)
        self._attempt.check_fence()
        (root / FOLDER).mkdir(parents=True, exist_ok=True)
        write_atomic(root / place_of(step), content)
        earlier = [each for each in _read_index(root / INDEX) if each["step"] < step]
        own = {"step": step, "subject": subject, "path": place_of(step), "kl": _mean_kl(document["rows"])}
        kept = thinned([*earlier, own], MAX_EVALUATIONS, protected)
        self._attempt.check_fence()
        write_atomic(root / INDEX, _encoded({"format": FORMAT, "evaluations": kept}))
        names = {Path(each["path"]).name for each in kept} | {Path(INDEX).name}
        for path in (root / FOLDER).iterdir():
            if path.name not in names:
                path.unlink(missing_ok=True)

    def _document(self, step: int, subject: Subject, shown: ShownExamples) -> dict[str, Any]:
        if self._bytes is None:
            self._bytes = token_bytes(self._tokenizer)
        known = self._bytes
        rows = []
        for place, row in shown.plan.rows.items():
            values, example = shown.values.get(place), row.example
            if values is None:
                continue
            ids = example.token_ids[row.begin : row.end].tolist()
            rows.append(
                {
                    "set": row.set_name,
                    "number": row.number,
                    "place": example.place,
                    "begin": row.begin,
                    "num_tokens": len(example.token_ids),
                    "tokens": ids,
                    "texts": running_texts([known.get(each) for each in ids], ids),
                    "targets": _targets(values),
                }
            )
        tops = [target["top"] for row in rows for target in row["targets"]]
        named = sorted({entry[0] for top in tops for entry in top})
        return {
            "format": FORMAT,
            "step": step,
            "subject": subject,
            "top_k": TOP_K,
            "teacher_top_k": max(
                (each.get("known", 0) for value in shown.values.values() for each in value["values"]),
                default=0,
            ),
            "from_cache": self._from_cache,
            "left_out": shown.plan.left_out + len(shown.plan.rows) - len(rows),
            "rows": rows,
            "texts": {str(each): token_text(known.get(each), each) for each in named},
        }


def _targets(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the targets of a row, with what the teacher says of the text's own token."""
    teacher = values["teacher"] or [None] * len(values["at"])
    found = []
    for at, own, target in zip(values["at"], teacher, values["values"], strict=True):
        plain = {name: value for name, value in target.items() if name != "known"}
        found.append({"at": at, "teacher_logprob": own, **plain})
    return found


def thinned(
    evaluations: Sequence[dict[str, Any]], number: int, protected: Collection[int]
) -> list[dict[str, Any]]:
    """Returns at most `number` entries: the one is removed whose neighbours are nearest to each other, until they fit."""
    kept = list(evaluations)
    while len(kept) > number:
        inner = [at for at in range(1, len(kept) - 1) if kept[at]["step"] not in protected]
        if not inner:
            break
        del kept[min(inner, key=lambda at: kept[at + 1]["step"] - kept[at - 1]["step"])]
    return kept


def _mean_kl(rows: Sequence[Mapping[str, Any]]) -> float | None:
    found = [each["kl"] for row in rows for each in row["targets"] if each.get("kl") is not None]
    return round(math.fsum(found) / len(found), 4) if found else None


def _encoded(document: Mapping[str, Any]) -> bytes:
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode(errors="backslashreplace") + b"\n"


def _read_index(path: Path) -> list[dict[str, Any]]:
    """Returns the entries of an earlier index, ascending by step; none if it cannot be read."""
    try:
        entries = json.loads(path.read_bytes())["evaluations"]
        return sorted(
            ({**each, "step": int(each["step"]), "path": place_of(int(each["step"]))} for each in entries),
            key=lambda each: each["step"],
        )
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the index of examples cannot be read and begins anew", why=str(error)[:500])
        return []
