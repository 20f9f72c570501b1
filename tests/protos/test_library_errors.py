"""Errors of libraries: panics of Rust code are failures, interrupts are none, exhausted memory is found below other types."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.library_errors import is_failure, memory_cause, reported_as


def report(error: BaseException) -> StillhouseError:
    return StillhouseError(Reason.MODEL_NOT_FOUND, f"It is broken ({type(error).__name__}).")


class PanicException(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError("x"), PanicException("index out of bounds")])
def test_whatever_a_library_raises_is_reported(error: BaseException) -> None:
    with pytest.raises(StillhouseError, match="It is broken") as caught, reported_as(report):
        raise error
    assert caught.value.__cause__ is error
    assert is_failure(error)


def test_errors_of_the_catalog_and_interrupts_stay() -> None:
    for error in (StillhouseError(Reason.QUOTA, "Too much."), KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)) as caught, reported_as(report):
            raise error
        assert caught.value is error
    assert not is_failure(KeyboardInterrupt())
    with pytest.raises(StillhouseError, match="It is broken"), reported_as(report):
        Tokenizer.from_str("{}")


def test_exhausted_memory_is_found_below_other_errors() -> None:
    cause = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
    outer = ValueError("cannot load")
    outer.__cause__ = cause
    assert memory_cause(outer) is cause
    assert memory_cause(ValueError("memory format")) is None
    told = StillhouseError(Reason.OUT_OF_MEMORY, "The pass ran out of memory.")
    assert memory_cause(told) is told
    circle = ValueError("a")
    circle.__cause__ = circle
    assert memory_cause(circle) is None
