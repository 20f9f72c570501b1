"""Model directories from elsewhere: each is trained and served, or refused with a reason that is not a bug's."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stillhouse.protos.errors import Reason, StillhouseError, from_json, from_status
from stillhouse.protos.tokenizers import bounded_rendering
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engines.hf.engine import HfEngine
from tests.conftest import Models
from tests.fuzz.conftest import SEED, scaled, show
from tests.student_trainer.train.runs import events, finish_here, make_run, spec_of

pytestmark = pytest.mark.model

Damage = Callable[[Path, random.Random], None]
WEIGHTS, CONFIG, TOKENIZER, TEMPLATE = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "chat_template.jinja",
)
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
WRONG: tuple[Any, ...] = (
    None,
    "",
    "x",
    [],
    {},
    [[]],
    {"a": 1},
    True,
    -1,
    0,
    1.5,
    10**30,
    "1",
    ["a", None],
    float("nan"),
)
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def weights(change: Callable[[dict[str, torch.Tensor], str], object], name: str = WEIGHTS) -> Damage:
    """Changes a tensor of a file."""

    def damage(model: Path, rng: random.Random) -> None:
        tensors = load_file(model / name)
        change(tensors, rng.choice(sorted(tensors)))
        save_file(tensors, model / name, {"format": "pt"})

    return damage


def bytes_of(name: str, change: Callable[[bytearray, random.Random], bytes | bytearray]) -> Damage:
    """Changes the bytes of a file."""

    def damage(model: Path, rng: random.Random) -> None:
        data = bytearray((model / name).read_bytes())
        (model / name).write_bytes(bytes(change(data, rng)))

    return damage


def value_of(name: str, path: tuple[Any, ...] = ()) -> Damage:
    """Gives an entry of a JSON file, any or the one at `path`, a value of a wrong type or size, or removes it."""

    def damage(model: Path, rng: random.Random) -> None:
        document = json.loads((model / name).read_text())
        here = document
        for step in path:
            here = here[step]
        key = rng.choice(sorted(here)) if isinstance(here, dict) else rng.randrange(len(here))
        if rng.random() < 0.15:
            del here[key]
        else:
            here[key] = rng.choice(WRONG)
        (model / name).write_text(json.dumps(document))

    return damage


def template(text: str) -> Damage:
    def damage(model: Path, _: random.Random) -> None:
        (model / TEMPLATE).write_text(text)

    return damage


def flip(data: bytearray, rng: random.Random) -> bytearray:
    for _ in range(3):
        data[rng.randrange(min(len(data), 4000))] ^= 1 << rng.randrange(8)
    return data


DAMAGES: Mapping[str, Damage] = {
    "weights: cut": bytes_of(WEIGHTS, lambda data, rng: data[: rng.randrange(len(data))]),
    "weights: header": bytes_of(WEIGHTS, flip),
    "weights: length": bytes_of(WEIGHTS, lambda data, _: b"\xff" * 8 + data[8:]),
    "weights: empty": bytes_of(WEIGHTS, lambda _data, _: b""),
    "weights: text": bytes_of(WEIGHTS, lambda _data, _: b"version https://git-lfs.github.com/spec/v1\n"),
    "weights: lost": weights(lambda tensors, name: tensors.__delitem__(name)),
    "weights: renamed": weights(lambda tensors, name: tensors.update({f"old.{name}": tensors.pop(name)})),
    "weights: shape": weights(lambda tensors, name: tensors.update({name: torch.zeros(3, 5)})),
    "weights: integers": weights(lambda tensors, name: tensors.update({name: tensors[name].to(torch.int32)})),
    "weights: not finite": weights(lambda tensors, name: tensors[name].fill_(torch.nan)),
    "config: cut": bytes_of(CONFIG, lambda data, rng: data[: rng.randrange(len(data))]),
    "config: a list": bytes_of(CONFIG, lambda _data, _: b"[]"),
    "config: deep": bytes_of(CONFIG, lambda _data, _: b'{"a":' * 50_000),
    "config: value": value_of(CONFIG),
    "tokenizer: cut": bytes_of(TOKENIZER, lambda data, rng: data[: rng.randrange(len(data))]),
    "tokenizer: a list": bytes_of(TOKENIZER, lambda _data, _: b"[]"),
    "tokenizer: value": value_of(TOKENIZER),
    "tokenizer: model": value_of(TOKENIZER, ("model",)),
    "tokenizer: added": value_of(TOKENIZER, ("added_tokens", 0)),
    "tokenizer: config": value_of("tokenizer_config.json"),
    "template: syntax": template("{% for message in messages %}"),
    "template: raises": template("{{ raise_exception('no') }}"),
    "template: divides": template("{{ 1 // 0 }}"),
    "template: unknown": template("{{ nobody.nothing() }}"),
    "template: recursive": template("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"),
    "template: loops": template(LOOP),
    "template: huge": template("{{ 'x' * 20000000 }}"),
    "template: says nothing": template("constant"),
    "template: attributes": template("{{ messages.__class__.__mro__ }}"),
    "template: generation": template("{% generation %}{% generation %}a{% endgeneration %}"),
}
"""Damages of a model, by the file that they are done to."""
ADAPTER_DAMAGES: Mapping[str, Damage] = {
    "adapter: cut": bytes_of(ADAPTER_WEIGHTS, lambda data, rng: data[: rng.randrange(len(data))]),
    "adapter: header": bytes_of(ADAPTER_WEIGHTS, flip),
    "adapter: empty": bytes_of(ADAPTER_WEIGHTS, lambda _data, _: b""),
    "adapter: lost": weights(lambda tensors, name: tensors.__delitem__(name), ADAPTER_WEIGHTS),
    "adapter: shape": weights(
        lambda tensors, name: tensors.update({name: torch.zeros(3, 5)}), ADAPTER_WEIGHTS
    ),
    "adapter: not finite": weights(lambda tensors, name: tensors[name].fill_(torch.nan), ADAPTER_WEIGHTS),
    "adapter: a list": bytes_of(ADAPTER_CONFIG, lambda _data, _: b"[]"),
    "adapter: value": value_of(ADAPTER_CONFIG),
}
MANY = (
    "adapter: value",
    "config: value",
    "tokenizer: value",
    "tokenizer: model",
    "tokenizer: added",
    "tokenizer: config",
)
"""Damages with many cases."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One damaged model."""

    name: str
    path: Path


