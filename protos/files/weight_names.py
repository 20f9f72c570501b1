"""Names of weights in a model's files: what wrappers such as torch.compile put before them, and lists of them in words."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

MAX_NAMED = 3
"""Weights that an error or a line of the log names."""
MAX_PREFIX_PARTS = 4
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Names that torch's wrappers put between others."""


def wrapper_patterns(
    missing: Collection[str], unexpected: Collection[str], base_prefix: str
) -> Mapping[str, str]:
    """Returns patterns that, taken off the names in the files, explain the most missing weights; empty if none does."""
    plain = {without_wrappers(name) for name in unexpected}
    patterns = {_WRAPPERS.pattern: ""} if plain != set(unexpected) else {}
    best, found = 0, dict[str, str]()
    for parts in range(MAX_PREFIX_PARTS + 1):
        prefix = "".join(f"{part}." for part in min(plain, default="").split(".")[:parts])
        if not all(name.startswith(prefix) for name in plain):
            break
        stripped = {name.removeprefix(prefix) for name in plain}
        explained = sum(
            name in stripped or name.removeprefix(f"{base_prefix}.") in stripped for name in missing
        )
        if explained > best:
            best, found = explained, patterns | ({f"^{re.escape(prefix)}": ""} if prefix else {})
    return found


def without_wrappers(name: str) -> str:
    """Returns a name without what torch's wrappers put into it."""
    return _WRAPPERS.sub("", name)


def listed(names: Collection[str]) -> str:
    """Returns the first of `names` in words, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - MAX_NAMED} more" if len(ordered) > MAX_NAMED else ""
    return ", ".join(ordered[:MAX_NAMED]) + more
