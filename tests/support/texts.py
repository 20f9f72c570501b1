"""Short sentences with a little entropy for tests; the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Iterator

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana")
THINGS = ("apples", "boats", "coins", "drums", "eggs", "flags")
VERBS = ("finds", "sells", "counts", "hides", "carries")


def sentences(count: int, seed: int) -> Iterator[str]:
    """`count` lines "Name and number: sentence"; the part before ": " serves as a prompt."""
    generator = random.Random(seed)
    for _ in range(count):
        name, other = generator.sample(NAMES, 2)
        first, second = generator.randint(2, 40), generator.randint(2, 40)
        thing, verb = generator.choice(THINGS), generator.choice(VERBS)
        yield (
            f"{name} has {first} {thing}: {name} {verb} {second} more with {other}, "
            f"so there are {first + second} {thing} in all."
        )
