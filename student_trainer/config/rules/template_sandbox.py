"""The environment of templates over rows: a sandbox that also refuses single steps which would fill the host's memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Sized
from functools import wraps
from typing import Any

from jinja2 import StrictUndefined
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stillhouse.protos.tokenizers.bounded_rendering import MAX_RENDERED_CHARACTERS

MAX_NUMBER_BITS = 1 << 16
_WIDE = re.compile(r"%[-+ #0.]*(?:[0-9]{7}|\*)|:[^{}]*[0-9]{7}")
"""A width of seven digits in a format, or one that an argument of % says."""


class RowTemplateEnvironment(ImmutableSandboxedEnvironment):
    """No file, no attribute that starts with an underscore, no change of a value, no text that only its length makes large."""

    # Those are not computed when a template is compiled, where nothing bounds them.
    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined, keep_trailing_newline=True)
        for name in ("center", "indent", "format", "batch", "slice"):
            self.filters[name] = _bounded(self.filters[name])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Computes `left operator right`. Raises SecurityError for a result that is too large."""
        if operator == "%":
            _check_format(left)
        else:
            _check_size(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a function of a template. Raises SecurityError for a number that is too large for a width."""
        _check_arguments(*args, *kwargs.values())
        return super().call(context, function, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Returns the safe form of a text's own format, None for anything else. Raises SecurityError for a large width."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def checked(value: Any, *args: Any, **kwargs: Any) -> Any:
        _check_arguments(*args, *kwargs.values())
        if function.__name__ == "do_format":
            _check_format(value)
        return function(value, *args, **kwargs)

    return checked


def _check_arguments(*values: Any) -> None:
    for value in values:
        if isinstance(value, int) and value > MAX_RENDERED_CHARACTERS:
            raise SecurityError(f"it calls with a number above {MAX_RENDERED_CHARACTERS}")


def _check_format(text: Any) -> None:
    if isinstance(text, str) and _WIDE.search(text):
        raise SecurityError("it formats with a width of more than 999999, or one that an argument says")


def _check_size(operator: str, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = (
            left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
        )
        if bits > MAX_NUMBER_BITS:
            raise SecurityError(f"it computes a number of more than {MAX_NUMBER_BITS} bits")
    for sized, times in ((left, right), (right, left)):
        if (
            isinstance(sized, Sized)
            and isinstance(times, int)
            and len(sized) * times > MAX_RENDERED_CHARACTERS
        ):
            raise SecurityError(f"it repeats a text to more than {MAX_RENDERED_CHARACTERS} characters")
