"""Names of the tensors in a checkpoint against those of its model: what would be random is refused by name, and what only
has a prefix is read without it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from stillhouse.protos.errors import Reason, StillhouseError, first_line
from stillhouse.protos.files.weight_names import listed, wrapper_patterns
from stillhouse.protos.files.weight_types import plain_weights, unscaled_weights
from stillhouse.teacher_service.models.files import is_quantised
from stillhouse.teacher_service.models.fingerprint import weight_files

_log = structlog.get_logger(__name__)
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightNames:
    """Files of a model's tensors, and the names under which transformers reads them."""

    files: tuple[Path, ...]
    renamed: Mapping[str, str]
    """Name to read of each name in the files; empty where they are equal."""
    untied: str = ""
    """Weight that the configuration ties, with values of its own in the files, which transformers computes with."""

    def require_plain(self, model: str) -> None:
        """Raises `StillhouseError` (MODEL_NOT_FOUND) where an engine that goes by files and configuration alone would
        compute with other weights."""
        if self.renamed:
            key, plain = next((key, plain) for key, plain in self.renamed.items() if key != plain)
            raise _refused(
                model,
                f"has {key} in the place of {plain}, which vLLM does not read",
                "Save it again without the prefix, or serve it with --engine hf",
            )
        if self.untied:
            raise _refused(
                model,
                f"has {self.untied} with values of its own, which its tie_word_embeddings would replace by the embedding's",
                "Set tie_word_embeddings to false in config.json, or take the weight out of the files",
            )


def check_weight_names(directory: Path, model: str, *, whole: bool = False) -> WeightNames:
    """Compares a checkpoint with the model of its configuration, from the headers of its files.

    Raises `StillhouseError` (MODEL_NOT_FOUND), naming tensors, where the model has weights that tying does not explain
    and the files lack, or the files have a bias that the model lacks. `model` is what the operator named; with `whole` the
    engine loads a multimodal model with all its parts, not its language model alone.
    """
    if (directory / "adapter_config.json").is_file():
        raise _refused(
            model,
            "has an adapter_config.json: transformers would add its adapter, vLLM would not",
            "Give the base alone as --model, and the adapter as --adapter NAME=PATH",
        )
    files = _files(directory, model)
    shapes = _tensor_shapes(directory, files, model)
    empty = _empty_model(directory, whole=whole)
    if empty is None:
        _log.warning("weights not checked by name", model=model, reason="transformers does not know its type")
        return WeightNames(files=files, renamed={})
    quantised = is_quantised(directory)
    missing, unexpected = _compare(empty, shapes, quantised=quantised)
    renamed: dict[str, str] = {}
    if missing and (renamed := _without_wrappers(empty, shapes, missing, unexpected)):
        clean = {renamed[key]: shape for key, shape in shapes.items()}
        left, others = _compare(empty, clean, quantised=quantised)
        if left:
            renamed = {}
        else:
            missing, unexpected = [], others
            key = next(key for key, plain in renamed.items() if key != plain)
            _log.warning("weights read without their prefix", model=model, found=key, read=renamed[key])
    if missing:
        raise _refused(
            model,
            f"lacks weights of a {type(empty).__name__} in its files ({listed(missing)}), which would be random numbers",
            _remedy(missing, unexpected, type(empty).__name__),
        )
    _require_no_lost_bias(empty, files, renamed, unexpected, model)
    if unexpected and not quantised:
        _log.warning("weights not used", model=model, weights=listed(unexpected))
    return WeightNames(files=files, renamed=renamed, untied=_untied(empty, files, shapes))


def _files(directory: Path, model: str) -> tuple[Path, ...]:
    """Weight files in transformers' order of preference."""
    single = directory / "model.safetensors"
    if single.is_file():
        return (single,)
    index = directory / _INDEX
    if not index.is_file():
        return tuple(weight_files(directory))
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refused(model, f"has an unreadable {_INDEX} ({first_line(error)})", "Save it again") from error
    outside = [str(name) for name in names if Path(str(name)).name != name]
    if outside:
        raise _refused(
            model, f"has a {_INDEX} that names {listed(outside)}, outside of the directory", "Fetch it again"
        )
    absent = [name for name in names if not (directory / name).is_file()]
    if absent:
        raise _refused(model, f"lacks {listed(absent)}, which its {_INDEX} names", "Fetch it again")
    return tuple(directory / name for name in names)


