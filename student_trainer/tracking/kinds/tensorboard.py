"""TensorBoard: settings, examples and final model as texts, beside the metrics that the training process itself writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from stillhouse.student_trainer.tracking.tracker import Point, Table, TrackedRun


class TensorBoard:
    """Event files in tensorboard/about/, a run of its own in TensorBoard's list."""

    repeats_safely = True

    def __init__(self) -> None:
        self._writer: Any = None
        self._step = 0

    def open(self, run: TrackedRun, known: str) -> str:
        """Writes the settings."""
        folder = run.folder.parents[1] / "tensorboard" / "about"
        self._writer = EventFileWriter(str(folder))
        if not known:
            rows = [[name, value] for name, value in run.flat_settings().items()]
            self._write("settings", 0, _markdown(["setting", "value"], rows))
        return run.id

    def log(self, points: Sequence[Point]) -> None:
        """Notes the step: the training process has written the points."""
        self._step = points[-1].step

    def add_table(self, table: Table) -> None:
        """Writes a table as text."""
        self._write(table.name, table.of_step, _markdown(table.columns, table.rows))

    def add_links(self, links: Mapping[str, str]) -> None:
        """Writes them as a table."""
        self._write(
            "final_model", self._step, _markdown(["what", "where"], [list(each) for each in links.items()])
        )

    def close(self, state: str) -> None:  # noqa: ARG002 - event files have no state
        """Closes the file."""
        self._writer.close()

    def _write(self, tag: str, step: int, text: str) -> None:
        tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[text.encode()])
        value = summary_pb2.Summary.Value(
            tag=tag, tensor=tensor, metadata=create_summary_metadata(display_name=tag, description="")
        )
        self._writer.add_event(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=[value])))
        self._writer.flush()


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(each) for each in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    """Text that stays within its cell."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")


def make() -> TensorBoard:
    """A new tracker."""
    return TensorBoard()
