"""Merges a LoRA adapter into its base model, verified to give the same logits."""

from __future__ import annotations

import json
import secrets
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from stillhouse.protos.errors import Reason, StillhouseError, first_line
from stillhouse.protos.files.adapter import FILES
from stillhouse.teacher_service.engines.hf.adapters import LoraSlots
from stillhouse.teacher_service.engines.hf.loading import load_causal_lm
from stillhouse.teacher_service.models.adapter_base import check_base
from stillhouse.teacher_service.models.adapter_files import check_ranks
from stillhouse.teacher_service.models.files import locate_model
from stillhouse.teacher_service.models.fingerprint import weight_files

TOLERANCE = 1e-3
"""Largest difference between logits of the merged model and of base plus adapter, in float32, relative to the largest
logit."""
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.index.json")
_PROBE_TOKENS = 16
_NAME = "the adapter"


def merge_adapter(model: str, adapter: Path, out: Path, *, revision: str = "") -> None:
    """Merges `adapter` into the weights of `model` and writes the result to the new directory `out`.

    Sums are computed in float32 and stored in the base's own types. All other files are copied from the base. Raises
    `StillhouseError`: MODEL_NOT_FOUND, ADAPTER_INVALID, INVALID_CONFIG; nothing is left at `out` then.
    """
    base = locate_model(model, revision).directory
    _check(base, adapter, out)
    merged = _merged(base, adapter)
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _save(merged, partial)
        _copy_others(base, partial)
        partial.rename(out)
    except OSError as error:
        raise StillhouseError(
            Reason.INVALID_CONFIG, f"{out} cannot be written ({error.strerror or error}). Give another --out."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check(base: Path, adapter: Path, out: Path) -> None:
    if out.exists():
        raise StillhouseError(Reason.INVALID_CONFIG, f"{out} exists already. Give a directory that does not.")
    missing = [name for name in FILES if not (adapter / name).is_file()]
    if missing:
        raise StillhouseError(
            Reason.ADAPTER_INVALID,
            f"{adapter} is not an adapter: {' and '.join(missing)} is missing. A LoRA adapter is a directory with "
            f"{' and '.join(FILES)}.",
        )
    check_ranks(_NAME, adapter)
    check_base(_NAME, adapter, base)
    weight_files(base)
    quantization = json.loads((base / "config.json").read_bytes()).get("quantization_config")
    if quantization:
        raise StillhouseError(
            Reason.INVALID_CONFIG,
            f"{base} is quantised ({quantization.get('quant_method', 'by an unnamed method')}), and a sum cannot be stored in "
            "its weights without loss. Merge into the model that it was quantised from, then quantise the result.",
        )


def _merged(base: Path, adapter: Path) -> Any:
    import transformers

    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        model: Any = load_causal_lm(base, str(base), dtype="auto").eval()
    except (OSError, ValueError, KeyError) as error:
        raise StillhouseError(
            Reason.MODEL_NOT_FOUND,
            f"transformers cannot load a language model from {base}: {first_line(error)}",
        ) from error
    types = {name: weight.dtype for name, weight in model.state_dict().items()}
    model = model.float().requires_grad_(False).eval()
    slots = LoraSlots(model, max_adapters=1, max_rank=1 << 20)
    slots.load(_NAME, adapter)
    slots.activate("")
    tied = _is_tied(model)
    slots.activate(_NAME)
    wanted = _probe(model)
    slots.merge(_NAME)
    largest = float(wanted.abs().max())
    differs = not float((_probe(model) - wanted).abs().max()) <= TOLERANCE * max(largest, 1.0)
    if differs or tied != _is_tied(model):
        raise StillhouseError(
            Reason.ADAPTER_INVALID,
            "The merged model does not say what base and adapter say together: the adapter changes a weight that the model "
            "uses in two places, such as tied embeddings. Serve it as an adapter instead.",
        )
    for name, weight in model.state_dict(keep_vars=True).items():
        weight.data = weight.data.to(types[name])
    return model


def _save(model: Any, directory: Path) -> None:
    """Writes weights and settings, those of generation as they are: save_pretrained refuses some that it loads."""
    from transformers import GenerationConfig

    settings, model.generation_config = model.generation_config, GenerationConfig()
    model.save_pretrained(directory)
    settings.to_json_file(directory / "generation_config.json", use_diff=True, keys_to_pop=["compile_config"])


def _is_tied(model: Any) -> bool:
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def _probe(model: Any) -> torch.Tensor:
    """Computes logits of a few random tokens."""
    vocab_size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        ids = torch.randint(vocab_size, (1, _PROBE_TOKENS), generator=generator)
        logits: torch.Tensor = model(ids).logits
    return logits


def _copy_others(base: Path, out: Path) -> None:
    """Copies configuration, tokenizer and all other files except weights."""
    for path in sorted(base.iterdir()):
        if path.is_file() and not any(path.match(pattern) for pattern in _WEIGHTS):
            shutil.copyfile(path, out / path.name)
