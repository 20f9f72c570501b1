"""Generates small stories with sums for the demo: habits of invented people give them real entropy, a seed fixes every word."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

NAMES = [
    "Ada",
    "Bo",
    "Cleo",
    "Dan",
    "Eve",
    "Finn",
    "Gus",
    "Hana",
    "Ivo",
    "June",
    "Kai",
    "Lea",
    "Mo",
    "Nia",
    "Otto",
    "Pia",
    "Quin",
    "Rosa",
    "Sam",
    "Tess",
]
TRADES = ["baker", "sailor", "farmer", "tailor", "miner", "potter", "weaver", "painter", "mason", "hunter"]
PLACES = [
    "market",
    "harbour",
    "mill",
    "forest",
    "castle",
    "river",
    "school",
    "garden",
    "tower",
    "bridge",
    "village",
    "island",
]
THINGS = [
    "apples",
    "boats",
    "coins",
    "drums",
    "eggs",
    "flags",
    "grapes",
    "hats",
    "inks",
    "jars",
    "kites",
    "lamps",
    "maps",
    "nets",
    "oars",
    "pears",
]
FINDS = ["buys", "finds", "makes", "borrows", "collects", "wins"]
LOSES = ["sells", "loses", "lends", "breaks", "gives", "trades"]
MOODS = ["happy", "tired", "hungry", "proud", "calm", "cross", "sleepy", "curious"]
WEATHERS = ["rainy", "sunny", "windy", "foggy", "snowy", "mild"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Habits:
    """Habits of the people: weights by which the words of a story are sampled."""

    trades: dict[str, list[float]]
    """Person to weights of `TRADES`."""
    places: dict[tuple[str, str], list[float]]
    """(Trade, weather) to weights of `PLACES`."""
    things: dict[tuple[str, str], list[float]]
    """(Trade, place) to weights of `THINGS`."""
    moods: dict[tuple[str, str], list[float]]
    """(Person, weather) to weights of `MOODS`."""


def sample_habits(seed: int) -> Habits:
    """Samples habits from `seed` alone; each weight is log-normal, so that a few choices are likely."""
    generator = random.Random(seed)

    def habits(count: int) -> list[float]:
        return [generator.lognormvariate(0.0, 1.4) for _ in range(count)]

    return Habits(
        trades={name: habits(len(TRADES)) for name in NAMES},
        places={(trade, weather): habits(len(PLACES)) for trade in TRADES for weather in WEATHERS},
        things={(trade, place): habits(len(THINGS)) for trade in TRADES for place in PLACES},
        moods={(name, weather): habits(len(MOODS)) for name in NAMES for weather in WEATHERS},
    )


def stories(world: Habits, count: int, seed: int) -> Iterator[dict[str, str]]:
    """Yields `count` rows with `prompt` (the person) and `completion` (the events)."""
    generator = random.Random(seed)
    for _ in range(count):
        yield story(world, generator)


def story(world: Habits, generator: random.Random) -> dict[str, str]:
    """Generates one row: a visit, a gain, a loss, and the sum, which is always right."""
    name, friend = generator.sample(NAMES, 2)
    weather = generator.choice(WEATHERS)
    trade = pick(generator, TRADES, world.trades[name])
    place = pick(generator, PLACES, world.places[trade, weather])
    thing = pick(generator, THINGS, world.things[trade, place])
    gained, lost = generator.randint(5, 30), generator.randint(1, 5)
    mood = pick(generator, MOODS, world.moods[name, weather])
    friends_mood = pick(generator, MOODS, world.moods[friend, weather])
    completion = (
        f" The {trade} goes to the {place} and {generator.choice(FINDS)} {gained} {thing} there. "
        f"On the way home {name} meets {friend} and {generator.choice(LOSES)} {lost} of the {thing}. "
        f"Now there are {gained} - {lost} = {gained - lost} {thing}. "
        f"{name} is {mood} and {friend} is {friends_mood}."
    )
    return {"prompt": f"It is a {weather} day for {name}.", "completion": completion}


def pick(generator: random.Random, words: Sequence[str], weights: Sequence[float]) -> str:
    """Samples one of `words` by `weights`."""
    return generator.choices(words, weights)[0]


def write_rows(path: Path, rows: Iterator[dict[str, str]]) -> Path:
    """Writes `rows` to `path` as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path
