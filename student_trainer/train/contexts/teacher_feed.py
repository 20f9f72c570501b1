"""Completions that teachers generate during the run: with targets from the same pass, or the text alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import structlog

from stillhouse.student_trainer.config.schema import RolloutConfig
from stillhouse.student_trainer.train.batching.collate import ScoredExample
from stillhouse.student_trainer.train.batching.passes import deal
from stillhouse.student_trainer.train.contexts.source import Feed, FeedSettings, generated_example
from stillhouse.student_trainer.train.data.context_mix import Slot, text_seed
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.teacher.streams.generated import TextStream

log = structlog.get_logger()


class TeacherFeed(Feed):
    """The teachers' completions of one context; each prompt is continued by its row's teacher."""

    def __init__(
        self,
        settings: FeedSettings,
        streams: Mapping[str, TextStream],
        generation: RolloutConfig,
        *,
        vocab_size: int,
    ) -> None:
        """`streams` by the teachers' names. `vocab_size`: only ids below it are known to the student."""
        super().__init__(settings, list(streams.values()))
        self._stream_of = streams
        self._generation = generation
        self._vocab_size = vocab_size
        self._slots: dict[int, Sequence[Slot]] = {}

    def own(self, slots: Sequence[Slot], rank: int, size: int) -> list[Slot]:
        """The rows of a step that are those of process `rank`: all may become about as many tokens."""
        examples = [self._settings.examples[slot.row] for slot in slots]
        lengths = [len(each.prompt) + self._max_new_tokens(each) for each in examples]
        return [slots[at] for at in deal(lengths, size)[rank]]

    def request(self, step: int, slots: Sequence[Slot]) -> None:
        self._slots[step] = slots
        for slot in slots:
            example = self._settings.examples[slot.row]
            name = self._teacher(example)
            self._stream_of[name].submit(
                slot.position,
                example.prompt_for(name),
                seed=text_seed(self._settings.seed, self._settings.context, slot.position),
                max_new_tokens=self._max_new_tokens(example),
                place=example.place,
            )

    def collect(self, step: int) -> Iterator[ScoredExample]:
        lengths, num_finished, num_foreign = [], 0, 0
        for slot in self._slots.pop(step):
            example = self._settings.examples[slot.row]
            for text in (
                self._receive(self._stream_of[self._teacher(example)].get_result, slot.position) or ()
            ):
                # The student's tokenizer lacks the ids by which the teacher's one extends it.
                if not text.token_ids.size or int(text.token_ids.max()) >= self._vocab_size:
                    num_foreign += 1
                    continue
                lengths.append(len(text.token_ids))
                num_finished += text.finished
                token_ids = np.concatenate([example.prompt, text.token_ids])
                yield ScoredExample(
                    example=generated_example(token_ids, len(example.prompt), example.place, example.teacher),
                    answer=text.behind(len(example.prompt)),
                    context=self._settings.context,
                )
        if num_foreign:
            log.warning("teacher's texts left out", step=step + 1, left_out=num_foreign)
        if not lengths:
            self.metrics = {}
            return
        # Means over the completions of the step.
        self.metrics = {
            "train/teacher_text_tokens": float(np.mean(lengths)),
            "train/teacher_text_finished": num_finished / len(lengths),
            "train/teacher_texts_dropped": float(num_foreign),
        }

    def _max_new_tokens(self, example: Example) -> int:
        return min(self._generation.max_new_tokens, self._settings.room(example))

    def _teacher(self, example: Example) -> str:
        """Returns the name of the teacher that continues a row."""
        return next(iter(self._stream_of)) if len(self._stream_of) == 1 else example.teacher
