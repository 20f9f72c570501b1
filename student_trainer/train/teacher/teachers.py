"""A run's teachers: all reached and checked before anything is trained, and one place that opens streams to them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from stillhouse.protos.stillhouse.v1.teacher_pb2 import CAPABILITY_QUERY_LOGPROBS, DistributionConfig
from stillhouse.student_trainer.config.check_contexts import is_ensemble
from stillhouse.student_trainer.config.schema import RunConfig
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.train.process.waiting import Patience
from stillhouse.student_trainer.train.teacher.answers import Answers, RequestOf, offered
from stillhouse.student_trainer.train.teacher.cached_stream import CachedStream, cache_metrics
from stillhouse.student_trainer.train.teacher.query import TargetStream
from stillhouse.student_trainer.train.teacher.run_cache import RunCache
from stillhouse.student_trainer.train.teacher.score_stream import ScoreStream
from stillhouse.student_trainer.train.teacher.teacher import Demands, TeacherClient


class Teachers:
    """The teachers of one run, connected."""

    def __init__(self, members: Mapping[str, TeacherClient], *, mixed: bool, cache: RunCache | None) -> None:
        self.members = members
        """By name."""
        self._mixed = mixed
        self._cache = cache
        self._cached: list[CachedStream] = []

    @classmethod
    def connect(
        cls,
        config: RunConfig,
        demands: Demands,
        run_dir: RunDir,
        *,
        patience: Patience,
        stack: ExitStack,
        cache: RunCache | None = None,
    ) -> Teachers:
        """Reaches every teacher; they are closed with `stack`. Raises what `TeacherClient.connect` raises."""
        members = {}
        for each in config.teachers:
            teacher = TeacherClient(each, demands, run_dir)
            stack.callback(teacher.close)
            teacher.connect(patience)
            members[each.name] = teacher
        return cls(members, mixed=is_ensemble(config), cache=cache)

    @property
    def tokenizer_size(self) -> int:
        """Ids below it mean the same to the student and to every teacher."""
        return min(teacher.shared_size for teacher in self.members.values())

    @property
    def max_sequence_tokens(self) -> int:
        """Longest sequence that all of them take."""
        return min(teacher.info.max_sequence_tokens for teacher in self.members.values())

    @property
    def fingerprint(self) -> str:
        """Of their models, in the order of the run file."""
        return " ".join(teacher.info.model_fingerprint for teacher in self.members.values())

    @property
    def prefetch_steps(self) -> int:
        """Steps that are asked ahead: as many as the one that is farthest away needs."""
        return max(teacher.config.prefetch_steps for teacher in self.members.values())

    def metrics(self) -> dict[str, float]:
        """What the services of all teachers owe and left undone; of each by itself where there are several."""
        counts = {
            f"{name or 'service'}{number}": each
            for name, teacher in self.members.items()
            for number, each in enumerate(teacher.endpoints.counts().values())
        }
        found = {
            "teacher/outstanding": float(sum(each.outstanding for each in counts.values())),
            "teacher/outstanding_tokens": float(sum(each.outstanding_tokens for each in counts.values())),
            "teacher/asked_again": float(sum(each.returned for each in counts.values())),
            "teacher/breaks": float(sum(each.breaks for each in counts.values())),
        }
        for name, each in counts.items() if len(counts) > 1 else ():
            found[f"teacher/{name}/answered"] = float(each.answered)
            found[f"teacher/{name}/outstanding_tokens"] = float(each.outstanding_tokens)
            found[f"teacher/{name}/asked_again"] = float(each.returned)
        if self._cache is not None:
            found |= cache_metrics(self._cached)
        return found

    def max_query_tokens(self) -> int:
        """Ids per position that all of them take; 0 if one takes none."""
        if any(CAPABILITY_QUERY_LOGPROBS not in each.info.capabilities for each in self.members.values()):
            return 0
        return min(teacher.info.max_query_tokens for teacher in self.members.values())

    def answers(self, request: RequestOf, *, fixed_text: bool, held_out: bool = False) -> Answers:
        """Answers to `request`, about text that stays the same from run to run or not; the caller closes them.

        `held_out` text is marked in a cache, so that nobody learns from it.
        """
        streams: dict[str, TargetStream] = {
            name: self._stream(
                teacher,
                offered(request(teacher.config), teacher.info),
                fixed_text=fixed_text,
                held_out=held_out,
            )
            for name, teacher in self.members.items()
        }
        weights = {name: teacher.config.weight for name, teacher in self.members.items()}
        vocab_size = max(teacher.info.vocab_size for teacher in self.members.values())
        return Answers(streams, weights=weights if self._mixed else None, vocab_size=vocab_size)

    def _stream(
        self, teacher: TeacherClient, request: DistributionConfig, *, fixed_text: bool, held_out: bool
    ) -> TargetStream:
        live = ScoreStream(teacher, request)
        if self._cache is None or not fixed_text:
            return live
        self._cached.append(self._cache.around(live, teacher, request, held_out=held_out))
        return self._cached[-1]
