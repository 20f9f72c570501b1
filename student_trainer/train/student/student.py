"""The model that learns: loaded whole or with an adapter, asked only for the logits that a loss needs, and saved for others to use."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor, nn

from stillhouse.protos.errors import Reason, StillhouseError, first_line
from stillhouse.student_trainer.config.schema import StudentConfig
from stillhouse.student_trainer.train.batching.collate import MicroBatch
from stillhouse.student_trainer.train.student.loading import load_model, model_not_found, model_source

log = structlog.get_logger()


def load_tokenizer(config: StudentConfig, data_dir: Path) -> Any:
    """The student's tokenizer. Raises StillhouseError(MODEL_NOT_FOUND)."""
    from transformers import AutoTokenizer

    source = model_source(config, data_dir)
    try:
        return AutoTokenizer.from_pretrained(
            source, revision=config.revision or None, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise model_not_found(
            config, source, f"has no tokenizer that can be read ({first_line(error)})"
        ) from error


class Student:
    """A causal language model, the part of it that is trained, and its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, config: StudentConfig, data_dir: Path = Path()) -> None:
        self.model: nn.Module = model
        self.data_dir = data_dir
        """Where names such as "runs/..." lie."""
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
        frozen_in_half = config.trains_adapter and precision == "bf16"
        dtype = torch.bfloat16 if frozen_in_half else torch.float32
        model = load_model(config, data_dir, dtype, device)
        num_embeddings = model.get_input_embeddings().weight.shape[0]
        if num_embeddings < len(tokenizer):
            raise StillhouseError(
                Reason.TOKENIZER_INVALID,
                f"student.model {config.model} has {num_embeddings} embeddings, but its tokenizer knows {len(tokenizer)} "
                "tokens. Resize the embeddings, or give it the tokenizer that it was made with.",
            )
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        student = cls(model, tokenizer, config, data_dir)
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
