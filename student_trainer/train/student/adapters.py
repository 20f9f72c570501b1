"""LoRA adapters of a student: a new one, an existing one that is trained further, and their merge into the base."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import structlog
import torch
from torch import nn

from stillhouse.protos.errors import Reason, StillhouseError, first_line
from stillhouse.protos.files.adapter import CONFIG, FILES, base_beside
from stillhouse.protos.files.adapter_config import CHANGING_INITS, AdapterConfigError, check_lora_config
from stillhouse.protos.files.weight_names import listed
from stillhouse.protos.files.weight_types import PLAIN_TYPES
from stillhouse.protos.library_errors import reported_as
from stillhouse.student_trainer.config.checks import invalid_field
from stillhouse.student_trainer.config.schema import ALL_LINEAR, LoraConfig, StudentConfig
from stillhouse.student_trainer.train.data.readers import resolve

if TYPE_CHECKING:
    from pathlib import Path

log = structlog.get_logger()

_EXACT_INITS = ("pissa", "olora")
"""Values of init_lora_weights from which PEFT makes the base that it has changed again."""


def add_adapter(model: Any, config: LoraConfig, head: Sequence[str] = ()) -> Any:
    """Adds a new adapter; the log says how much of the model it reaches.

    `head` are modules of a classifier that are trained as a whole beside it.

    Raises StillhouseError(INVALID_SPEC) for a module or a layer that the model does not have.
    """
    import peft

    whole = [each for each in _linear_modules(model) if _is_inside(each, head)]
    linear = [
        each
        for each in _linear_modules(model)
        if each not in whole and _takes_lora(model, each.rpartition(".")[2])
    ]
    names = [each for each in config.target_modules if each != ALL_LINEAR]
    takes_all = len(names) < len(config.target_modules) or not names
    if takes_all:
        names += sorted({name.rpartition(".")[2] for name in linear})
    _check_names(model, names, linear)
    _check_layers(model, config.layers)
    targets = [each for name, each in model.named_modules() if _matches(name, names)]
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=names,
        layers_to_transform=list(config.layers) or None,
        bias=config.bias,
        # transformers' Conv1D, the layer of GPT-2, holds its weight transposed.
        fan_in_fan_out=any(type(each).__name__ == "Conv1D" for each in targets),
        modules_to_save=list(head) or None,
        exclude_modules=whole or None,
        task_type="SEQ_CLS" if head else "CAUSAL_LM",
    )
    try:
        with _warnings_handled():
            adapted = peft.get_peft_model(model, settings)
    except ValueError as error:
        layers = f" of layers {list(config.layers)}" if config.layers else ""
        raise invalid_field(
            "student.lora.target_modules",
            f"{', '.join(names)}{layers}: no LoRA can be added there ({first_line(error)}). This model's linear layers are "
            f"{_listed(linear)}.",
        ) from error
    _log_reach(adapted, takes_all=takes_all)
    return adapted


def load_adapter(model: Any, config: StudentConfig, data_dir: Path) -> Any:
    """Loads the adapter `config.adapter`, to be trained further. Raises StillhouseError: MODEL_NOT_FOUND, INVALID_SPEC."""
    import peft

    path = resolve(config.adapter, data_dir)
    missing = [name for name in FILES if not (path / name).is_file()]
    if missing:
        raise StillhouseError(
            Reason.MODEL_NOT_FOUND,
            f"student.adapter {path} has no {' and no '.join(missing)}. Name the directory of a LoRA adapter, such as "
            "runs/…/final/adapter.",
            resource=config.adapter,
        )

    base = base_beside(path)
    if base is not None and base.resolve() != resolve(config.model, data_dir).resolve():
        _check_base(model, base, config)

    def refused(error: BaseException) -> StillhouseError:
        return invalid_field("student.adapter", f"{path} does not fit {config.model} ({first_line(error)}).")

    with reported_as(refused):
        _check_settings(path)
    with reported_as(refused), _warnings_handled():
        adapted = peft.PeftModel.from_pretrained(model, path, is_trainable=True)
        _check_tensors(adapted, path, config)
    _log_reach(adapted)
    return adapted


def merge(model: Any) -> Any:
    """Returns the base of a PEFT model with the adapter in its weights; ends that shared one get one each."""
    _untie(model.get_base_model())
    with _warnings_handled():
        return model.merge_and_unload(safe_merge=True)


def _linear_modules(model: Any) -> list[str]:
    """Returns the names of all linear layers but the output layer and those that are more, such as some routers."""
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings()
    return [
        name
        for name, each in model.named_modules()
        if isinstance(each, (nn.Linear, Conv1D)) and each is not output and _gives_a_product(each)
    ]


def _gives_a_product(layer: Any) -> bool:
    """Returns False for an architecture's own kind of linear layer that returns something else, to which LoRA cannot add."""
    if not type(layer).__module__.startswith("transformers.models."):
        return True
    try:
        with torch.no_grad():
            return isinstance(layer(layer.weight.new_zeros(1, layer.in_features)), torch.Tensor)
    except (RuntimeError, ValueError, TypeError, IndexError):  # it wants other inputs
        return False


