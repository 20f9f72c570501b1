"""Online teachers: all reached and checked before anything is trained, and the only place that opens streams to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from stillhouse.protos.stillhouse.v1.teacher_pb2 import CAPABILITY_PREFIX_REUSE, CAPABILITY_QUERY_LOGPROBS
from stillhouse.student_trainer.config.rules.contexts import is_ensemble
from stillhouse.student_trainer.config.schema import RolloutConfig, RunConfig
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.train.process.waiting import TeacherWait
from stillhouse.student_trainer.train.teacher.query import TargetStream
from stillhouse.student_trainer.train.teacher.run_cache import RunCache
from stillhouse.student_trainer.train.teacher.streams.cached import CachedStream, cache_metrics
from stillhouse.student_trainer.train.teacher.streams.combined import combine_streams, in_order
from stillhouse.student_trainer.train.teacher.streams.generated import TextStream
from stillhouse.student_trainer.train.teacher.streams.prompted import PromptedStream
from stillhouse.student_trainer.train.teacher.streams.scored import ScoreStream
from stillhouse.student_trainer.train.teacher.target_requests import TargetRequest
from stillhouse.student_trainer.train.teacher.teacher import Demands, TeacherClient


class OnlineTeachers:
    """The teachers of one run as services, none for a run on text alone; a TargetSource."""

    def __init__(self, members: Mapping[str, TeacherClient], *, mixed: bool, cache: RunCache | None) -> None:
        self.members = members
        """Teachers by name."""
        self.cache = cache
        """The run's cache; None if it has none."""
        self._mixed = mixed
        self._cached: list[CachedStream] = []

    @classmethod
    def connect(
        cls,
        config: RunConfig,
        demands: Demands,
        run_dir: RunDir,
        *,
        patience: TeacherWait,
        stack: ExitStack,
        cache: RunCache | None = None,
    ) -> OnlineTeachers:
        """Reaches every teacher, closed with `stack`. Raises what `TeacherClient.connect` raises."""
        members = {}
        for each in config.teachers:
            teacher = TeacherClient(each, demands, run_dir)
            stack.callback(teacher.close)
            teacher.connect(patience)
            members[each.name] = teacher
        return cls(members, mixed=is_ensemble(config), cache=cache)

    def demand(self, demands: Demands) -> None:
        """Checks every teacher against `demands`, now and at every later contact. Raises StillhouseError."""
        for teacher in self.members.values():
            teacher.demand(demands)

    @property
    def hidden_size(self) -> int:
        return min((each.info.hidden_size for each in self.members.values()), default=0)

    def shared_vocab_size(self, student_size: int) -> int:
        return min([student_size, *(teacher.shared_size for teacher in self.members.values())])

    @property
    def class_names(self) -> Mapping[str, Sequence[str]]:
        return {name: teacher.info.class_names for name, teacher in self.members.items()}

    @property
    def max_sequence_tokens(self) -> int | None:
        return min((each.info.max_sequence_tokens for each in self.members.values()), default=None)

    @property
    def sequence_limits(self) -> Mapping[str, int]:
        return {name: teacher.max_sequence_tokens for name, teacher in self.members.items()}

    @property
    def fingerprint(self) -> str:
        return " ".join(teacher.info.model_fingerprint for teacher in self.members.values())

    @property
    def end_ids(self) -> Sequence[int]:
        return sorted({token for teacher in self.members.values() for token in teacher.info.eos_token_ids})

    @property
    def prefetch_steps(self) -> int:
        """Steps that are requested ahead: as many as the most distant teacher needs."""
        return max((teacher.config.prefetch_steps for teacher in self.members.values()), default=0)

    def metrics(self) -> dict[str, float]:
        """Outstanding, repeated and broken requests over all services, and of each service where there are several."""
        if not self.members:
            return {}
        loads = {
            f"{name or 'service'}{number}": each.load
            for name, teacher in self.members.items()
            for number, each in enumerate(teacher.endpoints)
        }
        found = {
            "teacher/outstanding": float(sum(each.num_outstanding for each in loads.values())),
            "teacher/outstanding_tokens": float(sum(each.outstanding_cost for each in loads.values())),
            "teacher/asked_again": float(sum(each.num_returned for each in loads.values())),
            "teacher/breaks": float(sum(each.num_breaks for each in loads.values())),
        }
        for name, each in loads.items() if len(loads) > 1 else ():
            found[f"teacher/{name}/answered"] = float(each.num_answered)
            found[f"teacher/{name}/outstanding_tokens"] = float(each.outstanding_cost)
            found[f"teacher/{name}/asked_again"] = float(each.num_returned)
        if self.cache is not None:
            found |= cache_metrics(self._cached)
        return found

    @property
    def max_query_tokens(self) -> int:
        if any(CAPABILITY_QUERY_LOGPROBS not in each.info.capabilities for each in self.members.values()):
            return 0
        return min((teacher.info.max_query_tokens for teacher in self.members.values()), default=0)

    @property
    def reuse_prefixes(self) -> bool:
        return all(
            CAPABILITY_PREFIX_REUSE in each.info.capabilities and each.prefix_reuse.pays
            for each in self.members.values()
        )

    def open_stream(self, request: TargetRequest, *, cacheable: bool = True) -> TargetStream:
        streams = {
            name: in_order(
                PromptedStream(self._open(teacher, request, cacheable=cacheable), name),
                teacher.info.class_names,
                request.class_order,
            )
            for name, teacher in self.members.items()
        }
        weights = {name: teacher.config.weight for name, teacher in self.members.items()}
        vocab_size = max(teacher.info.vocab_size for teacher in self.members.values())
        return combine_streams(streams, weights if self._mixed else None, vocab_size=vocab_size)

    def open_generators(
        self, generation: RolloutConfig, request: TargetRequest | None
    ) -> Mapping[str, TextStream]:
        return {
            name: TextStream(
                teacher, generation, request.to_config(teacher.config, teacher.info) if request else None
            )
            for name, teacher in self.members.items()
        }

    def _open(self, teacher: TeacherClient, request: TargetRequest, *, cacheable: bool) -> TargetStream:
        config = request.to_config(teacher.config, teacher.info)
        live = ScoreStream(teacher, config)
        if self.cache is None or not cacheable:
            return live
        meta = self.cache.make_meta(teacher, config, held_out=request.held_out)
        self._cached.append(CachedStream(meta, self.cache.reader, live=live, writer=self.cache.writer))
        return self._cached[-1]
