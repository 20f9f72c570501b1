"""Filters of duplicates: of a row that is there already, or nearly, only the first is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from stillhouse.client.datasets.filters.row import Drop, FilterRow, ngrams
from stillhouse.protos.rows.conversation import REASONING
from stillhouse.protos.rows.row_forms import known_fields

SHINGLE_WORDS = 3
"""Words of the runs by which texts are compared."""
NUM_HASHES = 128
NUM_BANDS = 32
"""Bands of the index: pairs of a similarity above about 0.4 are found and then compared."""
SEED = 42


class ExactDuplicates:
    """Drops rows whose whole text, reasoning, calls and tools came before; memory holds about 160 bytes for each row kept."""

    def __init__(self) -> None:
        self._seen: dict[bytes, int] = {}

    def __call__(self, row: FilterRow) -> Drop | None:
        # A call may be all that a turn says, and other tools are another prompt.
        beside = [_beside_text(row.values), row.parts.context]
        text = row.parts.text + (json.dumps(beside, sort_keys=True, default=str) if any(beside) else "")
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        first = self._seen.setdefault(digest, row.number)
        return None if first == row.number else Drop(filter="duplicate", why=f"the text of row {first}")


def _beside_text(values: Mapping[str, Any]) -> list[Any]:
    """Everything that the turns of a row say beside their content: reasoning and calls, these without their ids."""
    found: list[Any] = []
    for value in known_fields(values).values():
        for turn in value if isinstance(value, list) else ():
            if isinstance(turn, dict):
                calls = turn.get("tool_calls") or ()
                found += [turn[name] for name in (*REASONING, "function_call") if turn.get(name)]
                found += [call.get("function") if isinstance(call, dict) else call for call in calls]
    return found


class NearDuplicates:
    """Drops rows similar to one that was kept, by MinHash; memory holds about 1 KB for each row kept."""

    def __init__(self, least: float) -> None:
        """`least` is the Jaccard similarity, of runs of SHINGLE_WORDS words, from which rows are duplicates."""
        import rensa

        self._rensa: Any = rensa
        self._least = least
        self._index = rensa.RMinHashLSH(threshold=least, num_perm=NUM_HASHES, num_bands=NUM_BANDS)
        self._kept: dict[int, Any] = {}

    def __call__(self, row: FilterRow) -> Drop | None:
        if not row.words:
            return None  # nothing to compare
        signature = self._rensa.RMinHash(num_perm=NUM_HASHES, seed=SEED)
        signature.update(sorted(ngrams(row.words, SHINGLE_WORDS)))
        for other in sorted(self._index.query(signature)):
            similarity = signature.jaccard(self._kept[other])
            if similarity >= self._least:
                return Drop(
                    filter="near duplicate",
                    why=f"{similarity:.2f} like row {other}, below {self._least:g} wanted",
                )
        self._kept[row.number] = signature
        self._index.insert(row.number, signature)
        return None
