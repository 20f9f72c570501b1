"""Texts whose parts the teacher scores while they are written have the targets of whole texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.protos.tokenizers.fingerprint import tokenizer_fingerprint
from stillhouse.student_trainer.config.proto import from_proto
from stillhouse.student_trainer.config.schema import RolloutConfig, StudentContextConfig
from stillhouse.student_trainer.train.batching.collate import ScoredExample
from stillhouse.student_trainer.train.contexts.source import MAX_SKIPPED_ANYWAY, FeedSettings
from stillhouse.student_trainer.train.contexts.student_feed import StudentFeed
from stillhouse.student_trainer.train.contexts.warm_start import WarmStart
from stillhouse.student_trainer.train.data.context_mix import Slot
from stillhouse.student_trainer.train.data.corpus import load_corpus
from stillhouse.student_trainer.train.process.waiting import TeacherWait
from stillhouse.student_trainer.train.rollouts import local_sampler
from stillhouse.student_trainer.train.rollouts.local_sampler import LocalSampler, SampledText
from stillhouse.student_trainer.train.rollouts.rollout_buffer import RolloutBuffer
from stillhouse.student_trainer.train.teacher.online_teachers import OnlineTeachers
from stillhouse.student_trainer.train.teacher.query import TargetStream, TeacherQuery
from stillhouse.student_trainer.train.teacher.streams.combined import combine_streams
from stillhouse.student_trainer.train.teacher.target_requests import training_request
from stillhouse.student_trainer.train.teacher.teacher import Demands
from tests.conftest import Models
from tests.student_trainer.train.runs import make_run, spec_of
from tests.student_trainer.train.students import make_sampler
from tests.support.programs import Program

PART, LIKELIEST, DRAWS = 3, 4, 12
GENERATION = RolloutConfig(max_new_tokens=10, samples_per_prompt=2)
LOSS = {
    "terms": [{"divergence": "reverse_kl"}],
    "sparse_target": "student_tail",
    "top_k": LIKELIEST,
    "num_samples": DRAWS,
}


@pytest.fixture(autouse=True)
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of few tokens."""
    monkeypatch.setattr(local_sampler, "PART_TOKENS", PART)


@pytest.fixture
def sampler(models: Models) -> LocalSampler:
    return make_sampler(models.student, num_likeliest=LIKELIEST, num_draws=DRAWS)


def test_a_part_is_the_beginning_of_its_text(sampler: LocalSampler) -> None:
    prompts = [np.array([5, 6, 7], np.int32), np.array([9], np.int32)]
    parts: dict[tuple[int, int], list[SampledText]] = {}

    def keep(prompt: int, sample: int, text: SampledText) -> None:
        parts.setdefault((prompt, sample), []).append(text)

    texts = sampler.write(prompts, GENERATION, max_sequence_tokens=12, seeds=[1, 2], on_part=keep)
    for prompt, several in enumerate(texts):
        for sample, text in enumerate(several):
            told = parts.get((prompt, sample), [])
            # A teacher has read whole blocks; the end of a text is told as a text, not as a part.
            start = len(prompts[prompt])
            lengths = [
                each - start for each in range(start + 1, start + len(text.token_ids)) if each % PART == 1
            ]
            assert [len(part.token_ids) for part in told] == lengths
            for part in told:
                count, width = part.draws.shape
                assert part.token_ids.tolist() == text.token_ids[:count].tolist()
                assert part.draws.tolist() == text.draws[:count, :width].tolist()
                assert (text.draws[:count, width:] == -1).all()
    assert any(parts.values())


class Refusing:
    """A TargetStream whose teacher finds the distributions of one sequence non-finite, whichever part of it is asked for."""

    def __init__(self, stream: TargetStream, sequence: list[int]) -> None:
        self._stream = stream
        self._sequence = sequence
        self._refused: set[int] = set()

    @property
    def num_asked(self) -> int:
        return self._stream.num_asked

    def submit(self, sequence_id: int, query: TeacherQuery) -> None:
        if query.token_ids.tolist() == self._sequence[: len(query.token_ids)]:
            self._refused.add(sequence_id)
        self._stream.submit(sequence_id, query)

    def get_result(self, sequence_id: int, patience: TeacherWait) -> Distributions:
        answer = self._stream.get_result(sequence_id, patience)
        if sequence_id in self._refused:
            raise StillhouseError(Reason.NON_FINITE, "Logits are non-finite.")
        return answer

    def close(self) -> None:
        self._stream.close()


Collect = Callable[..., list[ScoredExample]]


