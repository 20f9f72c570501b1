"""Model directories with renamed weights, other ends and odd settings: a run of one exports what it trained, or is refused.

Damaged bytes and values are those of tests/fuzz; here the files are whole and mean something else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stillhouse.protos.errors import Reason, from_json, from_status
from stillhouse.student_trainer.run_dir import RunDir
from tests.compat.architectures import make_architecture
from tests.compat.corpus import Corpus, load, mean_cross_entropy, token_ids
from tests.student_trainer.train.runs import events, finish_here, make_run, metric, spec_of

pytestmark = pytest.mark.model

Weights = dict[str, torch.Tensor]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def weights(change: Callable[[Weights], Weights]) -> Callable[[Path], None]:
    """Replaces the tensors of a model's file."""

    def damage(model: Path) -> None:
        path = model / "model.safetensors"
        save_file(
            {name: each.clone() for name, each in change(load_file(path)).items()}, path, {"format": "pt"}
        )

    return damage


def settings(name: str, **values: Any) -> Callable[[Path], None]:
    """Sets entries of a JSON file."""

    def damage(model: Path) -> None:
        path = model / name
        before = json.loads(path.read_bytes()) if path.exists() else {}
        path.write_text(json.dumps(before | values))

    return damage


def both(*damages: Callable[[Path], None]) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        for each in damages:
            each(model)

    return damage


def renamed(rename: Callable[[str], str]) -> Callable[[Path], None]:
    return weights(lambda tensors: {rename(name): each for name, each in tensors.items()})


def tokens(*added: str, **further: Any) -> Callable[[Path], None]:
    """Adds tokens to a tokenizer as its own file holds them."""

    def damage(model: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.add_tokens(list(added), **further)
        tokenizer.save_pretrained(model)

    return damage


GENERATION = "generation_config.json"
CONFIG = "config.json"
REFUSED, SAME, OTHER = "refused", "trained as the whole model", "trained as another model"
DAMAGES: Mapping[str, tuple[str, Callable[[Path], None]]] = {
    "all under module.": (SAME, renamed(lambda name: f"module.{name}")),
    "all under _orig_mod.": (SAME, renamed(lambda name: f"_orig_mod.{name}")),
    "all under both": (SAME, renamed(lambda name: f"module._orig_mod.{name}")),
    "a wrapper within": (
        SAME,
        renamed(lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module.")),
    ),
    "half under module.": (SAME, renamed(lambda name: f"module.{name}" if "layers.1" in name else name)),
    "layers counted from 1": (REFUSED, renamed(lambda name: name.replace("layers.1", "layers.2"))),
    "base_model prefix lost": (SAME, renamed(lambda name: name.removeprefix("model."))),
    "a lost layer": (REFUSED, weights(lambda all_: {k: v for k, v in all_.items() if "layers.1" not in k})),
    "a lost norm": (
        REFUSED,
        weights(lambda all_: {k: v for k, v in all_.items() if k != "model.norm.weight"}),
    ),
    "a lost untied head": (REFUSED, weights(lambda all_: {k: v for k, v in all_.items() if k != HEAD})),
    "a lost head, tied in name": (
        OTHER,
        both(
            weights(lambda all_: {k: v for k, v in all_.items() if k != HEAD}),
            settings(CONFIG, tie_word_embeddings=True),
        ),
    ),
    "a head of its own that the settings tie": (SAME, settings(CONFIG, tie_word_embeddings=True)),
    "an embedding lost behind a tie": (
        OTHER,
        both(
            weights(lambda all_: {k: v for k, v in all_.items() if k != EMBEDDING}),
            settings(CONFIG, tie_word_embeddings=True),
        ),
    ),
    "weights of nothing": (SAME, weights(lambda all_: {**all_, "extra.weight": torch.ones(3)})),
    "an adapter within": (
        REFUSED,
        weights(lambda all_: {**all_, "model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)}),
    ),
    "fewer layers than files": (OTHER, settings(CONFIG, num_hidden_layers=1)),
    "more layers than files": (REFUSED, settings(CONFIG, num_hidden_layers=3)),
    "a temperature without sampling": (SAME, settings(GENERATION, temperature=0.7, top_p=0.5)),
    "temperature 0": (SAME, settings(GENERATION, temperature=0.0, do_sample=True)),
    "several ends": (SAME, settings(GENERATION, eos_token_id=[0, 3, 7], max_new_tokens=5)),
    "no end": (SAME, settings(GENERATION, eos_token_id=None)),
    "beams that exclude each other": (SAME, settings(GENERATION, num_beams=1, early_stopping=True)),
    "an end beyond the vocabulary": (SAME, settings(GENERATION, eos_token_id=10**6)),
    "generation settings of a model's own": (
        SAME,
        settings(GENERATION, chat_format="chatml", own={"a": [1]}),
    ),
    "settings of generation in the model's": (SAME, settings(CONFIG, temperature=0.9, num_beams=2)),
    "a token beyond the embedding": (REFUSED, tokens("<new>")),
    "no chat template": (SAME, lambda model: (model / "chat_template.jinja").unlink()),
    "named chat templates": (
        SAME,
        both(
            lambda model: (model / "chat_template.jinja").unlink(),
            settings(
                "tokenizer_config.json",
                chat_template=[{"name": each, "template": "{{ messages }}"} for each in ("default", "rag")],
            ),
        ),
    ),
}
"""Damages of an untied llama, by name, with what they end in."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus.make(tmp_path_factory.mktemp("corpus"))


def run_of(model: Path, corpus: Corpus, folder: Path, **student: Any) -> RunDir:
    """The run of a model on cross-entropy, ended."""
    spec = spec_of(
        model,
        corpus.train,
        None,
        student={"model": str(model), **student},
        data={
            **{"eval": [{"path": str(corpus.held_out)}], "eval_fraction": 0, "end_text": False},
            "max_sequence_tokens": 64,
        },
        loss={"terms": [{"weight": 0}], "hard_weight": 1},
        optimizer={"learning_rate": 1e-2, "max_steps": 1, "batch_size": 3},
    )
    run_dir = make_run(folder, "run", spec)
    finish_here(run_dir)
    return run_dir


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("student", [{}, {"lora": {"rank": 2}, "output": "merged"}], ids=["whole", "adapter"])
@pytest.mark.slow
def test_a_run_of_a_damaged_model_exports_what_it_trained_or_is_refused(
    corpus: Corpus, tmp_path: Path, name: str, student: dict[str, Any]
) -> None:
    end, damage = DAMAGES[name]
    model = make_architecture("llama", tmp_path / "model", corpus.tokenizer)
    held_out = token_ids(corpus.held_out, model)
    whole = mean_cross_entropy(load(model), held_out)
    damage(model)
    run_dir = run_of(model, corpus, tmp_path, **student)
    last = events(run_dir)[-1]
    if last["kind"] == "failed":
        error = from_status(from_json(last["error"]))
        assert error.reason is not Reason.INTERNAL, error.message
        assert "\n" not in error.message
        assert end == REFUSED, error.message
        assert not metric(run_dir, "train/loss"), "refused before the first step"
        return
    assert end != REFUSED
    exported = mean_cross_entropy(load(run_dir.final_path), held_out)
    found = metric(run_dir, "eval/cross_entropy")
    assert found[1] == pytest.approx(exported, rel=1e-4)
    assert (found[0] == pytest.approx(whole, rel=1e-4)) == (end == SAME)
