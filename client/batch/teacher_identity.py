"""Identity of a batch's teacher: the same model and the same adapters from the first row to the last."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillhouse.client.batch.journal import Header, Journal
from stillhouse.client.batch.ordered_output import require_same_teacher
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1 import teacher_pb2

if TYPE_CHECKING:
    from stillhouse.client.teacher.connection import TeacherConnection
    from stillhouse.client.teacher.teacher import Teacher

_REFRESH_S = 1.0
"""Shortest time between two queries for newly loaded adapters."""
VERIFY_TIMEOUT_S = 10.0
"""Time that a lost service has to report its identity."""
_IDENTITY = ("model_fingerprint", "tokenizer_fingerprint", "chat_template_fingerprint")


def identity(info: teacher_pb2.GetTeacherInfoResponse) -> dict[str, str]:
    """Returns the model name and the fields that determine a teacher's text."""
    return {"model": info.model, **{name: str(getattr(info, name)) for name in _IDENTITY}}


class BatchTeacher:
    """The teacher of one batch, verified after it was lost, and the weights behind its adapters' names.

    A name stands for the same weights from its first use on, over kills and restarts: the journal holds them.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        out: Path,
        header: Header,
        journal: Journal,
        note: Callable[[str], None],
    ) -> None:
        """`teachers` are its replicas; the first one's identity is known.

        Raises StillhouseError (ADAPTER_NOT_FOUND) if an adapter in use is gone.
        """
        self._teachers = teachers
        self._out = out
        self._header = header
        self._journal = journal
        self._note = note
        self._info = teachers[0].limits
        self._asked_s = time.monotonic()
        self._require_adapters()

    @property
    def info(self) -> teacher_pb2.GetTeacherInfoResponse:
        """Most recent info of the teacher."""
        return self._info

    def verify(self, teacher: TeacherConnection) -> None:
        """Queries a replica's identity. Raises StillhouseError if it is another teacher, or an adapter is gone."""
        self._info = teacher.refresh(timeout_s=VERIFY_TIMEOUT_S)
        self._asked_s = time.monotonic()
        require_same_teacher(self._out, self._header.teacher, identity(self._info))
        self._require_adapters()

    def use(self, name: str) -> str:
        """Records an adapter that rows name, if it is loaded; otherwise each of these rows fails."""
        if name and name not in self._journal.state.adapters and (found := self._loaded(name)):
            self._journal.add_adapter(name, found)
        return name

    def resolve_adapter(self, model: str) -> str:
        """Maps a `model` of OpenAI's format to the adapter of that name, or to none."""
        fingerprint = self._journal.state.adapters.get(model)
        if fingerprint is None:
            fingerprint = self._loaded(model) or ""
            self._journal.add_adapter(model, fingerprint)
            if not fingerprint and model not in ("", self._info.model, Path(self._info.model).name):
                self._note(
                    f'No adapter of this teacher is named "{model}": rows with this model are completed by {self._info.model}.'
                )
        return model if fingerprint else ""

    def fingerprint(self, adapter: str) -> str:
        """Returns the fingerprint of an adapter in use; empty for the base model."""
        return self._journal.state.adapters.get(adapter, "")

    def _loaded(self, name: str) -> str | None:
        found = _fingerprints(self._info).get(name)
        if found is None and time.monotonic() - self._asked_s > _REFRESH_S:
            self._refresh()
            found = _fingerprints(self._info).get(name)
        return found

    def _refresh(self) -> None:
        """Queries the first replica that responds."""
        for number, teacher in enumerate(self._teachers):
            try:
                self._info = teacher.refresh()
                break
            except StillhouseError as error:
                if not error.retryable or number + 1 == len(self._teachers):
                    raise
        self._asked_s = time.monotonic()

    def _require_adapters(self) -> None:
        loaded = _fingerprints(self._info)
        for name, fingerprint in dict(
            self._journal.state.adapters
        ).items():  # also read by the pool's threads
            if fingerprint and loaded.get(name) != fingerprint:
                how = "its name stands for another one" if name in loaded else "it is not loaded"
                raise StillhouseError(
                    Reason.ADAPTER_NOT_FOUND,
                    f'Rows of {self._out} were generated with the adapter "{name}", and now {how}. Load it again with '
                    "`stillhouse teacher load-adapter`, and repeat the command: it resumes the batch.",
                    resource=name,
                )


def _fingerprints(info: teacher_pb2.GetTeacherInfoResponse) -> Mapping[str, Any]:
    return {each.name: each.fingerprint for each in info.adapters}


def matching_replicas(teachers: Sequence[Teacher]) -> list[Teacher]:
    """Returns the replicas that respond and are the same teacher, then those that do not respond.

    Raises StillhouseError: the first error if none responds; TEACHER_CHANGED if two would generate other text.
    """
    answering: list[Teacher] = []
    silent: list[Teacher] = []
    errors: list[StillhouseError] = []
    for each in teachers:
        try:
            each.refresh()
        except StillhouseError as error:
            if not error.retryable or len(teachers) == 1:
                raise
            errors.append(error)
            silent.append(each)
        else:
            answering.append(each)
    if not answering:
        raise errors[0]
    first = identity(answering[0].limits)
    for each in answering[1:]:
        found = identity(each.limits)
        other = [name for name in first if name != "model" and first[name] != found[name]]
        if other:
            raise StillhouseError(
                Reason.TEACHER_CHANGED,
                f"{each.target} serves {found['model']} with another {other[0]} than {first['model']} at "
                f"{answering[0].target}. A batch is written by one teacher: leave one of the two out.",
            )
    return answering + silent
