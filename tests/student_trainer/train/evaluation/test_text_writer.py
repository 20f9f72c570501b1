"""Texts for evaluation by the student's own settings: prompts of any length, up to the last position of the model."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import torch
import transformers

from stillhouse.student_trainer.config.schema import StudentConfig
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.evaluation.text_writer import TextWriter
from stillhouse.student_trainer.train.student.student import Student


def prompt(length: int) -> Example:
    return Example(
        token_ids=np.arange(3, 3 + length, dtype=np.int32),
        mask=np.zeros(length, np.bool_),
        num_prompt=length,
        place=f"{length}",
    )


def test_a_prompt_near_the_last_position_is_continued_beside_short_ones() -> None:
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=1
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.generation_config = transformers.GenerationConfig(max_new_tokens=6, do_sample=False)
    tokenizer = SimpleNamespace(
        eos_token_id=None, decode=lambda ids, **_: " ".join(str(each) for each in ids)
    )
    writer = TextWriter(
        Student(model, tokenizer, StudentConfig(model="student")),
        None,
        device=torch.device("cpu"),
        autocast=nullcontext,
        vocab_size=64,
        seed=0,
    )
    examples = [prompt(length) for length in (2, 13, 10, 14, 5)]
    together = writer.write(examples, range(5))
    assert [len(each.split()) for each in together] == [6, 3, 6, 2, 6]
    assert together == [writer.write([each], [place])[0] for place, each in enumerate(examples)]
