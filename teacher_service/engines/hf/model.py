"""Causal language model of transformers as two functions: tokens to hidden states, hidden states to logits."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.protos.errors import Reason, StillhouseError, first_line
from stillhouse.protos.library_errors import reported_as
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engine import Int32Array
from stillhouse.teacher_service.engines.hf import quantization
from stillhouse.teacher_service.engines.hf.layer_states import layer_sizes
from stillhouse.teacher_service.engines.hf.loading import load_causal_lm, require_causal
from stillhouse.teacher_service.engines.hf.sample_cache import SampleCache, cache_name
from stillhouse.teacher_service.models.files import is_quantised

_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names of a cap on logits in transformers' configurations."""
FALLBACK_SEQUENCE_TOKENS = 32768
"""Limit of a model whose configuration names none."""


class HfModel:
    """The loaded model. Each pass takes sequences of one length: nothing is padded."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model = model
        self.device = device
        probe = torch.arange(4, device=device).unsqueeze(0) % model.config.get_text_config().vocab_size
        with torch.inference_mode():
            logits = model(probe).logits
            self.vocab_size = int(logits.shape[-1])
            self.splits = self._head_explains(probe, logits)
            """True if logits are the output layer over the last hidden states; false for scaled or capped logits."""
        self.num_layers, self.hidden_size = layer_sizes(
            model.config.get_text_config(),
            lambda: self._pass([np.arange(4) % self.vocab_size], 4, None, states=True),
        )
        """Layers whose states it gives, and their units; 0 if it gives none."""
        self.cache_name = cache_name(model, self._logits)
        """Name of the cache that generation uses; empty if each token needs a pass over all before it."""

    @classmethod
    def load(cls, config: TeacherConfig, path: Path) -> HfModel:
        """Reads the safetensors of a directory; code that comes with a model is never run.

        Raises `StillhouseError` with MODEL_NOT_FOUND if transformers cannot load it, and INVALID_CONFIG if it cannot
        quantise it.
        """
        import transformers

        if not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype: Any = config.dtype
        if dtype == "auto" and device.type == "cpu":
            dtype = "float32"
        options: dict[str, Any] = {"dtype": dtype}
        quantised = bool(config.quantization) or is_quantised(path)
        if config.quantization:
            options["quantization_config"] = quantization.configuration(config.quantization, dtype)
        if quantised:
            options["device_map"] = {"": device}

        def refused(error: BaseException) -> StillhouseError:
            if config.quantization and isinstance(error, Exception):
                return quantization.refused(config.quantization, error)
            return StillhouseError(
                Reason.MODEL_NOT_FOUND,
                f"transformers cannot load a language model from {config.model}: {first_line(error)}",
            )

        with reported_as(refused):
            model = load_causal_lm(path, config.model, **options)
        if quantised:
            quantization.keep_layout(model)
        else:
            model = model.to(device)

        def fails(error: BaseException) -> StillhouseError:
            return StillhouseError(
                Reason.MODEL_NOT_FOUND,
                f"{config.model} loads, but cannot compute a pass over four tokens: {first_line(error)}. Save a configuration "
                "that fits the weights.",
            )

        with reported_as(fails):
            model.eval().requires_grad_(False)
            require_causal(model, config.model)
            return cls(model, device)

    @property
    def dtype(self) -> str:
        """Type of the weights, such as "float32"."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def max_sequence_tokens(self) -> int:
        """Positions that the model supports."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return int(limit or FALLBACK_SEQUENCE_TOKENS)

    def last_rows(self, sequences: list[Int32Array], keep: int, cache: SampleCache | None = None) -> Tensor:
        """[B, keep, H]: hidden states of the last `keep` tokens of sequences of one length.

        With a cache, the tokens continue those already in it. Where `splits` is false, H is the vocabulary.
        """
        output = self._pass(sequences, keep, cache)
        if cache is not None:
            cache.keep(output)
        return self._rows(output, keep)

    def rows_and_states(
        self, sequences: list[Int32Array], keep: int, layers: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """The rows of `last_rows`, and [B, keep, D, H], float32: states of the same tokens after `layers` layers."""
        output = self._pass(sequences, keep, None, states=True)
        rows_BTH = self._rows(output, keep)
        # The rows are what the output layer reads.
        last = rows_BTH if self.splits else output.hidden_states[-1][:, -keep:]
        states = [
            last if each == self.num_layers else output.hidden_states[each][:, -keep:] for each in layers
        ]
        return rows_BTH, torch.stack([each.float() for each in states], dim=2)

    def _pass(
        self, sequences: list[Any], keep: int, cache: SampleCache | None, *, states: bool = False
    ) -> Any:
        ids_BT = torch.from_numpy(np.stack(sequences).astype(np.int64)).to(self.device)
        options: dict[str, Any] = {"use_cache": False} if cache is None else cache.options()
        if states:
            options["output_hidden_states"] = True
        if self.splits:
            return self.model.base_model(ids_BT, **options)
        return self.model(ids_BT, logits_to_keep=keep, **options)

    def _rows(self, output: Any, keep: int) -> Tensor:
        rows: Tensor = output.last_hidden_state if self.splits else output.logits
        return rows[:, -keep:]

    def head(self, rows_TH: Tensor) -> Tensor:
        """[T, V]: logits of rows from `last_rows`."""
        return self._output_layer(rows_TH) if self.splits else rows_TH

    def _output_layer(self, rows_TH: Tensor) -> Tensor:
        layer = self.model.get_output_embeddings()
        if layer.weight.is_floating_point():  # a residual in float32 ends in a layer of another type
            rows_TH = rows_TH.to(layer.weight.dtype)
        logits_TV: Tensor = layer(rows_TH)
        return logits_TV

    def new_cache(self) -> SampleCache | None:
        """An empty cache for one sample; None where samples have none."""
        return SampleCache(self.cache_name) if self.cache_name else None

    def _logits(self, sequences: list[Int32Array], keep: int, cache: SampleCache | None) -> Tensor:
        """[B, keep, V]: logits after the last `keep` tokens of sequences."""
        return self.head(self.last_rows(sequences, keep, cache))

    def _head_explains(self, probe: Tensor, logits: Tensor) -> bool:
        output = self.model.get_output_embeddings()
        text_config = self.model.config.get_text_config()
        if output is None or self.model.base_model is self.model:
            return False
        if any(getattr(text_config, name, None) for name in _CAPS):
            return False  # a cap does not show in the small logits of some probes
        hidden = getattr(self.model.base_model(probe, use_cache=False), "last_hidden_state", None)
        if hidden is None or hidden.shape[-1] != output.weight.shape[-1]:
            return False
        return torch.allclose(self._output_layer(hidden).float(), logits.float(), rtol=1e-5, atol=1e-5)
