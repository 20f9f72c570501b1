"""Sizes of the hidden states that a model of transformers gives, found by a trial."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def layer_sizes(config: Any, trial: Callable[[], Any]) -> tuple[int, int]:
    """Number of layers whose states a model gives, and their units; (0, 0) unless it gives one state before all layers and
    one after each, all of one width. `trial` computes a pass of four tokens with output_hidden_states."""
    num_layers = int(getattr(config, "num_hidden_layers", 0) or 0)
    try:
        with torch.inference_mode():
            states = getattr(trial(), "hidden_states", None)
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return 0, 0
    if not num_layers or states is None or len(states) != num_layers + 1:
        return 0, 0
    shapes = {tuple(each.shape) for each in states if each is not None}
    width = states[0].shape[-1]
    return (num_layers, int(width)) if shapes == {(1, 4, width)} else (0, 0)
