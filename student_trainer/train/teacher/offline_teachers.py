"""Offline teachers: all targets come from a cache, checked complete before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from stillhouse.protos.cache.format import CacheMeta
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.teacher_pb2 import DistributionConfig
from stillhouse.student_trainer.config.rules.contexts import is_ensemble
from stillhouse.student_trainer.config.schema import RolloutConfig, RunConfig
from stillhouse.student_trainer.config.teacher import TeacherConfig
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.train.data.corpus import Corpus
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.teacher.identity import check_stored_identity
from stillhouse.student_trainer.train.teacher.query import TargetStream, TeacherQuery
from stillhouse.student_trainer.train.teacher.run_cache import RunCache
from stillhouse.student_trainer.train.teacher.streams.cached import CachedStream, cache_metrics
from stillhouse.student_trainer.train.teacher.streams.combined import combine_streams, in_order
from stillhouse.student_trainer.train.teacher.streams.generated import TextStream
from stillhouse.student_trainer.train.teacher.streams.prompted import PromptedStream
from stillhouse.student_trainer.train.teacher.target_requests import TargetRequest


class OfflineTeachers:
    """The teachers of one run as a cache stored them; a TargetSource."""

    max_sequence_tokens = None
    """No limit: no text is generated."""
    sequence_limits: Mapping[str, int] = {}
    """As above."""
    end_ids: Sequence[int] = ()
    max_query_tokens = 0
    """A cache answers no further queries."""
    reuse_prefixes = False

    def __init__(self, config: RunConfig, cache: RunCache, tokenizer_fingerprint: str) -> None:
        self._cache = cache
        self._configs = {each.name: each for each in config.teachers} or {"": TeacherConfig()}
        self._is_known = bool(config.teachers)
        self._tokenizer = tokenizer_fingerprint
        self._mixed = is_ensemble(config)
        self._found: dict[tuple[str, bytes], CacheMeta] = {}
        self._streams: list[CachedStream] = []

    @classmethod
    def open(
        cls,
        config: RunConfig,
        requests: Sequence[TargetRequest],
        corpus: Corpus,
        tokenizer_fingerprint: str,
        *,
        run_dir: RunDir,
        cache: RunCache,
    ) -> OfflineTeachers:
        """The teachers behind `cache`, once it is found to hold the targets of all `requests` for `corpus`.

        Raises:
            StillhouseError: CACHE_INVALID; CACHE_MISS, which counts what is missing or names what is stored instead;
                TOKENIZER_MISMATCH; TEACHER_CHANGED.
        """
        teachers = cls(config, cache, tokenizer_fingerprint)
        for request in requests:
            teachers._require(request, corpus, run_dir)
        return teachers

    @property
    def fingerprint(self) -> str:
        return " ".join(dict.fromkeys(meta.teacher_fingerprint for meta in self._found.values()))

    @property
    def prefetch_steps(self) -> int:
        """Steps that are read ahead."""
        return max(each.prefetch_steps for each in self._configs.values())

    @property
    def class_names(self) -> Mapping[str, Sequence[str]]:
        return {name: meta.class_names for (name, _), meta in self._found.items()}

    @property
    def hidden_size(self) -> int:
        return 0

    def shared_vocab_size(self, student_size: int) -> int:
        return min(student_size, *(meta.shared_with(self._tokenizer) for meta in self._found.values()))

    def open_stream(self, request: TargetRequest, *, cacheable: bool = True) -> TargetStream:
        assert cacheable, "checked with the configuration"
        metas = {
            name: self._found[name, _key(request.to_config(teacher))]
            for name, teacher in self._configs.items()
        }
        weights = {name: teacher.weight for name, teacher in self._configs.items()}
        cached = {
            name: CachedStream(meta, self._cache.reader, live=None, writer=None)
            for name, meta in metas.items()
        }
        self._streams += cached.values()
        streams = {
            name: in_order(PromptedStream(cached[name], name), meta.class_names, request.class_order)
            for name, meta in metas.items()
        }
        vocab_size = max(meta.vocab_size for meta in metas.values())
        return combine_streams(streams, weights if self._mixed else None, vocab_size=vocab_size)

    def open_generators(
        self,
        generation: RolloutConfig,  # noqa: ARG002
        request: TargetRequest | None,  # noqa: ARG002
    ) -> Mapping[str, TextStream]:
        return {}

    def metrics(self) -> dict[str, float]:
        """Cache hits and misses."""
        return cache_metrics(self._streams)

    def _require(self, request: TargetRequest, corpus: Corpus, run_dir: RunDir) -> None:
        """Looks up the targets of one request, of every teacher. Raises as `open` does."""
        for name, teacher in self._configs.items():
            meta = self._lookup(request, teacher, _queries(request.select(corpus, name), name))
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
                place=f"The cache {self._cache.config.path}",
            )
            self._found[name, _key(request.to_config(teacher))] = meta

    def _lookup(
        self, request: TargetRequest, teacher: TeacherConfig, queries: Sequence[TeacherQuery]
    ) -> CacheMeta:
        """The stored results that fit the request, all of one teacher, with the targets of each query."""
        fitting = self._select_fitting(request, teacher)
        missing = {meta.logprob_dtype: self._find_missing(meta, queries) for meta in fitting}
        best = min(fitting, key=lambda meta: len(missing[meta.logprob_dtype]))
        lacking = missing[best.logprob_dtype]
        if lacking:
            raise StillhouseError(
                Reason.CACHE_MISS,
                f"The cache {self._cache.config.path} lacks the answers to {len(lacking)} of {len(queries)} sequences, first "
                f"{lacking[0].place}. Build it with the same rows, tokenizer and data section, of which data.date, data.end_text, "
                "data.chat and data.max_sequence_tokens decide on the tokens, by `stillhouse cache build`; or use cache.mode: "
                "write_through with a teacher.",
                metadata={"missing": str(len(lacking)), "wanted": str(len(queries))},
            )
        return best

    def _find_missing(self, meta: CacheMeta, queries: Sequence[TeacherQuery]) -> list[TeacherQuery]:
        reader = self._cache.reader
        return [
            each
            for each in queries
            if not reader.has(meta.key(each.token_ids, each.start, None, each.token_type_ids), meta)
        ]

    def _select_fitting(self, request: TargetRequest, teacher: TeacherConfig) -> list[CacheMeta]:
        config, field = request.to_config(teacher), request.field
        kinds = self._cache.reader.metas
        if not kinds:
            raise self._miss("holds no answer yet", "Build it with `stillhouse cache build`.")
        kinds = self._select_readable(kinds)
        if self._is_known:
            kinds = self._select_teacher(teacher, kinds)
        if any(not meta.same_teacher(kinds[0]) for meta in kinds):
            have = ", ".join(sorted({f"{meta.model} {meta.adapter}".strip() for meta in kinds}))
            raise self._miss(
                f"holds answers of several teachers ({have})",
                "Name the one to learn from in teachers, by its name or adapter when the cache was written.",
            )
        wide = [
            meta for meta in kinds if (meta.class_names if request.classes else meta.top_k == request.top_k)
        ]
        if request.classes and not wide:
            raise self._miss(
                "holds no classes", "Name a cache that a run of task: sequence_classification wrote."
            )
        if not wide:
            have = " and ".join(str(top_k) for top_k in sorted({meta.top_k for meta in kinds}))
            raise self._miss(
                f"was built with top_k {have}, and {field} is {request.top_k}", f"Set {field}: {have}."
            )
        # Without the entropy its lower bound weighs the tokens.
        has_entropy = config.entropy and any(meta.entropy for meta in wide)
        pairs = [(meta, replace(meta.for_config(config), entropy=has_entropy)) for meta in wide]
        fitting = [asked for meta, asked in pairs if meta.sampling == asked.sampling and meta.serves(asked)]
        if not fitting:
            raise self._miss(
                "was built with another loss.temperature, loss.sparse_target or number or seed of draws",
                "Set them as they were when it was built, or build another one.",
            )
        return fitting

    def _select_readable(self, kinds: Sequence[CacheMeta]) -> list[CacheMeta]:
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

    def _select_teacher(self, teacher: TeacherConfig, kinds: Sequence[CacheMeta]) -> list[CacheMeta]:
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


def _queries(examples: Sequence[Example], teacher: str) -> list[TeacherQuery]:
    """The queries of a teacher as it saw them, behind its own prompts."""
    return [TeacherQuery.from_example(each).behind_prompt(teacher) for each in examples]


def _key(config: DistributionConfig) -> bytes:
    return config.SerializeToString(deterministic=True)
