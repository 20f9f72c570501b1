"""Statistics of a cache, for display, for `--json` and for the artifact of a cache build."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from stillhouse.protos.cache.format import FORMAT
from stillhouse.protos.cache.reader import CacheReader, Shard


def summary(reader: CacheReader) -> dict[str, Any]:
    """Sequences, tokens and bytes of a cache and of each kind of outputs in it, and its shards, as JSON values.

    A token is a position with a distribution. `bytes_per_token` counts everything on disk, the tokens themselves included;
    it is None without tokens.
    """
    kinds: defaultdict[bytes, list[Shard]] = defaultdict(list)
    for shard in reader.shards:
        kinds[shard.meta.to_json(shard.codec)].append(shard)
    return {
        "format": FORMAT,
        **_totals(reader.shards),
        "kinds": [_kind(shards) for shards in kinds.values()],
        "shards": [
            {"name": shard.path.name, "sequences": shard.num_sequences, "bytes": shard.num_bytes}
            for shard in reader.shards
        ],
        "broken": [{"name": each.path.name, "why": each.error.message} for each in reader.broken],
    }


def _kind(shards: Sequence[Shard]) -> dict[str, Any]:
    meta = shards[0].meta
    return {
        "model": meta.model,
        "teacher_fingerprint": meta.teacher_fingerprint,
        "adapter": meta.adapter,
        "adapter_fingerprint": meta.adapter_fingerprint,
        "tokenizer_fingerprint": meta.tokenizer_fingerprint,
        "vocab_size": meta.vocab_size,
        "top_k": meta.top_k,
        "logprob_dtype": meta.logprob_dtype,
        "temperatures": list(meta.temperatures),
        "entropy": meta.entropy,
        "held_out": meta.held_out,
        "prompted": meta.prompted,
        "sampling": meta.sampling,
        "codec": shards[0].codec,
        **_totals(shards),
    }


def _totals(shards: Sequence[Shard]) -> dict[str, Any]:
    tokens = sum(shard.num_tokens for shard in shards)
    num_bytes = sum(shard.num_bytes for shard in shards)
    return {
        "sequences": sum(shard.num_sequences for shard in shards),
        "tokens": tokens,
        "bytes": num_bytes,
        "bytes_per_token": num_bytes / tokens if tokens else None,
    }
