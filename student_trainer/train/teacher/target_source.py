"""The interface of a run's teachers, whether they are services, a cache, or not needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from stillhouse.student_trainer.config.schema import RolloutConfig
from stillhouse.student_trainer.train.teacher.query import TargetStream
from stillhouse.student_trainer.train.teacher.streams.generated import TextStream
from stillhouse.student_trainer.train.teacher.target_requests import TargetRequest


class TargetSource(Protocol):
    """The teachers of one run, reached and checked before anything is trained."""

    @property
    def fingerprint(self) -> str:
        """Fingerprints of their models, in the order of the run file."""

    @property
    def end_ids(self) -> Sequence[int]:
        """Tokens that end the texts that they generate, ascending; empty if they generate none."""

    @property
    def prefetch_steps(self) -> int:
        """Steps that are requested ahead of the student."""

    @property
    def max_sequence_tokens(self) -> int | None:
        """Longest sequence that all of them take; None if there is no limit."""

    @property
    def sequence_limits(self) -> Mapping[str, int]:
        """Longest sequence of each teacher with its own prompt, by name; without one there is no limit."""

    @property
    def max_query_tokens(self) -> int:
        """Query ids per position that all of them take; 0 if one takes none."""

    @property
    def reuse_prefixes(self) -> bool:
        """True while all of them score the rest of a text without computing again what came before."""

    @property
    def class_names(self) -> Mapping[str, Sequence[str]]:
        """Names of each teacher's classes, by the teacher's name; empty for a language model."""

    @property
    def hidden_size(self) -> int:
        """Units of the teachers' hidden states; 0 if they give none."""

    def shared_vocab_size(self, student_size: int) -> int:
        """Ids below it mean the same to every teacher and to a student of `student_size` tokens."""

    def open_stream(self, request: TargetRequest, *, cacheable: bool = True) -> TargetStream:
        """Opens a stream of targets, which the caller closes; rollouts differ from run to run and are not `cacheable`."""

    def open_generators(
        self, generation: RolloutConfig, request: TargetRequest | None
    ) -> Mapping[str, TextStream]:
        """Opens a stream of completions, with the targets of `request`, for each teacher by name; the caller closes them."""

    def metrics(self) -> dict[str, float]:
        """Metrics of requests and cache hits at present."""
