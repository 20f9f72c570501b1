"""Checkpoints of 4 bits in the layouts of AutoAWQ and GPTQ, and the same weights in full: rounded to the nearest, nothing calibrated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Layout = Literal["awq", "gptq"]
GROUP = 32
"""Inputs that share a scale."""
ZERO = 8
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of eight for each four bits of a word."""
CONFIGS: dict[Layout, dict[str, object]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
}


def quantised_copy(model: Path, layout: Layout, directory: Path) -> tuple[Path, Path]:
    """(checkpoint whose projections have 4 bits, checkpoint in float32 of what these bits mean)."""
    packed_dir, meant_dir = directory / layout, directory / f"{layout}-in-full"
    for copy in (packed_dir, meant_dir):
        shutil.copytree(model, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    packed, meant = {}, {}
    for name, weight in load_file(model / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            packed[name] = meant[name] = weight
            continue
        quants_IO, scales_GO = _rounded(weight.float().T)
        meant[name] = (quants_IO - ZERO).float().mul(scales_GO.float().repeat_interleave(GROUP, 0)).T
        parts = _awq(quants_IO) if layout == "awq" else _gptq(quants_IO)
        for part, value in {**parts, "scales": scales_GO}.items():
            packed[f"{name.removesuffix('weight')}{part}"] = value.contiguous()
    save_file(packed, packed_dir / "model.safetensors", metadata={"format": "pt"})
    save_file(
        {name: weight.contiguous() for name, weight in meant.items()},
        meant_dir / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((model / "config.json").read_text())
    (packed_dir / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIGS[layout]}))
    return packed_dir, meant_dir


def _rounded(weight_IO: Tensor) -> tuple[Tensor, Tensor]:
    """(whole numbers from 0 to 15 [I, O], scales FLOAT16 [I / GROUP, O])."""
    groups_NGO = weight_IO.unflatten(0, (-1, GROUP))
    scales_NO = (groups_NGO.abs().amax(dim=1) / 7).half()
    quants_NGO = (groups_NGO / scales_NO.float().unsqueeze(1)).round().add(ZERO).clamp(0, 15)
    return quants_NGO.flatten(0, 1).int(), scales_NO


def _packed(quants: Tensor, dim: int) -> Tensor:
    """Eight numbers of four bits to a word, along a dimension."""
    eights = quants.long().unflatten(dim, (-1, 8)).movedim(dim + 1, -1)
    words = (eights << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def _awq(quants_IO: Tensor) -> dict[str, Tensor]:
    def packed(quants: Tensor) -> Tensor:
        return _packed(quants.unflatten(1, (-1, 8))[:, :, list(AWQ_ORDER)].flatten(1), dim=1)

    zeros_GO = torch.full((len(quants_IO) // GROUP, quants_IO.shape[1]), ZERO)
    return {"qweight": packed(quants_IO), "qzeros": packed(zeros_GO)}


def _gptq(quants_IO: Tensor) -> dict[str, Tensor]:
    zeros_GO = torch.full((len(quants_IO) // GROUP, quants_IO.shape[1]), ZERO - 1)  # as the format has it
    return {
        "qweight": _packed(quants_IO, dim=0),
        "qzeros": _packed(zeros_GO, dim=1),
        "g_idx": torch.arange(len(quants_IO), dtype=torch.int32) // GROUP,
    }
