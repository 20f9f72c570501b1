"""Translates vLLM's errors to Stillhouse's: no type of vLLM leaves this room."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from stillhouse.protos.errors import Reason, StillhouseError


@contextmanager
def translated() -> Iterator[None]:
    """Raises a refused request as INVALID_REQUEST, and a dead engine as TEACHER_UNREACHABLE."""
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise engine_dead() from error
    except VLLMClientError as error:
        raise StillhouseError(
            Reason.INVALID_REQUEST, f"vLLM refuses the request: {first_line(error)}"
        ) from error


def engine_dead() -> StillhouseError:
    """Builds the error of an engine that does not recover."""
    return StillhouseError(
        Reason.TEACHER_UNREACHABLE,
        "vLLM has stopped: one of this teacher's processes ended. See its log, and start the teacher again.",
    )


def not_started(model: str, error: BaseException) -> StillhouseError:
    """Builds the error of a vLLM that does not start with this model or these settings."""
    return StillhouseError(
        Reason.INVALID_CONFIG,
        f"vLLM does not start with {model}: {first_line(error).rstrip('.')}. See the log above. "
        "--max-adapters 0 helps with models that take no adapters, and --engine hf with those that vLLM does not know.",
    )


def never_answered(model: str, quantization: str) -> StillhouseError:
    """Builds the error of an engine that started and ended at its first request."""
    remedy = (
        f"It is quantised by {quantization}, for which this build may have no kernel on this processor: take another method, "
        "or the model without quantisation."
        if quantization
        else "--engine hf serves it without vLLM."
    )
    return StillhouseError(
        Reason.INVALID_CONFIG,
        f"vLLM loads {model} and ends at its first request. See the log above. {remedy}",
    )


def first_line(error: BaseException) -> str:
    """First informative line of an error; pydantic puts it between a headline and the input."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if "validation error" not in lines[0] or len(lines) == 1:
        return lines[0]
    return (
        " ".join(lines[1:])
        .split(" [type=")[0]
        .removeprefix("Value error, ")
        .removeprefix("Assertion failed, ")
    )