def _takes_lora(model: Any, name: str) -> bool:
    """Returns False for a layer whose weight the model reads past the layer, as Mamba's fused kernels do: PEFT refuses those."""
    import peft
    from peft.tuners import tuners_utils

    try:
        tuners_utils._check_lora_target_modules_mamba(peft.LoraConfig(), model, name)
    except ValueError:
        return False
    return True


def _matches(module: str, names: Sequence[str]) -> bool:
    """Returns True as PEFT matches names of modules."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def _is_inside(name: str, modules: Sequence[str]) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in modules)


def _check_names(model: Any, names: Sequence[str], linear: Sequence[str]) -> None:
    modules = [name for name, _ in model.named_modules()]
    unknown = [name for name in names if not any(_matches(module, [name]) for module in modules)]
    if unknown:
        raise invalid_field(
            "student.lora.target_modules",
            f"{', '.join(unknown)}: no module of this model matches. Its linear layers are {_listed(linear)}; "
            f'"{ALL_LINEAR}" takes all of them.',
        )


def _check_layers(model: Any, layers: Sequence[int]) -> None:
    total = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    unknown = [each for each in layers if total is not None and each >= total]
    if unknown:
        raise invalid_field(
            "student.lora.layers",
            f"{', '.join(map(str, unknown))}: this model has {total} layers, which count from 0.",
        )


def _listed(linear: Sequence[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in linear}))


def _check_settings(path: Path) -> None:
    """Refuses an adapter that would be computed otherwise than it was trained. Raises StillhouseError(INVALID_SPEC)."""
    import peft

    known = {each.name for each in dataclasses.fields(peft.LoraConfig)}
    try:
        settings = check_lora_config(json.loads((path / CONFIG).read_bytes()), known)
    except AdapterConfigError as error:
        raise invalid_field("student.adapter", f"{path} is refused: its {error}.") from error
    init = settings.get("init_lora_weights")
    # PEFT makes the bases of the others again, by decompositions that are exact.
    if isinstance(init, str) and init.lower().startswith(CHANGING_INITS) and init.lower() not in _EXACT_INITS:
        raise invalid_field(
            "student.adapter",
            f"{path} has init_lora_weights {init!r}: it was trained on a changed base. Convert it with peft's "
            "path_initial_model_for_weight_conversion; or set init_lora_weights to true, if student.model is that changed base.",
        )


def _check_tensors(adapted: Any, path: Path, config: StudentConfig) -> None:
    """Refuses an adapter whose file lacks tensors, which PEFT would begin anew, or has others, which it would leave out."""
    import peft
    from safetensors import safe_open

    with safe_open(path / FILES[1], "pt") as file:
        types = {name: str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    held = set(types)
    codes = [name for name, kind in types.items() if kind not in PLAIN_TYPES]
    if codes:
        raise invalid_field(
            "student.adapter",
            f"{path} holds {listed(codes)} in type {types[min(codes)]}. Save it in float32, bfloat16 or float16.",
        )
    wanted = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    extra = {name for name in held - wanted if ".lora_" in name}
    if extra:
        raise invalid_field(
            "student.adapter",
            f"{path} has tensors that its configuration does not name for {config.model} ({listed(extra)}); they would be left "
            "out. Correct target_modules in its adapter_config.json, or take the model that it was trained on.",
        )
    missing = sorted(wanted - held)
    if missing:
        raise invalid_field(
            "student.adapter",
            f"{path} lacks tensors that its configuration names for {config.model} ({listed(missing)}); "
            "they would begin at their first values. Save the adapter again with the PEFT version that made it.",
        )


def _check_base(model: Any, base: Path, config: StudentConfig) -> None:
    """Refuses a model with other weights than the base that lies beside the adapter."""
    from safetensors import safe_open

    layers = json.loads((base / "config.json").read_bytes()).get("num_hidden_layers")
    if layers != getattr(model.config.get_text_config(), "num_hidden_layers", layers):
        raise _other_base(base, config, f"{layers} layers")
    own = model.state_dict()
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                weight = own.get(name)
                if (
                    weight is not None
                    and weight.is_floating_point()
                    and not _is_close(weight, tensors.get_tensor(name))
                ):
                    raise _other_base(base, config, name)


def _other_base(base: Path, config: StudentConfig, what: str) -> StillhouseError:
    return invalid_field(
        "student.model",
        f"{config.model} has other weights than the base that lies beside student.adapter ({what}). Set student.model: {base}, "
        "and leave student.keep_layers and student.from_config out.",
    )


def _is_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Returns True for equal tensors, one of which may have been rounded to half precision."""
    if one.shape != other.shape:
        return False
    return torch.allclose(one.detach().float().cpu(), other.float(), rtol=1e-2, atol=1e-5)


