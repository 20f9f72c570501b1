"""Targets of held-out rows: queried once in a run, stored in its directory, and read by later attempts and other ranks."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import structlog

from stillhouse.protos.files.atomic import write_atomic
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.student_trainer.config.rules.cross_tokenizer import evaluation_top_k
from stillhouse.student_trainer.config.rules.evaluation import teacher_metrics
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.train.batching.collate import ScoredExample
from stillhouse.student_trainer.train.data.corpus import Corpus
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.process.waiting import TeacherWait
from stillhouse.student_trainer.train.setup.scope import RunScope
from stillhouse.student_trainer.train.teacher.query import TargetStream, TeacherQuery, submit_ahead
from stillhouse.student_trainer.train.teacher.target_requests import evaluation_request
from stillhouse.student_trainer.train.teacher.target_source import TargetSource

log = structlog.get_logger()

WINDOW_SEQUENCES = 64
"""Held-out rows in flight to the teacher."""
_ARRAYS = ("token_ids", "logprobs", "target_logprobs", "log_tail")


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutRows:
    """The held-out rows of a run, and the targets that an earlier attempt stored for them."""

    examples: Sequence[Example]
    top_k: int
    wants_targets: bool
    """A metric of the evaluation compares with the teacher."""
    stored: list[ScoredExample] | None
    must_query: bool
    """Targets are wanted, and the first process found none."""

    @classmethod
    def lookup(cls, scope: RunScope, corpus: Corpus) -> HeldOutRows:
        """Reads what is stored; all processes go by what the first one finds."""
        config, top_k = scope.config, evaluation_top_k(scope.config)
        stored = load_targets(scope.run_dir, corpus.eval, top_k)
        wants = bool(config.has_teacher and corpus.eval and teacher_metrics(config))
        must_query = scope.ranks.exchange(wants and stored is None, patient=True)[0]
        return cls(
            examples=corpus.eval, top_k=top_k, wants_targets=wants, stored=stored, must_query=must_query
        )

    def score(
        self, scope: RunScope, teachers: TargetSource, class_order: Sequence[str] = ()
    ) -> list[ScoredExample]:
        """The rows with targets, where they are wanted; the first process queries and stores them, the others read.

        `class_order` is that of a classifier's classes.

        Raises Stopped, or StillhouseError, as the teachers' streams do.
        """
        scored = self.stored
        if self.must_query:
            scored = scope.ranks.after_first(lambda: self._query_or_read(scope, teachers, class_order))
        if scored is not None and self.wants_targets:
            return scored
        return [ScoredExample(example=example, answer=None) for example in self.examples]

    def _query_or_read(
        self, scope: RunScope, teachers: TargetSource, class_order: Sequence[str]
    ) -> list[ScoredExample] | None:
        if not scope.ranks.is_first:
            return load_targets(scope.run_dir, self.examples, self.top_k)
        stream = teachers.open_stream(evaluation_request(scope.config, class_order))
        try:
            scored = _query(self.examples, stream, scope.patience)
        finally:
            stream.close()
        store_targets(scope.run_dir, scored, self.top_k)
        return scored


def _query(examples: Sequence[Example], stream: TargetStream, patience: TeacherWait) -> list[ScoredExample]:
    def submit(number: int, example: Example) -> None:
        stream.submit(number, TeacherQuery.from_example(example))

    return [
        ScoredExample(example=example, answer=stream.get_result(number, patience))
        for number, example in submit_ahead(examples, WINDOW_SEQUENCES, submit)
    ]


def load_targets(run_dir: RunDir, examples: Sequence[Example], top_k: int) -> list[ScoredExample] | None:
    """Reads the targets that an earlier attempt stored; None if there are none, or not for these examples."""
    path = run_dir.eval_targets_path / "answers.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["key"]) != _key(examples, top_k):
                return None
            arrays = {name: file[name] for name in _ARRAYS}
            bounds = file["bounds"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        log.warning("stored answers for held-out rows cannot be read and are asked for again", why=str(error))
        return None
    return [
        ScoredExample(
            example=example,
            answer=Distributions(
                start=example.teacher_tokens[1], **{name: array[begin:end] for name, array in arrays.items()}
            ),
        )
        for example, begin, end in zip(examples, bounds[:-1], bounds[1:], strict=True)
    ]


def store_targets(run_dir: RunDir, scored: Sequence[ScoredExample], top_k: int) -> None:
    """Writes the targets for later evaluations and attempts of the run."""
    answers = [each.answer for each in scored if each.answer is not None]
    arrays = {name: np.concatenate([getattr(answer, name) for answer in answers]) for name in _ARRAYS}
    bounds = np.cumsum([0, *(answer.num_rows for answer in answers)])
    buffer = io.BytesIO()
    key = np.array(_key([each.example for each in scored], top_k))
    np.savez(buffer, allow_pickle=False, key=key, bounds=bounds, **arrays)
    run_dir.eval_targets_path.mkdir(exist_ok=True)
    write_atomic(run_dir.eval_targets_path / "answers.npz", buffer.getvalue())


def _key(examples: Sequence[Example], top_k: int) -> str:
    """Digest of the rows and the top-k that stored targets belong to."""
    digest = hashlib.sha256(f"{top_k}".encode())
    for example in examples:
        token_ids, start = example.teacher_tokens
        digest.update(f" {start} {len(token_ids)} ".encode())
        digest.update(np.ascontiguousarray(token_ids, "<i4").tobytes())
        for name, prompt in sorted(example.teacher_prompts.items()):
            digest.update(f" {name} {prompt.replaces} {len(prompt.token_ids)} ".encode())
            digest.update(np.ascontiguousarray(prompt.token_ids, "<i4").tobytes())
        if example.token_type_ids is not None:
            digest.update(np.ascontiguousarray(example.token_type_ids, "<i4").tobytes())
    return digest.hexdigest()
