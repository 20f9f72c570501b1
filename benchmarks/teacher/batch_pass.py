"""Batch inference over the same texts: ours from file to file, vLLM's `LLM.generate` from list to list."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

from benchmarks.teacher.timed_pass import Pass
from stillhouse.client.api import Teacher
from stillhouse.client.batch.input_rows import Sampling
from stillhouse.client.batch.pipeline import BatchSettings, generate_file

PROMPT_WORDS = 24
NEW_TOKENS = 64
CONSONANTS = "bcdfghjklmnpqrstvwxyz"
VOWELS = "aeiou"


def texts(count: int, seed: int) -> list[str]:
    """Prompts of random words."""
    chooser = random.Random(seed)

    def word() -> str:
        syllables = chooser.randint(1, 3)
        return "".join(chooser.choice(CONSONANTS) + chooser.choice(VOWELS) for _ in range(syllables))

    return [" ".join(word() for _ in range(PROMPT_WORDS)) for _ in range(count)]


def ours(teacher: Teacher, directory: Path, count: int, seed: int) -> Pass:
    """Runs `stillhouse generate --in --out`, from the first row read to the last one synced to disk."""
    source, out = directory / f"prompts-{seed}.jsonl", directory / f"answers-{seed}.jsonl"
    rows = (json.dumps({"id": index, "prompt": text}) for index, text in enumerate(texts(count, seed)))
    source.write_text("".join(f"{row}\n" for row in rows))
    settings = BatchSettings(sampling=Sampling(temperature=1.0, max_new_tokens=NEW_TOKENS))
    begin = time.perf_counter()
    summary = generate_file(teacher, source, out, settings)
    seconds = time.perf_counter() - begin
    if summary.failed or summary.rows != count:
        raise RuntimeError(
            f"{summary.rows} of {count} rows were answered, {summary.failed} failed; see {out}"
        )
    return Pass(tokens=summary.tokens, seconds=seconds, num_bytes=out.stat().st_size)


def llm(process: Any, count: int, seed: int) -> Pass:
    """One call for all prompts, scheduled by vLLM."""
    answer = process.request(prompts=texts(count, seed), max_tokens=NEW_TOKENS)
    return Pass(tokens=answer["tokens"], seconds=answer["seconds"])
