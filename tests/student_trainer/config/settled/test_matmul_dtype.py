"""The matmul dtype of a run on a CPU: a table of processors, and settled once, when the run is created."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stillhouse.protos.errors import StillhouseError
from stillhouse.student_trainer.config.proto import from_proto, to_proto
from stillhouse.student_trainer.config.schema import OptimizerConfig
from stillhouse.student_trainer.config.settled.matmul_dtype import Processor, matmul_dtype
from stillhouse.student_trainer.runs.api.spec_resolution import Host, resolve
from stillhouse.student_trainer.runs.supervision.device_slots import DeviceSlots
from tests.student_trainer.config.specs import SMALLEST, changed, spec_of

ZEN4 = ("AuthenticAMD", "avx2 avx512f avx512_bf16 avx512_vnni")
COOPER_LAKE = ("GenuineIntel", "avx2 avx512f avx512_bf16")
SAPPHIRE_RAPIDS = ("GenuineIntel", "avx512f avx512_bf16 avx512_fp16 amx_tile amx_bf16 amx_int8")
GRANITE_RAPIDS = ("GenuineIntel", "avx512f avx512_bf16 avx512_fp16 amx_tile amx_bf16 amx_fp16")
PROCESSORS = [
    (*SAPPHIRE_RAPIDS, "bfloat16", "bfloat16"),
    (*SAPPHIRE_RAPIDS, "float16", "float32"),
    (*GRANITE_RAPIDS, "bfloat16", "bfloat16"),
    (*GRANITE_RAPIDS, "float16", "float16"),
    (*ZEN4, "bfloat16", "bfloat16"),
    (*ZEN4, "float16", "float32"),
    (*COOPER_LAKE, "bfloat16", "float32"),
    (*COOPER_LAKE, "float16", "float32"),
    ("AuthenticAMD", "avx2 fma", "bfloat16", "float32"),
    ("GenuineIntel", "avx2 avx512f", "bfloat16", "float32"),
    ("", "asimd sve bf16 i8mm", "bfloat16", "bfloat16"),
    ("", "asimd fphp asimdhp bf16", "float16", "float32"),
    ("", "asimd", "bfloat16", "float32"),
    ("", "", "bfloat16", "float32"),
    (*SAPPHIRE_RAPIDS, "float32", "float32"),
]


def processor(vendor: str, flags: str) -> Processor:
    return Processor(vendor=vendor, flags=frozenset(flags.split()))


@pytest.mark.parametrize(("vendor", "flags", "dtype", "expected"), PROCESSORS)
def test_a_processor_computes_in_the_type_of_the_table(
    vendor: str, flags: str, dtype: str, expected: str
) -> None:
    assert matmul_dtype(dtype, processor(vendor, flags)) == expected


def test_a_processor_is_read_from_cpuinfo(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    one = "processor\t: {}\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu {}\nbugs\t\t: spectre\n\n"
    path.write_text(one.format(0, "avx512_bf16") + one.format(1, "amx_bf16"))
    assert Processor.read(path) == processor("AuthenticAMD", "fpu avx512_bf16")
    path.write_text("processor\t: 0\nFeatures\t: fp asimd bf16\nCPU implementer\t: 0x41\n")
    assert Processor.read(path) == processor("", "fp asimd bf16")
    for text in ("", "\n\n", "no label\n", "flags\n"):
        path.write_text(text)
        assert Processor.read(path) == Processor()
    assert Processor.read(tmp_path / "none") == Processor()


def resolved(
    tmp_path: Path, on: Processor, *, gpus: tuple[int, ...] = (), **optimizer: Any
) -> OptimizerConfig:
    """The optimizer's settings as a service on a host with this processor settles them."""
    host = Host(
        data_dir=tmp_path / "data",
        roots=(tmp_path,),
        slots=DeviceSlots(gpus=gpus, cpu_slots=1),
        find_dataset=lambda _: None,
        find_webhook_host=str,
        tracker_problem=lambda _: None,
        processor=on,
    )
    (tmp_path / "rows.jsonl").write_text("{}\n")
    data = {"train": [{"path": str(tmp_path / "rows.jsonl")}]}
    config = from_proto(spec_of({**SMALLEST, "data": data, "optimizer": optimizer}))
    found = resolve(config, host).config
    again = from_proto(to_proto(found))
    assert again == found
    # Another service does not choose again.
    assert resolve(again, replace(host, processor=Processor())).config == found
    return found.optimizer


def test_a_run_gets_its_type_when_it_is_created(tmp_path: Path) -> None:
    fast, slow = processor(*ZEN4), processor(*COOPER_LAKE)
    assert resolved(tmp_path, fast, precision="bf16").matmul_dtype == "bfloat16"
    assert resolved(tmp_path, slow, precision="bf16").matmul_dtype == "float32"
    assert resolved(tmp_path, fast).matmul_dtype == "float32"
    for value in ("float32", "bfloat16"):
        for on in (fast, slow):
            chosen = resolved(tmp_path, on, precision="bf16", matmul_dtype=value).matmul_dtype
            assert chosen == value


def test_a_gpu_has_no_use_for_the_setting(tmp_path: Path) -> None:
    fast = processor(*ZEN4)
    assert resolved(tmp_path, fast, gpus=(0,)).matmul_dtype is None
    assert resolved(tmp_path, fast, gpus=(0,), matmul_dtype="float32").matmul_dtype is None


def test_another_type_is_refused() -> None:
    with pytest.raises(StillhouseError) as caught:
        from_proto(changed("optimizer.matmul_dtype", "float16"))
    assert [each.field for each in caught.value.violations] == ["optimizer.matmul_dtype"]
