"""Training rows from a cache: exactly the token sequences it has targets for, so that offline runs find each of them again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from stillhouse.protos.cache.format import SHARD
from stillhouse.protos.cache.reader import CacheReader
from stillhouse.protos.cache.rows import StoredText
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.data.teacher_prompt import TeacherPrompt


def is_cache(path: Path) -> bool:
    """Returns True if `path` is a cache of teacher outputs."""
    return path.is_dir() and any(SHARD.fullmatch(each.name) for each in path.iterdir())


def cached_examples(path: Path, tokenizer_fingerprint: str, *, routed: bool) -> Iterator[Example]:
    """Yields each training text of the cache once; the positions with targets are trained on.

    With `routed` a row names its teacher. Held-out texts are left out.

    Raises:
        StillhouseError: CACHE_INVALID; TOKENIZER_MISMATCH if no text has the student's tokenizer.
    """
    reader = CacheReader(path)
    shards = [shard for shard in reader.shards if shard.meta.shared_with(tokenizer_fingerprint)]
    if not shards:
        have = ", ".join(sorted({meta.tokenizer_fingerprint for meta in reader.metas}))
        raise StillhouseError(
            Reason.TOKENIZER_MISMATCH,
            f"The texts in {path} are the tokens of another tokenizer ({have}) than the student's "
            f"({tokenizer_fingerprint}). Name a cache of a teacher of the student's family.",
            metadata={"student": tokenizer_fingerprint, "teacher": have},
        )
    # A text that a teacher saw behind a prompt of its own is yielded with those of all teachers.
    is_prompted = any(shard.meta.prompted for shard in shards)
    found: dict[bytes, Example | None] = {}
    for shard in (each for each in shards if not each.meta.held_out):
        size = shard.meta.shared_with(tokenizer_fingerprint)
        for number, text in enumerate(reader.texts(shard)):
            example = _example(text, f"{shard.path}, row {number + 1}", shard.meta.name, routed=routed)
            if int(example.token_ids.max()) >= size:
                continue
            identity = example.start.to_bytes(4, "little") + example.token_ids.tobytes()
            earlier = found.get(identity)
            if earlier is not None:
                prompts = {**example.teacher_prompts, **earlier.teacher_prompts}
                found[identity] = replace(earlier, teacher_prompts=prompts)
            elif identity not in found:
                found[identity] = example if is_prompted else None
                if not is_prompted:
                    yield example
    yield from (each for each in found.values() if each is not None)


def _example(text: StoredText, place: str, name: str, *, routed: bool) -> Example:
    """The student's own text: what its teacher alone saw before the completion is no part of it."""
    token_ids, start = text.token_ids, text.start
    prompts = {}
    if text.student_prompt_ids is not None:
        start = len(text.student_prompt_ids)
        prompts = {name: TeacherPrompt(token_ids[: text.start], start)}
        token_ids = np.concatenate([text.student_prompt_ids, token_ids[text.start :]])
    return Example(
        token_ids=token_ids,
        mask=np.arange(len(token_ids)) >= start,
        place=place,
        num_prompt=start,
        teacher=name if routed else "",
        teacher_prompts=prompts,
    )
