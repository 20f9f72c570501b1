"""Sequence classifier of transformers: whole sequences to logits over its classes."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.protos.errors import Reason, StillhouseError, first_line
from stillhouse.protos.files.weight_names import listed
from stillhouse.protos.library_errors import reported_as
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engine import Int32Array
from stillhouse.teacher_service.engines.hf.layer_states import layer_sizes

FALLBACK_SEQUENCE_TOKENS = 512
"""Limit of a model whose configuration and tokenizer name none."""


class ClassifierModel:
    """The loaded model. Each pass takes sequences of one length: nothing is padded."""

    def __init__(self, model: Any, device: torch.device, tokenizer_limit: int) -> None:
        """`tokenizer_limit` is the tokenizer's model_max_length."""
        self.model = model
        self.device = device
        self.vocab_size = int(model.get_input_embeddings().weight.shape[0])
        self.class_names: tuple[str, ...] = class_names(model.config)
        self._takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
        types = int(getattr(model.config, "type_vocab_size", 0) or 0)
        self.num_token_types = types if self._takes_types else 0
        """Segments that it tells apart."""
        limit = getattr(model.config, "max_position_embeddings", None) or FALLBACK_SEQUENCE_TOKENS
        self.max_sequence_tokens = min(int(limit), tokenizer_limit)
        self.num_layers, self.hidden_size = layer_sizes(
            model.config, lambda: self._pass([np.arange(4) % self.vocab_size], [None], states=True)
        )
        """Layers whose states it gives, and their units; 0 if it gives none."""

    @classmethod
    def load(
        cls, config: TeacherConfig, path: Path, tokenizer_limit: int, *, on_cpu: bool = False
    ) -> ClassifierModel:
        """Reads the safetensors of a directory; code that comes with a model is never run. `on_cpu` leaves a GPU free.

        Raises `StillhouseError`: MODEL_NOT_FOUND if transformers cannot load it, or it is no classifier of exclusive
        classes; INVALID_CONFIG for --quantization.
        """
        import transformers

        if config.quantization:
            raise StillhouseError(
                Reason.INVALID_CONFIG,
                f"--quantization is {config.quantization}, and {config.model} is a classifier, which is served in its own "
                "precision. Leave it out.",
            )
        if not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()
        device = torch.device("cuda" if torch.cuda.is_available() and not on_cpu else "cpu")
        dtype = "float32" if config.dtype == "auto" and device.type == "cpu" else config.dtype

        def refused(error: BaseException) -> StillhouseError:
            return _refused(config.model, f"cannot be loaded as a sequence classifier ({first_line(error)})")

        with reported_as(refused):
            model, found = transformers.AutoModelForSequenceClassification.from_pretrained(
                str(path),
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                dtype=dtype,
            )
        if found["missing_keys"]:
            raise _refused(
                config.model,
                f"lacks weights of a {type(model).__name__} in its files ({listed(found['missing_keys'])}), which would be random",
            )
        _require_exclusive(model.config, config.model)
        return cls(model.to(device).eval().requires_grad_(False), device, tokenizer_limit)

    @property
    def dtype(self) -> str:
        """Type of the weights, such as "float32"."""
        return str(self.model.dtype).removeprefix("torch.")

    def logits(
        self, sequences: list[Int32Array], types: list[Int32Array | None], layers: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """[B, C], float32: logits over the classes of sequences of one length; and with `layers` [B, T, D, H], float32: the
        states of all tokens after so many layers."""
        output = self._pass(sequences, types, states=bool(layers))
        states = None
        if layers:
            states = torch.stack([output.hidden_states[each].float() for each in layers], dim=2)
        return output.logits.float(), states

    def _pass(self, sequences: list[Any], types: Sequence[Int32Array | None], *, states: bool) -> Any:
        options: dict[str, Any] = {}
        if self._takes_types and any(each is not None for each in types):
            filled = [
                np.zeros(len(ids), np.int64) if own is None else own
                for ids, own in zip(sequences, types, strict=True)
            ]
            options["token_type_ids"] = self._tensor(filled)
        ids_BT = self._tensor(sequences)
        return self.model(
            input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), output_hidden_states=states, **options
        )

    def _tensor(self, rows: Any) -> Tensor:
        return torch.from_numpy(np.stack(rows).astype(np.int64)).to(self.device)


def class_names(config: Any) -> tuple[str, ...]:
    """Names of the classes of a configuration of transformers, by class."""
    return tuple(str(config.id2label[each]) for each in range(config.num_labels))


def _require_exclusive(config: Any, model: str) -> None:
    """Raises `StillhouseError` (MODEL_NOT_FOUND) unless the model's logits are those of a softmax over named classes."""
    kind = getattr(config, "problem_type", None)
    if kind not in (None, "single_label_classification") or config.num_labels < 2:
        raise _refused(
            model,
            f"has {config.num_labels} outputs of problem type {kind or 'regression'}, which are no distribution over classes",
        )
    names = class_names(config)
    if len(set(names)) < len(names):
        raise _refused(model, "gives two classes the same name in id2label")


def _refused(model: str, problem: str) -> StillhouseError:
    return StillhouseError(
        Reason.MODEL_NOT_FOUND,
        f"{model} {problem}. Give --model a sequence classifier in Hugging Face layout with safetensors, one label for each text.",
    )
