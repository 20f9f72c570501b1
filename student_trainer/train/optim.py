"""The optimizer, and the learning rate as a function of the step alone, so that it needs no state of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from stillhouse.student_trainer.config.checks import invalid_field
from stillhouse.student_trainer.config.schema import OptimizerConfig

SGD_MOMENTUM = 0.9


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of `config` over `parameters`.

    Weight decay leaves out biases and the weights of norms (all that have one axis): shrinking them limits no
    capacity and moves the scale of activations. adamw decays weights directly, adam and sgd by an L2 gradient.
    """
    decayed = [each for each in parameters.values() if each.ndim > 1]
    plain = [each for each in parameters.values() if each.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((decayed, config.weight_decay), (plain, 0.0))
        if group
    ]
    match config.name:
        case "adamw":
            return torch.optim.AdamW(groups, lr=config.learning_rate, fused=_is_fused(parameters))
        case "adam":
            return torch.optim.Adam(groups, lr=config.learning_rate, fused=_is_fused(parameters))
        case "sgd":
            return torch.optim.SGD(groups, lr=config.learning_rate, momentum=SGD_MOMENTUM)
        case "adamw_8bit" | "paged_adamw_8bit":
            return _make_8bit(groups, config)
        case _:
            raise ValueError(f"optimizer.name {config.name} is not known")


def _is_fused(parameters: Mapping[str, nn.Parameter]) -> bool | None:
    """True on a CPU, where torch by itself passes over a weight once for each of an update's operations; None leaves it to torch."""
    return all(each.device.type == "cpu" for each in parameters.values()) or None


def _make_8bit(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW whose moments are held in 8 bits, by bitsandbytes; small tensors keep 32.

    Raises StillhouseError(INVALID_SPEC) for paged moments on a CPU, which has nothing to page out of.
    """
    import bitsandbytes

    on_cpu = all(each.device.type == "cpu" for group in groups for each in group["params"])
    if config.name == "paged_adamw_8bit" and on_cpu:
        description = '"paged_adamw_8bit" moves its moments between GPU and host, and this process has no GPU; use "adamw_8bit".'
        raise invalid_field("optimizer.name", description)
    make = bitsandbytes.optim.AdamW8bit if config.name == "adamw_8bit" else bitsandbytes.optim.PagedAdamW8bit
    optimizer: torch.optim.Optimizer = make(groups, lr=config.learning_rate)
    return optimizer


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """The learning rate of step `step` (from 0): a linear rise over the warm-up, then the shape of `lr_scheduler`.

    The rise ends at the peak with its last step; cosine and linear fall towards 0, which they would reach one step
    behind the last.
    """
    num_warmup = round(config.warmup_fraction * total_steps)
    if step < num_warmup:
        return config.learning_rate * (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, total_steps - num_warmup)
    match config.lr_scheduler:
        case "cosine":
            return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return config.learning_rate * (1 - progress)
        case "constant":
            return config.learning_rate
        case _:
            raise ValueError(
                f"optimizer.lr_scheduler {config.lr_scheduler} is not one of cosine, linear, constant"
            )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Sets it for all groups."""
    for group in optimizer.param_groups:
        group["lr"] = value


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """The norm of all gradients together, before they are scaled down to `max_norm`; 0 does not scale."""
    limit = max_norm if max_norm > 0 else math.inf
    return float(torch.nn.utils.clip_grad_norm_(list(parameters), limit))
