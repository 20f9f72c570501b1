"""Teachers that are not there: their answers come out of a cache, all of which are found before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from stillhouse.protos.cache.format import CacheMeta
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.teacher_pb2 import DistributionConfig
from stillhouse.student_trainer.config.check_contexts import is_ensemble
from stillhouse.student_trainer.config.schema import RunConfig, TeacherConfig
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.teacher.answers import Answers, RequestOf
from stillhouse.student_trainer.train.teacher.cached_stream import CachedStream, cache_metrics
from stillhouse.student_trainer.train.teacher.identity import check_stored_identity
from stillhouse.student_trainer.train.teacher.queries import Question
from stillhouse.student_trainer.train.teacher.run_cache import RunCache
from stillhouse.student_trainer.train.teacher.teacher import TeacherClient


class StoredTeachers:
    """The teachers of one run, as far as a cache remembers them; with the interface of Teachers."""

    def __init__(
        self,
        cache: RunCache,
        configs: Mapping[str, TeacherConfig],
        tokenizer_fingerprint: str,
        *,
        mixed: bool,
    ) -> None:
        self._cache = cache
        self._configs = configs
        self._tokenizer = tokenizer_fingerprint
        self._mixed = mixed
        self.members: Mapping[str, TeacherClient] = {}
        """Nobody."""
        self._found: dict[tuple[str, bytes], CacheMeta] = {}
        self._streams: list[CachedStream] = []

    @classmethod
    def find(
        cls,
        config: RunConfig,
        questions: Sequence[Question],
        tokenizer_fingerprint: str,
        *,
        run_dir: RunDir,
        data_dir: Path,
        stack: ExitStack,
    ) -> StoredTeachers:
        """Opens the run's cache, closed with `stack`; it has an answer to each of `questions`.

        Raises:
            StillhouseError: CACHE_NOT_FOUND, CACHE_INVALID; CACHE_MISS, which counts what is missing or says what is
                stored instead; TOKENIZER_MISMATCH; TEACHER_CHANGED.
        """
        cache = RunCache.open(config.cache, data_dir, stack)
        assert cache is not None, "the configuration names a cache"
        configs = {each.name: each for each in config.teachers} or {"": TeacherConfig()}
        stored = cls(cache, configs, tokenizer_fingerprint, mixed=is_ensemble(config))
        known = bool(config.teachers)
        for question in questions:
            for name, teacher in configs.items():
                request = question.request(teacher)
                meta = stored._find(request, question, teacher if known else None)
                check_stored_identity(
                    run_dir,
                    name,
                    {
                        "model_fingerprint": meta.teacher_fingerprint,
                        "adapter": meta.adapter,
                        "adapter_fingerprint": meta.adapter_fingerprint,
                        "tokenizer_fingerprint": meta.tokenizer_fingerprint,
                    },
                    model=meta.model,
                    place=f"The cache {cache.config.path}",
                )
                stored._found[name, request.SerializeToString(deterministic=True)] = meta
        return stored

    @property
    def tokenizer_size(self) -> int:
        """Ids below it mean the same to the student and to every teacher."""
        return min(meta.shared_with(self._tokenizer) for meta in self._found.values())

    @property
    def fingerprint(self) -> str:
        """Of their models, in the order of the run file."""
        return " ".join(dict.fromkeys(meta.teacher_fingerprint for meta in self._found.values()))

    @property
    def prefetch_steps(self) -> int:
        """Steps that are read ahead."""
        return max(each.prefetch_steps for each in self._configs.values())

    @property
    def max_sequence_tokens(self) -> int | None:
        """Nothing is written, so nothing bounds it."""
        return None

    def metrics(self) -> dict[str, float]:
        """What came out of the cache."""
        return cache_metrics(self._streams)

    def max_query_tokens(self) -> int:
        """Nobody can be asked."""
        return 0

    def answers(self, request: RequestOf, *, fixed_text: bool, held_out: bool = False) -> Answers:  # noqa: ARG002 - as Teachers
        """Answers to one of the questions; the caller closes them."""
        assert fixed_text, "checked with the configuration"
        metas = {
            name: self._found[name, request(teacher).SerializeToString(deterministic=True)]
            for name, teacher in self._configs.items()
        }
        weights = {name: teacher.weight for name, teacher in self._configs.items()}
        streams = {name: self._cache.alone(meta) for name, meta in metas.items()}
        self._streams += streams.values()
        return Answers(
            streams,
            weights=weights if self._mixed else None,
            vocab_size=max(meta.vocab_size for meta in metas.values()),
        )

    def _find(
        self, request: DistributionConfig, question: Question, teacher: TeacherConfig | None
    ) -> CacheMeta:
        """The kind of stored answers that fits the question, all of one teacher, with an answer to each example."""
        examples = question.of(teacher.name if teacher else "")
        fitting = self._fitting(request, question.field, teacher)
        missing = {meta.logprob_dtype: self._missing(meta, examples) for meta in fitting}
        best = min(fitting, key=lambda meta: len(missing[meta.logprob_dtype]))
        lacking = missing[best.logprob_dtype]
        if lacking:
            raise StillhouseError(
                Reason.CACHE_MISS,
                f"The cache {self._cache.config.path} lacks the answers to {len(lacking)} of {len(examples)} sequences, first "
                f"{lacking[0].place}. Build it with the same data, tokenizer and data.max_sequence_tokens by "
                "`stillhouse cache build`, or use cache.mode: write_through with a teacher.",
                metadata={"missing": str(len(lacking)), "wanted": str(len(examples))},
            )
        return best

    def _missing(self, meta: CacheMeta, examples: Sequence[Example]) -> list[Example]:
        reader = self._cache.reader
        return [each for each in examples if not reader.has(meta.key(each.token_ids, each.start), meta)]

    def _fitting(
        self, request: DistributionConfig, field: str, teacher: TeacherConfig | None
    ) -> list[CacheMeta]:
        kinds = self._cache.reader.metas
        if not kinds:
            raise self._miss("holds no answer yet", "Build it with `stillhouse cache build`.")
        kinds = self._readable(kinds)
        if teacher is not None:
            kinds = self._of(teacher, kinds)
        if any(not meta.same_teacher(kinds[0]) for meta in kinds):
            have = ", ".join(sorted({f"{meta.model} {meta.adapter}".strip() for meta in kinds}))
            raise self._miss(
                f"holds answers of several teachers ({have})",
                "Name the one to learn from in teachers, by its name or adapter when the cache was written.",
            )
        wide = [meta for meta in kinds if meta.top_k == request.top_k]
        if not wide:
            have = " and ".join(str(top_k) for top_k in sorted({meta.top_k for meta in kinds}))
            raise self._miss(
                f"was built with top_k {have}, and {field} is {request.top_k}", f"Set {field}: {have}."
            )
        # Without the entropy its lower bound weighs the tokens.
        told = request.entropy and any(meta.entropy for meta in wide)
        pairs = [(meta, replace(meta.asked(request), entropy=told)) for meta in wide]
        fitting = [asked for meta, asked in pairs if meta.sampling == asked.sampling and meta.serves(asked)]
        if not fitting:
            raise self._miss(
                "was built with another loss.temperature, loss.sparse_target or number or seed of draws",
                "Set them as they were when it was built, or build another one.",
            )
        return fitting

    def _readable(self, kinds: Sequence[CacheMeta]) -> list[CacheMeta]:
        readable = [meta for meta in kinds if meta.shared_with(self._tokenizer)]
        if not readable:
            found = ", ".join(sorted({meta.tokenizer_fingerprint for meta in kinds}))
            raise StillhouseError(
                Reason.TOKENIZER_MISMATCH,
                f"The student's tokenizer ({self._tokenizer}) is not the one of the teacher whose answers the cache "
                f"{self._cache.config.path} holds ({found}), so its token ids stand for different text. "
                "Name a cache of a teacher of the student's family.",
                metadata={"student": self._tokenizer, "teacher": found},
            )
        return readable

    def _of(self, teacher: TeacherConfig, kinds: Sequence[CacheMeta]) -> list[CacheMeta]:
        named = [meta for meta in kinds if teacher.name and meta.name == teacher.name] or kinds
        with_adapter = [meta for meta in named if meta.adapter == teacher.adapter]
        if not with_adapter:
            have = ", ".join(sorted({f'"{meta.adapter}"' for meta in named}))
            raise self._miss(
                f'holds no answer of adapter "{teacher.adapter}"; it has those of {have}',
                "Correct the adapter of this teacher in the run file.",
            )
        return with_adapter

    def _miss(self, what: str, remedy: str) -> StillhouseError:
        return StillhouseError(Reason.CACHE_MISS, f"The cache {self._cache.config.path} {what}. {remedy}")
