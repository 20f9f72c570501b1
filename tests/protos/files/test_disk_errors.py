"""Errors of a disk: full, over a size limit or broken, distinguished through the causes of an exception."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from stillhouse.protos.files.disk_errors import FULL, describe, is_broken, is_full, is_too_long
from stillhouse.student_trainer.disk_errors import full_sentence


def test_a_full_disk_is_recognised_below_other_errors() -> None:
    with pytest.raises(OSError, match="No space left") as caught, Path("/dev/full").open("wb", 0) as device:
        device.write(b"x")
    assert is_full(caught.value)
    outer = RuntimeError("torch wraps it")
    outer.__cause__ = caught.value
    assert is_full(outer)
    assert is_full(ValueError(f"I/O error: No space left on device (os error {errno.ENOSPC})"))
    assert not is_full(OSError(errno.ENOENT, "missing"))
    assert not is_broken(caught.value)


def test_a_size_limit_is_distinguished_from_a_full_disk() -> None:
    assert all(is_full(OSError(number, "")) for number in FULL)
    assert is_too_long(OSError(errno.EFBIG, ""))
    assert not is_too_long(OSError(errno.ENOSPC, ""))


def test_the_sentence_of_a_full_disk_names_the_disk_its_free_bytes_and_the_remedy(tmp_path: Path) -> None:
    run = tmp_path / "data" / "runs" / "a"
    run.mkdir(parents=True)
    assert "bytes free)" in describe(run / "not" / "there")
    sentence = full_sentence(run)
    assert str(run) in sentence
    assert "bytes free)" in sentence
    assert "checkpoint.keep" in sentence
