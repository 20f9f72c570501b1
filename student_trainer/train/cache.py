"""The run's cache of teachers' answers: opened once, and wrapped around every stream that asks a teacher about fixed text.

Modes: "write_through" asks for what is missing and keeps it, "read" asks and keeps nothing, "only" asks nobody.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import structlog

from protos.cache_format import CacheMeta
from protos.cache_reader import CacheReader
from protos.cache_writer import CacheWriter
from protos.errors import Reason, StillhouseError
from protos.stillhouse.v1.teacher_pb2 import DistributionConfig
from student_trainer.config import CacheConfig
from student_trainer.run_dir import RunDir, write_whole
from student_trainer.train.cache_stream import AnswerStream, CachedStream
from student_trainer.train.prompts import Example
from student_trainer.train.teacher_client import Teacher, adapter_fingerprint

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class RunCache:
    """An open cache and how the run uses it."""

    config: CacheConfig
    path: Path
    reader: CacheReader
    writer: CacheWriter | None

    @classmethod
    def open(cls, config: CacheConfig | None, data_dir: Path, stack: ExitStack) -> RunCache | None:
        """The cache that a run names, closed with `stack`; None if it names none.

        Raises:
            StillhouseError: CACHE_NOT_FOUND, CACHE_LOCKED; CACHE_INVALID for a damaged shard where no teacher is asked.
        """
        if config is None:
            return None
        path = data_dir / config.path
        if config.mode == "write_through":
            writer = stack.enter_context(CacheWriter(path))
            reader = writer.reader
        else:
            writer = None
            reader = CacheReader(path, ignore_broken=config.mode == "read")
            stack.callback(reader.close)
        for broken in reader.broken:
            log.warning("a shard of the cache is left out", why=broken.error.message)
        log.info("cache opened", path=str(path), mode=config.mode, answers=len(reader))
        return cls(config, path, reader, writer)

    @property
    def is_only(self) -> bool:
        """Whether no teacher is asked."""
        return self.config.mode == "only"

    def around(self, live: AnswerStream, teacher: Teacher, request: DistributionConfig) -> CachedStream:
        """A stream that asks `live` for what the cache lacks; `teacher` has been reached."""
        return CachedStream(self.meta(teacher, request), self.reader, live=live, writer=self.writer)

    def alone(self, meta: CacheMeta) -> CachedStream:
        """A stream that asks nobody."""
        return CachedStream(meta, self.reader, live=None, writer=None)

    @staticmethod
    def meta(teacher: Teacher, request: DistributionConfig) -> CacheMeta:
        """What a teacher that has been reached answers to `request`."""
        adapter = teacher.config.adapter
        fingerprint = adapter_fingerprint(teacher.info, adapter, teacher.config.targets[0])
        return CacheMeta.of(teacher.info, request, adapter=adapter, adapter_fingerprint=fingerprint)

    def find(
        self, request: DistributionConfig, examples: Sequence[Example], *, field: str, adapter: str | None
    ) -> CacheMeta:
        """The kind of stored answers that a run without a teacher takes for `examples`, each of which has one.

        `field` is where top_k stands in the run file; `adapter` names the adapter, None takes the only one.

        Raises:
            StillhouseError: CACHE_MISS, which counts what is missing or says what is stored instead.
        """
        fitting = self._fitting(request, field, adapter)
        best = max(fitting, key=lambda meta: self._num_stored(meta, examples))
        missing = [
            example
            for example in examples
            if not self.reader.has(best.key(example.token_ids, example.start), best)
        ]
        if missing:
            raise StillhouseError(
                Reason.CACHE_MISS,
                f"The cache {self.config.path} lacks the answers to {len(missing)} of {len(examples)} sequences, first "
                f"{missing[0].place}. Build it with the same data, tokenizer and data.max_sequence_tokens by "
                "`stillhouse cache build`, or use cache.mode: write_through with a teacher.",
                metadata={"missing": str(len(missing)), "wanted": str(len(examples))},
            )
        return best

    def check_tokenizer(self, fingerprint: str) -> None:
        """Return if the stored answers are for the student's tokenizer. Raises StillhouseError(TOKENIZER_MISMATCH)."""
        found = {meta.tokenizer_fingerprint for meta in self.reader.metas}
        if found and fingerprint not in found:
            raise StillhouseError(
                Reason.TOKENIZER_MISMATCH,
                f"The student's tokenizer ({fingerprint}) is not the one of the teacher whose answers the cache "
                f"{self.config.path} holds ({', '.join(sorted(found))}), so its token ids stand for different text. "
                "Name a cache of a teacher of the student's family.",
                metadata={"student": fingerprint, "teacher": min(found)},
            )

    def check_teacher(self, meta: CacheMeta, run_dir: RunDir) -> None:
        """Return if the stored answers are of the teacher that the run began with. Raises StillhouseError(TEACHER_CHANGED)."""
        identity = {
            "model_fingerprint": meta.teacher_fingerprint,
            "adapter": meta.adapter,
            "adapter_fingerprint": meta.adapter_fingerprint,
        }
        try:
            known = json.loads(run_dir.teacher_path.read_bytes())
        except FileNotFoundError:
            write_whole(run_dir.teacher_path, json.dumps({**identity, "model": meta.model}).encode())
            return
        for name in ("model_fingerprint", "adapter_fingerprint"):
            if known.get(name) != identity[name]:
                raise StillhouseError(
                    Reason.TEACHER_CHANGED,
                    f"The cache {self.config.path} holds answers of another teacher than the run began with: its {name} is "
                    f"{identity[name]}, and was {known.get(name)}. Give the former cache its name again, or create a "
                    "run for this one.",
                    metadata={"expected": str(known.get(name)), "found": identity[name]},
                )

    def _fitting(self, request: DistributionConfig, field: str, adapter: str | None) -> list[CacheMeta]:
        """Kinds of stored answers that have what is asked for, all of one teacher."""
        kinds = self.reader.metas
        if not kinds:
            raise self._miss("holds no answer yet", "Build it with `stillhouse cache build`.")
        named = [meta for meta in kinds if adapter is None or meta.adapter == adapter]
        if not named:
            have = ", ".join(sorted({f'"{meta.adapter}"' for meta in kinds}))
            raise self._miss(
                f'holds no answer of the adapter "{adapter}"; it has {have}', "Correct teachers[0].adapter."
            )
        if any(not meta.same_teacher(named[0]) for meta in named):
            have = ", ".join(sorted({f"{meta.model} {meta.adapter}".strip() for meta in named}))
            raise self._miss(
                f"holds answers of several teachers ({have})",
                "Name the adapter in teachers[0].adapter, or keep each teacher's answers in a cache of its own.",
            )
        like_top_k = [meta for meta in named if meta.top_k == request.top_k]
        if not like_top_k:
            have = ", ".join(str(top_k) for top_k in sorted({meta.top_k for meta in named}))
            raise self._miss(
                f"was built with top_k {have}; {field} is {request.top_k}", f"Set {field}: {have}."
            )
        pairs = [(meta, meta.asked(request)) for meta in like_top_k]
        fitting = [asked for meta, asked in pairs if meta.sampling == asked.sampling and meta.serves(asked)]
        if not fitting:
            raise self._miss(
                "was built with another loss.temperature, loss.sparse_target or number of draws",
                "Set them as they were when it was built, or build another one.",
            )
        return fitting

    def _miss(self, what: str, remedy: str) -> StillhouseError:
        return StillhouseError(Reason.CACHE_MISS, f"The cache {self.config.path} {what}. {remedy}")

    def _num_stored(self, meta: CacheMeta, examples: Sequence[Example]) -> int:
        return sum(self.reader.has(meta.key(each.token_ids, each.start), meta) for each in examples)