def _log_reach(adapted: Any, *, takes_all: bool = False) -> None:
    """Logs how many modules the adapter changes, and the experts and, of all, the layers that it leaves as they are."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    reached = [name for name, each in adapted.named_modules() if isinstance(each, BaseTunerLayer)]
    facts: dict[str, Any] = {"modules": len(reached)}
    left = [] if not takes_all else [each for each in _linear_modules(adapted) if not _is_adapted(each)]
    if left:
        facts["linear_left_as_they_are"] = _listed(left)
    experts = _unreached_experts(adapted)
    if experts:
        total = sum(each.numel() for each in adapted.parameters())
        share = sum(experts.values()) / total
        kinds = sorted({name.rpartition(".")[2] for name in experts})
        facts |= {"experts_left_as_they_are": ", ".join(kinds), "share_of_weights": round(share, 3)}
    log.info("adapter added", **facts)


def _unreached_experts(adapted: Any) -> Mapping[str, int]:
    """Returns the sizes of experts' weights that are no modules and have no LoRA of their own, by name.

    In some mixtures of experts PEFT puts the LoRA of layers named as the experts' former parts on these weights instead.
    """
    from peft.tuners.lora.layer import ParamWrapper

    wrapped = {id(each.get_param()) for each in adapted.modules() if isinstance(each, ParamWrapper)}
    return {
        name: each.numel()
        for name, each in adapted.named_parameters()
        if ".experts." in name
        and each.ndim == 3
        and ".lora_" not in name
        and not each.requires_grad
        and id(each) not in wrapped
    }


def _is_adapted(module: str) -> bool:
    """Returns True for a layer under an adapter's, and for those of the adapter."""
    return ".lora_" in module or module.endswith(".base_layer")


def _untie(plain: Any) -> None:
    """Gives every adapted layer a weight of its own: a merge into a shared one would change the other end too."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    uses = Counter(id(each) for module in plain.modules() for each in module._parameters.values())
    for module in plain.modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        base = module.get_base_layer()
        weight = getattr(base, "weight", None)  # experts have weights of other names, which nothing shares
        if weight is not None and uses[id(weight)] > 1:
            uses[id(weight)] -= 1
            base.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)


@contextmanager
def _warnings_handled() -> Iterator[None]:
    """Silences PEFT's warnings of tied embeddings, which `merge` unties, of missing tensors, which are refused, and of
    patterns of its own for experts."""
    with warnings.catch_warnings():
        patterns = "The following (rank|alpha)_pattern keys did not match"
        warnings.filterwarnings("ignore", message=patterns, category=RuntimeWarning)
        said = ".*(tie_word_embeddings|no longer tied|tied layer|missing adapter keys)"
        warnings.filterwarnings("ignore", message=said, category=UserWarning)
        yield
