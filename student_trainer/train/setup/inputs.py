"""First stage of set-up: the student's tokenizer and the run's text in its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.protos.tokenizers.fingerprint import tokenizer_fingerprint
from stillhouse.student_trainer.train.data.corpus import Corpus
from stillhouse.student_trainer.train.data.evaluation_sets import EvaluationRows
from stillhouse.student_trainer.train.setup.scope import RunScope
from stillhouse.student_trainer.train.setup.task import task_of
from stillhouse.student_trainer.train.student.student import configured_end_ids, load_tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Tokenizer and corpus of a run."""

    tokenizer: Any
    """The student's tokenizer."""
    tokenizer_json: str
    tokenizer_fingerprint: str
    end_ids: Sequence[int]
    """Tokens that end a text of the student before training."""
    corpus: Corpus
    """With the rows of all evaluation sets behind the held-out rows."""
    sets: Sequence[EvaluationRows]
    """Places of these sets."""

    @classmethod
    def load(cls, scope: RunScope) -> Inputs:
        """Reads tokenizer and data. Raises StillhouseError, as `load_tokenizer` and `prepare_corpus` do."""
        config = scope.config
        tokenizer = load_tokenizer(config.student, scope.data_dir, chat_template=config.data.chat_template)
        tokenizer_json = tokenizer.backend_tokenizer.to_str()
        corpus, sets = task_of(config).load_corpus(scope, tokenizer)
        return cls(
            tokenizer=tokenizer,
            tokenizer_json=tokenizer_json,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer_json, tokenizer.special_tokens_map),
            end_ids=configured_end_ids(config.student, tokenizer, scope.data_dir),
            corpus=corpus,
            sets=sets,
        )
