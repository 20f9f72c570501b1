"""Makes teacher, students and rows of a comparison: `python -m benchmarks.end_to_end.prepare FOLDER SIZES [TEXT]`.

The text is that of the Python manual, or for rows of prompt and completion that of Python's library, unless a file is named. The
rows are those of Stillhouse's own preparation, token for token and in its order of steps, so that every program trains on the same.
"""

from __future__ import annotations

import json
import pydoc_data.topics
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.end_to_end.pairs import Library, Pair, read_pairs, standard_library
from benchmarks.end_to_end.runs import off_policy_spec, on_policy_spec
from benchmarks.end_to_end.sizes import Sizes, Work
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec
from stillhouse.student_trainer.config.proto import from_proto, to_proto
from stillhouse.student_trainer.config.settled.matmul_dtype import Processor, matmul_dtype
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.train.data.schedule import Schedule
from stillhouse.student_trainer.train.setup.inputs import Inputs
from stillhouse.student_trainer.train.setup.scope import open_scope
from tests.support.small_models import make_model
from tests.support.train_teacher import Corpus, TeacherRecipe, fit, train_teacher

CHARACTERS = 900
"""Length of a document: more tokens than a row has."""
TEACHER_TOKENS = 160
"""Tokens of a row of the teacher's training at most."""
WHOLE_TOKENS = 224
"""The same where texts are written, whose ends models learn from rows that reach them."""


def main() -> None:
    """Makes the folder, once."""
    work, sizes = Work(Path(sys.argv[1])), Sizes(**json.loads(sys.argv[2]))
    file = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    if work.fits(sizes):
        return
    shutil.rmtree(work.path, ignore_errors=True)
    work.path.mkdir(parents=True)
    recipe = TeacherRecipe(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.teacher_hidden,
        num_layers=sizes.teacher_layers,
        num_heads=sizes.heads,
        steps=sizes.teacher_steps,
        batch_size=16,
        sequence_tokens=min(sizes.length, WHOLE_TOKENS if sizes.on_policy else TEACHER_TOKENS),
        max_sequence_tokens=512,
        bfloat16=matmul_dtype("bfloat16", Processor.read()) == "bfloat16",
    )
    (_make_pairs if sizes.has_pairs else _make_texts)(work, sizes, recipe, file)
    if sizes.on_policy:
        for seed in range(sizes.seeds):
            seeded = replace(sizes, seed=seed)
            rows = _ordered(work, on_policy_spec(work, seeded, None), sizes.batch, sizes.steps)
            work.prompt_rows(seeded).write_text(json.dumps(rows))
    else:
        spec = off_policy_spec(work, sizes, None)
        work.rows.write_text(json.dumps(_ordered(work, spec, sizes.batch, sizes.steps)))
    work.mark_ready(sizes)


def _make_texts(work: Work, sizes: Sizes, recipe: TeacherRecipe, file: Path | None) -> None:
    """Makes models and data of whole texts, and the prompts of on-policy arms."""
    manual = "\n\n".join(pydoc_data.topics.topics.values())
    documents = _documents(manual if file is None else file.read_text(errors="replace"))
    train_teacher(documents, work.teacher, recipe)
    held_out = _held_out_texts(work)
    unseen = set(held_out)
    seen = [each for each in documents if each not in unseen]
    _make_student(work.student, work, sizes)
    _make_student(work.warm_student, work, sizes)
    _warm(work, replace(recipe, steps=sizes.warm_steps), seen)
    _write_jsonl(work.train, [{"text": each} for each in seen])
    _write_prompts(work, _cut_prompts(work, sizes, seen))
    _write_held_out(work, sizes, [Pair("", each) for each in held_out], least_tokens=sizes.prompt_tokens)