@pytest.fixture
def collect(
    sampler: LocalSampler, models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path
) -> Iterator[Collect]:
    """Collects a step of three prompts: `collect(queries_parts=..., room=64, refused=[])`."""
    spec = spec_of(
        models.student, dataset_file, hf_teacher.target, loss=LOSS, contexts=[{"weight": 1.0, "student": {}}]
    )
    run_dir = make_run(tmp_path, "parts", spec)
    config = from_proto(run_dir.effective_spec())
    tokenizer = sampler._student.tokenizer
    corpus = load_corpus(config.data, config.evaluation, tokenizer, tmp_path)
    slots = [Slot(position=number, row=number) for number in range(3)]
    longest = max(len(corpus.train[slot.row].prompt) for slot in slots)
    with run_dir.open_attempt(1) as attempt, ExitStack() as stack:
        patience = TeacherWait(attempt, lambda: False, 30)
        text = tokenizer.backend_tokenizer.to_str()
        fingerprint = tokenizer_fingerprint(text, tokenizer.special_tokens_map)
        demands = Demands.from_config(config, fingerprint, text, corpus)
        teachers = OnlineTeachers.connect(config, demands, run_dir, patience=patience, stack=stack)
        assert not teachers.reuse_prefixes

        def collected(
            *,
            queries_parts: bool,
            room: int = 64,
            refused: Sequence[int] = (),
            using: Any = sampler,
            num_teachers: int = 1,
        ) -> list[ScoredExample]:
            settings = FeedSettings(
                context=0,
                examples=corpus.train,
                seed=0,
                ahead=0,
                max_sequence_tokens=64,
                # A teacher may take less than the student writes.
                sequence_limits={"": longest + room},
                patience=patience,
            )
            streams = {
                str(number): teachers.open_stream(training_request(config.loss, 0), cacheable=False)
                for number in range(num_teachers)
            }
            vocab_size = max(each.info.vocab_size for each in teachers.members.values())
            targets = combine_streams(streams, dict.fromkeys(streams, 1.0), vocab_size=vocab_size)
            stack.callback(targets.close)
            feed = StudentFeed(
                settings,
                Refusing(targets, list(refused)),
                using,
                StudentContextConfig(generation=GENERATION),
                in_flight=RolloutBuffer(),
                version=lambda: 0,
                gate=WarmStart(None, vocab_size=40, alone=True, field_path="", is_open=True),
                queries_top_k=True,
                queries_parts=lambda: queries_parts,
                max_staleness=0,
                teachers_per_query=num_teachers,
            )
            feed.request(0, slots)
            scored = list(feed.collect(0))
            assert not feed._queried
            assert feed.num_asked == num_teachers * len(slots) * GENERATION.samples_per_prompt
            return scored

        yield collected


@pytest.mark.parametrize("room", [64, 9], ids=["whole", "cut"])
def test_parts_have_the_targets_of_whole_texts(collect: Collect, *, room: int) -> None:
    whole, parts = (collect(queries_parts=each, room=room) for each in (False, True))
    assert len(whole) == len(parts) == 3 * GENERATION.samples_per_prompt
    for one, other in zip(whole, parts, strict=True):
        assert one.example.token_ids.tolist() == other.example.token_ids.tolist()
        assert one.answer is not None
        assert other.answer is not None
        assert one.answer.token_ids.tolist() == other.answer.token_ids.tolist()
        for name in ("logprobs", "target_logprobs", "log_tail", "sampled_logprobs"):
            np.testing.assert_allclose(
                getattr(one.answer, name), getattr(other.answer, name), atol=2e-5, err_msg=name
            )


def test_texts_of_which_several_teachers_score_the_parts_count_once_for_each(collect: Collect) -> None:
    alone, mixed = (collect(queries_parts=True, num_teachers=each) for each in (1, 2))
    for one, other in zip(alone, mixed, strict=True):
        assert one.answer is not None
        assert other.answer is not None
        np.testing.assert_allclose(one.answer.target_logprobs, other.answer.target_logprobs, atol=2e-5)


class Rewriting:
    """A sampler whose texts are begun by a service that is lost: it told parts of other texts, or the same ones, before."""

    def __init__(self, sampler: LocalSampler, seeds: Sequence[int]) -> None:
        self._sampler = sampler
        self._seeds = seeds

    def write(self, prompts: Sequence[np.ndarray], *arguments: Any, **named: Any) -> Any:
        on_part = named["on_part"]
        if on_part is not None:
            quiet: dict[str, Any] = named | {"seeds": self._seeds[: len(prompts)], "on_text": _ignore}
            self._sampler.write(prompts, *arguments, **quiet)
        texts = self._sampler.write(prompts, *arguments, **named)
        if on_part is not None:
            # The lost one says something after all.
            self._sampler.write(prompts, *arguments, **quiet)
        return texts


def _ignore(*_: object) -> None:
    pass


def test_parts_of_texts_that_are_written_again_count_for_nothing(
    collect: Collect, sampler: LocalSampler
) -> None:
    again = Rewriting(sampler, seeds=[91, 92, 93])
    whole, parts = (collect(queries_parts=each, using=again) for each in (False, True))
    assert len(whole) == len(parts) == 3 * GENERATION.samples_per_prompt
    for one, other in zip(whole, parts, strict=True):
        assert one.example.token_ids.tolist() == other.example.token_ids.tolist()
        assert one.answer is not None
        assert other.answer is not None
        np.testing.assert_allclose(one.answer.target_logprobs, other.answer.target_logprobs, atol=2e-5)


def test_a_text_whose_parts_are_non_finite_is_left_out_once(collect: Collect) -> None:
    whole = collect(queries_parts=True)
    longest = max((each.example.token_ids.tolist() for each in whole), key=len)
    kept = collect(queries_parts=True, refused=longest)
    assert [each.example.token_ids.tolist() for each in kept] == [
        tokens for each in whole if (tokens := each.example.token_ids.tolist()) != longest
    ]
    # Its parts alone are more than the sequences that a run may leave out.
    assert GENERATION.max_new_tokens > PART * MAX_SKIPPED_ANYWAY