def damaged(
    model: Path, directory: Path, few: int, many: int, damages: Mapping[str, Damage] = DAMAGES
) -> Iterator[Case]:
    """Copies of `model`, each with one damage; several of those that vary."""
    for name, damage in damages.items():
        for number in range(scaled(few, many) if name in MANY else 1):
            path = directory / f"{name.replace(': ', '-').replace(' ', '-')}-{number}"
            shutil.copytree(model, path)
            damage(path, random.Random(f"{SEED}/model/{name}/{number}"))
            yield Case(name=name, path=path)
            shutil.rmtree(path)


@pytest.fixture
def conversations(models: Models, tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for text in models.texts[:4]:
            turns = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": text}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def trained(case: Case, run_dir: RunDir) -> str:
    """The outcome of a run of one step: the reason of its error, or that it completed with what it has trained."""
    finish_here(run_dir)
    end = events(run_dir)[-1]
    if end["kind"] == "completed":
        if not case.name.startswith("adapter"):
            assert_exported(run_dir, case.name)
        return "completed"
    error = from_status(from_json(end["error"]))
    assert error.reason is not Reason.INTERNAL, case.name
    assert "\n" not in error.message, (case.name, error.message)
    return str(error.reason)


def one_step(student: Mapping[str, Any], data: Path) -> dict[str, Any]:
    """A run of one step that asks no teacher."""
    spec = spec_of(
        Path(),
        data,
        None,
        data={"eval_fraction": 0, "max_sequence_tokens": 64},
        loss={"terms": [{"weight": 0}], "hard_weight": 1},
        optimizer={"max_steps": 1},
    )
    return {**spec, "student": dict(student)}


def test_a_damaged_student_is_trained_as_it_is_or_refused(
    models: Models, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_rendering, "RENDER_S", 0.3)
    outcomes: Counter[tuple[str, str]] = Counter()
    for number, case in enumerate(damaged(models.student, tmp_path / "students", 2, 60)):
        run_dir = make_run(tmp_path, f"run{number}", one_step({"model": str(case.path)}, conversations))
        outcomes[case.name, trained(case, run_dir)] += 1
    show("students", (f"{name:24} {reason:20} {count}" for (name, reason), count in sorted(outcomes.items())))


def test_a_damaged_adapter_is_trained_as_it_is_or_refused(
    models: Models, conversations: Path, tmp_path: Path
) -> None:
    outcomes: Counter[tuple[str, str]] = Counter()
    cases = damaged(models.adapter_a, tmp_path / "adapters", 4, 100, ADAPTER_DAMAGES)
    for number, case in enumerate(cases):
        student = {"model": str(models.teacher), "adapter": str(case.path), "output": "merged"}
        run_dir = make_run(tmp_path, f"run{number}", one_step(student, conversations))
        outcomes[case.name, trained(case, run_dir)] += 1
    show("adapters", (f"{name:24} {reason:20} {count}" for (name, reason), count in sorted(outcomes.items())))


def assert_exported(run_dir: RunDir, name: str) -> None:
    """The exported model is the trained one: weight for weight that of the last checkpoint, loaded as others load it."""
    exported = AutoModelForCausalLM.from_pretrained(run_dir.final_path).state_dict()
    (weights_file,) = run_dir.checkpoint_path(run_dir.checkpoints()[-1]).glob("*.safetensors")
    trained = load_file(weights_file)
    assert trained
    for key, tensor in trained.items():
        assert torch.equal(exported[key].to(tensor.dtype), tensor), (name, key)


def test_a_damaged_teacher_is_served_or_refused(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stillhouse.protos.rows.conversation import Turns
    from stillhouse.teacher_service.models.tokenizer import TextCodec

    monkeypatch.setattr(bounded_rendering, "RENDER_S", 0.3)
    outcomes: Counter[tuple[str, str]] = Counter()
    for case in damaged(models.teacher, tmp_path / "teachers", 1, 60):
        config = TeacherConfig(model=str(case.path), engine="hf", dtype="float32", threads=1)
        reason, message = "served", ""
        try:
            engine = asyncio.run(HfEngine.load(config))
            asyncio.run(engine.close())
            TextCodec.load(config.model).render(Turns(messages=({"role": "user", "content": "Say it."},)))
        except StillhouseError as error:
            reason, message = str(error.reason), error.message
        assert "\n" not in message, case.name
        outcomes[case.name, reason] += 1
    show("teachers", (f"{name:24} {reason:20} {count}" for (name, reason), count in sorted(outcomes.items())))
