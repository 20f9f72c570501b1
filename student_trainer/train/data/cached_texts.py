"""Training rows from a cache: exactly the token sequences it has targets for, so that offline runs find each of them again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from stillhouse.protos.cache.format import SHARD
from stillhouse.protos.cache.reader import CacheReader
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.train.data.encoding import Example


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
        found = ", ".join(sorted({meta.tokenizer_fingerprint for meta in reader.metas}))
        raise StillhouseError(
            Reason.TOKENIZER_MISMATCH,
            f"The texts in {path} are the tokens of another tokenizer ({found}) than the student's "
            f"({tokenizer_fingerprint}). Name a cache of a teacher of the student's family.",
            metadata={"student": tokenizer_fingerprint, "teacher": found},
        )
    seen: set[bytes] = set()
    for shard in (each for each in shards if not each.meta.held_out):
        size = shard.meta.shared_with(tokenizer_fingerprint)
        for number, (token_ids, start) in enumerate(reader.texts(shard)):
            identity = start.to_bytes(4, "little") + token_ids.tobytes()
            if identity in seen or int(token_ids.max()) >= size:
                continue
            seen.add(identity)
            yield Example(
                token_ids=token_ids,
                mask=np.arange(len(token_ids)) >= start,
                place=f"{shard.path}, row {number + 1}",
                num_prompt=start,
                teacher=shard.meta.name if routed else "",
            )