def _tensor_shapes(directory: Path, files: Iterable[Path], model: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in the files. Refuses weights that are stored as codes which nothing explains."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    types: dict[str, tuple[str, int]] = {}
    for path in files:
        if path.suffix != ".safetensors":
            import torch

            loaded = torch.load(path, map_location="meta", weights_only=True, mmap=True)
            shapes |= {key: tuple(tensor.shape) for key, tensor in loaded.items()}
            continue
        try:
            with safe_open(path, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118 - it is no mapping
                    view = weights.get_slice(key)
                    shapes[key] = tuple(view.get_shape())
                    types[key] = str(view.get_dtype()), len(shapes[key])
        except (OSError, SafetensorError) as error:
            raise _refused(
                model, f"has an unreadable {path.name} ({first_line(error)})", "Fetch it again"
            ) from error
    if problem := unscaled_weights(directory, types):
        raise _refused(
            model, problem, "Give the checkpoint with its quantization_config, or one in bfloat16 or float32"
        )
    if problem := plain_weights(directory, shapes):
        raise _refused(model, problem, "--quantization quantises plain weights while they are loaded")
    return shapes


def _empty_model(directory: Path, *, whole: bool) -> Any:
    """The model of a configuration, without weights; None where transformers has no class for it."""
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        mapping = transformers.AutoModelForCausalLM._model_mapping
        with torch.device("meta"):
            has_parts = config.get_text_config() is not config
            if type(config) in mapping and not (whole and has_parts):
                return transformers.AutoModelForCausalLM.from_config(config)
            cls = getattr(transformers, (config.architectures or [""])[0], None)
            return None if cls is None else cls(config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError):
        return None  # the engine's own words on a configuration that it cannot build say more


def _compare(
    empty: Any, shapes: Mapping[str, tuple[int, ...]], *, quantised: bool
) -> tuple[list[str], list[str]]:
    """Names that the model lacks, and that it does not use, after transformers' own renaming and tying."""
    import torch
    import transformers

    weights = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        _, info = type(empty).from_pretrained(
            None,
            config=empty.config,
            state_dict=weights,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,  # the engine names them
            output_loading_info=True,
        )
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    missing = set(info["missing_keys"])
    if quantised:
        # A quantised matrix has other tensors in the place of its weight.
        missing = {key for key in missing if not _has_others(key, shapes)}
    return sorted(missing), sorted(info["unexpected_keys"])


def _has_others(key: str, names: Iterable[str]) -> bool:
    module = key.rpartition(".")[0]
    return any(f".{module}." in f".{name}" and not name.endswith(".bias") for name in names)


def _without_wrappers(
    empty: Any, names: Iterable[str], missing: list[str], unexpected: list[str]
) -> dict[str, str]:
    """Names without what wrappers put into them; empty where that explains nothing."""
    patterns = wrapper_patterns(missing, unexpected, empty.base_model_prefix)
    plain = {name: name for name in names}
    for pattern, replacement in patterns.items():
        plain = {name: re.sub(pattern, replacement, short) for name, short in plain.items()}
    return plain if patterns and len(set(plain.values())) == len(plain) else {}


def _require_no_lost_bias(
    empty: Any, files: Iterable[Path], renamed: Mapping[str, str], unexpected: Iterable[str], model: str
) -> None:
    """Refuses files with a bias, other than zero, of a module that has none by its configuration."""
    lost = set()
    for key in unexpected:
        place, _, parameter = key.rpartition(".")
        with suppress(AttributeError):
            if parameter == "bias" and empty.get_submodule(place)._parameters.get("bias", 0) is None:
                lost.add(key)
    for key in sorted(lost):
        if _is_not_zero(files, {key, *(name for name, plain in renamed.items() if plain == key)}):
            raise _refused(
                model,
                f"has {listed(lost)}, and its configuration makes a model without",
                "Set what makes the bias in config.json, such as attention_bias or mlp_bias",
            )


def _untied(empty: Any, files: Iterable[Path], names: Mapping[str, tuple[int, ...]]) -> str:
    if any(path.suffix != ".safetensors" for path in files):
        return ""
    for target, source in empty.all_tied_weights_keys.items():
        if target in names and source in names:
            one, other, *_ = _tensors(files, {target, source})
            if not one.equal(other):
                return str(target)
    return ""


def _is_not_zero(files: Iterable[Path], names: set[str]) -> bool:
    return any(bool(each.any()) for each in _tensors(files, names))


def _tensors(files: Iterable[Path], names: set[str]) -> Iterator[Any]:
    """Yields the tensors of these names from the safetensors among the files."""
    from safetensors import safe_open

    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as weights:
                yield from (weights.get_tensor(key) for key in names.intersection(weights.keys()))


def _remedy(missing: list[str], unexpected: list[str], name: str) -> str:
    if missing == ["lm_head.weight"]:
        return "Save it again with its output layer, or set tie_word_embeddings to true in config.json if that is the embedding"
    if unexpected:
        return f"It has {listed(unexpected)} instead: save it again under the names of {name}, or give a checkpoint of a language model"
    return "Save or fetch it again"


def _refused(model: str, problem: str, remedy: str) -> StillhouseError:
    return StillhouseError(Reason.MODEL_NOT_FOUND, f"{model} {problem}. {remedy}.")