def _make_pairs(work: Work, sizes: Sizes, recipe: TeacherRecipe, file: Path | None) -> None:
    """Makes models and data of prompts and completions; the teacher learns both, and the library's other functions."""
    pairs, others = standard_library() if file is None else Library(read_pairs(file), [])
    random.Random(recipe.seed).shuffle(pairs)
    held_out = pairs[: max(sizes.held_out_rows, len(pairs) // 50)]
    seen = pairs[len(held_out) :]
    train_teacher([*(each.text for each in seen), *others], work.teacher, recipe)
    _make_student(work.student, work, sizes)
    if sizes.on_policy:
        _make_student(work.warm_student, work, sizes)
        _warm(work, replace(recipe, steps=sizes.warm_steps), [each.text for each in seen])
        seen, held_out = (_whole_prompts(work, sizes, each) for each in (seen, held_out))
        _write_prompts(work, seen)
    # No more than the run reads, so that a cache holds no more either.
    train = seen[: sizes.steps * sizes.batch]
    _write_jsonl(work.train, [{"prompt": each.prompt, "completion": each.completion} for each in train])
    _write_held_out(work, sizes, held_out)


def _held_out_texts(work: Work) -> list[str]:
    return [json.loads(line)["text"] for line in (work.teacher / "held_out.jsonl").read_text().splitlines()]


def _write_held_out(work: Work, sizes: Sizes, pairs: Sequence[Pair], *, least_tokens: int = 0) -> None:
    """Writes the texts that students are scored on, those with more than `least_tokens` and something to score."""
    tokenizer = _tokenizer(work)
    rows = []
    for prompt, completion in pairs:
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        token_ids = [*before, *tokenizer(completion, add_special_tokens=False)["input_ids"]][: sizes.length]
        if len(token_ids) > max(least_tokens, len(before)):
            rows.append({"token_ids": token_ids, "num_prompt": len(before)})
    work.held_out.write_text(json.dumps(rows[: sizes.held_out_rows]))


def _documents(text: str) -> list[str]:
    """Pieces of whole lines, each at least CHARACTERS long."""
    pieces, here = [], ""
    for line in text.splitlines(keepends=True):
        here += line
        if len(here) >= CHARACTERS:
            pieces.append(here.strip())
            here = ""
    return list(dict.fromkeys(pieces))


def _tokenizer(work: Work) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(work.teacher)


def _make_student(path: Path, work: Work, sizes: Sizes) -> None:
    make_model(
        path,
        tokenizer_dir=work.teacher,
        hidden_size=sizes.student_hidden,
        num_layers=sizes.student_layers,
        num_heads=sizes.heads,
        max_sequence_tokens=512,
        seed=1,
    )


def _warm(work: Work, recipe: TeacherRecipe, documents: Sequence[str]) -> None:
    """Trains the student of on-policy arms by cross-entropy."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work.warm_student, dtype=torch.float32)
    fit(model, Corpus.of(documents, _tokenizer(work)), recipe, print)
    model.save_pretrained(work.warm_student, safe_serialization=True)


def _cut_prompts(work: Work, sizes: Sizes, documents: Sequence[str]) -> list[Pair]:
    """Prompts of about as many tokens as asked for, and what follows them."""
    tokenizer = _tokenizer(work)
    found = []
    for text in documents:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        cut = sizes.prompt_tokens
        prompt, rest = tokenizer.decode(ids[:cut]), tokenizer.decode(ids[cut : cut + sizes.new_tokens])
        if prompt.strip() and rest.strip():
            found.append(Pair(prompt, rest))
    return found


def _whole_prompts(work: Work, sizes: Sizes, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs whose prompt has no more tokens than asked for; its text gives any program these tokens."""
    tokenizer = _tokenizer(work)
    ids = tokenizer([each.prompt for each in pairs], add_special_tokens=False)["input_ids"]
    return [
        pair
        for pair, own in zip(pairs, ids, strict=True)
        if len(own) <= sizes.prompt_tokens and tokenizer.decode(own) == pair.prompt
    ]


def _write_prompts(work: Work, pairs: Sequence[Pair]) -> None:
    _write_jsonl(work.prompts, [{"prompt": each.prompt, "completion": each.completion} for each in pairs])


def _write_jsonl(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))


def _ordered(work: Work, spec: RunSpec, batch: int, steps: int) -> list[dict[str, Any]]:
    """The rows of a run in the order of its steps, as its training process reads them."""
    config = from_proto(spec)
    folder = work.path / "rows"
    run_dir = RunDir.create(folder, spec, to_proto(config))
    run_dir.write_control(1, stop=False)
    with run_dir.open_attempt(1) as attempt, open_scope(config, attempt, lambda: False) as scope:
        inputs = Inputs.load(scope)
        examples = inputs.corpus.train
        schedule = Schedule.from_config(len(examples), config.optimizer, seed=config.data.seed)
        found = [
            {
                "token_ids": examples[row].token_ids.tolist(),
                "mask": [bool(each) for each in examples[row].mask],
                "num_prompt": len(examples[row].prompt),
            }
            for step in range(steps)
            for row in schedule.rows(step)
        ]
    shutil.rmtree(folder)
    assert len(found) == batch * steps
    return found


if __name__ == "__main__":
    main()
