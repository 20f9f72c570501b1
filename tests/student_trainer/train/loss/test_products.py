"""Matmuls by oneDNN are those of torch, and are taken where the processor prefers them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from stillhouse.protos.telemetry.processor import Processor
from stillhouse.student_trainer.train.loss import products


@pytest.fixture(params=[True, False], ids=["onednn", "blas"])
def is_preferred(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Either library, whatever this processor prefers; operands of any size, in blocks of few rows."""
    monkeypatch.setattr(products, "_is_preferred", lambda: request.param)
    monkeypatch.setattr(products, "LEAST_TERMS", 1)
    monkeypatch.setattr(products, "BLOCK_ROWS", 3)
    monkeypatch.setattr(products, "BLOCK_ELEMENTS", 1)
    with torch.no_grad():
        yield bool(request.param)


def operands(*shapes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_products_are_those_of_torch(is_preferred: bool) -> None:
    left, right = operands((10, 7), (40, 7))
    assert products.uses_onednn(left, right) == is_preferred
    out = torch.empty(10, 40)
    products.multiply(left, right, out=out)
    torch.testing.assert_close(out, left @ right.T)
    back = torch.empty(10, 7)
    products.multiply(out, right.T, out=back)
    torch.testing.assert_close(back, out @ right)


def test_products_are_added_up(is_preferred: bool) -> None:
    left, right = operands((10, 40), (10, 7))
    out = torch.full((40, 7), torch.nan)
    products.add_product(left, right, out=out, overwrite=True)
    torch.testing.assert_close(out, left.T @ right)
    products.add_product(left, right, out=out, overwrite=False)
    torch.testing.assert_close(out, 2 * left.T @ right)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_torchs(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(products, "_is_preferred", lambda: True)
    left, right = (each.to(dtype) for each in operands((2000, 64), (64, 64)))
    assert not products.uses_onednn(left, right)
    assert products.uses_onednn(left.float(), right.float())


@pytest.mark.parametrize(
    ("vendor", "flags", "expected"),
    [
        ("AuthenticAMD", "avx2 avx512f", True),
        ("AuthenticAMD", "avx2", False),
        ("GenuineIntel", "avx2 avx512f", False),
        ("", "asimd", False),
    ],
)
def test_processors_that_prefer_onednn(vendor: str, flags: str, *, expected: bool) -> None:
    assert Processor(vendor=vendor, flags=frozenset(flags.split())).prefers_onednn == expected
