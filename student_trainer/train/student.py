"""The model that learns: loaded whole or with an adapter, asked only for the logits that a loss needs, and saved for others to use."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor, nn

from protos.errors import FieldViolation, Reason, StillhouseError
from student_trainer.config import LoraConfig, StudentConfig
from student_trainer.train.batch import MicroBatch
from student_trainer.train.rows import resolve

log = structlog.get_logger()


def load_tokenizer(config: StudentConfig, data_dir: Path) -> Any:
    """The student's tokenizer. Raises StillhouseError(MODEL_NOT_FOUND)."""
    from transformers import AutoTokenizer

    source = _model_source(config, data_dir)
    try:
        return AutoTokenizer.from_pretrained(
            source, revision=config.revision or None, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise _model_not_found(
            config, source, f"has no tokenizer that can be read ({_first_line(error)})"
        ) from error


class Student:
    """A causal language model, the part of it that is trained, and its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, config: StudentConfig) -> None:
        self.model: nn.Module = model
        self.tokenizer = tokenizer
        self.config = config
        plain = model.get_base_model() if config.trains_adapter else model
        self.plain: Any = plain
        """The model without the adapter's wrapping."""
        self._keeps_logits = "logits_to_keep" in inspect.signature(plain.forward).parameters
        self.max_positions: int | None = getattr(plain.config, "max_position_embeddings", None)
        """Longest sequence that the model was made for, in tokens; None if it does not say."""

    @classmethod
    def load(
        cls,
        config: StudentConfig,
        tokenizer: Any,
        *,
        data_dir: Path,
        device: torch.device,
        precision: str,
        seed: int,
    ) -> Student:
        """The student on `device`. Random weights, where there are any, come from `seed`.

        Weights that are trained are float32, also with bf16 autocast: an update of 1e-5 vanishes in bfloat16. A frozen
        base is bfloat16 with bf16. Raises StillhouseError: MODEL_NOT_FOUND, INVALID_SPEC, TOKENIZER_INVALID.
        """
        torch.manual_seed(seed)
        frozen_in_half = config.lora is not None and precision == "bf16"
        model = _load_model(config, data_dir, torch.bfloat16 if frozen_in_half else torch.float32)
        num_embeddings = model.get_input_embeddings().weight.shape[0]
        if num_embeddings < len(tokenizer):
            raise StillhouseError(
                Reason.TOKENIZER_INVALID,
                f"student.model {config.model} has {num_embeddings} embeddings, but its tokenizer knows {len(tokenizer)} "
                "tokens. Resize the embeddings, or give it the tokenizer that it was made with.",
            )
        if config.lora:
            model = _add_adapter(model, config.lora)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.to(device)
        model.train()
        student = cls(model, tokenizer, config)
        log.info("student loaded", model=config.model, trained=student.num_trained, of=student.num_parameters)
        return student

    @property
    def num_parameters(self) -> int:
        """Numbers in the model."""
        return sum(each.numel() for each in self.model.parameters())

    @property
    def num_trained(self) -> int:
        """Numbers in the model that are trained."""
        return sum(each.numel() for each in self.trained().values())

    def trained(self) -> Mapping[str, nn.Parameter]:
        """The parameters that are trained, by name; shared ones once."""
        return {name: each for name, each in self.model.named_parameters() if each.requires_grad}

    def logits(self, batch: MicroBatch) -> Tensor:
        """[1, N, V]: what the model says of each target of `batch`, in its order."""
        arguments: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
        if batch.attention_mask is not None:
            arguments["attention_mask"] = batch.attention_mask
        if batch.position_ids is not None:
            arguments["position_ids"] = batch.position_ids
        if self._keeps_logits:
            logits_BCV = self.model(**arguments, logits_to_keep=batch.columns).logits
        else:
            logits_BCV = self.model(**arguments).logits.index_select(1, batch.columns)
        flat: Tensor = logits_BCV.flatten(0, 1)
        return flat.index_select(0, batch.picks).unsqueeze(0)


def _model_source(config: StudentConfig, data_dir: Path) -> str:
    """A directory, or the hub id. Raises StillhouseError(MODEL_NOT_FOUND) for a path where nothing is."""
    path = resolve(config.model, data_dir)
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path)
        raise _model_not_found(config, str(path), "has no config.json")
    if (
        path.is_absolute()
        or config.model.startswith(("./", "../", "~", "runs/"))
        or config.model.count("/") > 1
    ):
        raise _model_not_found(config, str(path), "is no directory on the trainer's host")
    return config.model


def _load_model(config: StudentConfig, data_dir: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    source = _model_source(config, data_dir)
    common: dict[str, Any] = {"revision": config.revision or None, "trust_remote_code": False}
    try:
        if config.from_config:
            settings = AutoConfig.from_pretrained(source, **common)
            return AutoModelForCausalLM.from_config(settings, dtype=dtype, trust_remote_code=False)
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, **common)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # loaders raise whatever their file formats raise
        problem = f"cannot be loaded as a causal language model from safetensors ({_first_line(error)})"
        raise _model_not_found(config, source, problem) from error


def _add_adapter(model: Any, config: LoraConfig) -> Any:
    import peft

    output = model.get_output_embeddings()
    linear = sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, each in model.named_modules()
            if isinstance(each, nn.Linear) and each is not output
        }
    )
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.target_modules) or linear,
        layers_to_transform=list(config.layers) or None,
        bias=config.bias,
        task_type="CAUSAL_LM",
    )
    try:
        return peft.get_peft_model(model, settings)
    except ValueError as error:
        names = ", ".join(config.target_modules) or "all linear layers"
        layers = f" of layers {list(config.layers)}" if config.layers else ""
        description = (
            f"{names}{layers}: nothing in this model fits. Its linear layers are {', '.join(linear)}."
        )
        raise StillhouseError(
            Reason.INVALID_SPEC,
            f"student.lora.target_modules: {description}",
            violations=[FieldViolation(field="student.lora.target_modules", description=description)],
        ) from error


def _model_not_found(config: StudentConfig, source: str, problem: str) -> StillhouseError:
    where = f"{config.model} ({source})" if source != config.model else source
    return StillhouseError(
        Reason.MODEL_NOT_FOUND,
        f"student.model {where} {problem}. Give a directory in Hugging Face layout with safetensors on the trainer's host, "
        "or the id of a model that this host can download.",
        resource=config.model,
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
