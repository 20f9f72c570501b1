"""The sandbox of all templates, of chats and of teachers' prompts: it also refuses what would fill the host's memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import wraps
from typing import Any

from jinja2 import Template
from jinja2.compiler import CodeGenerator, Frame, optimizeconst
from jinja2.exceptions import SecurityError
from jinja2.nodes import Concat
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stillhouse.protos.tokenizers.bounded_rendering import MAX_RENDERED_CHARACTERS

MAX_NUMBER_BITS = 1 << 16
_WIDE = re.compile(r"%[-+ #0.]*(?:[0-9]{7}|\*)|:[^{}]*[0-9]{7}")
"""A width of seven digits in a format, or one that an argument of % says."""
_TOO_LONG = f"it makes a text of more than {MAX_RENDERED_CHARACTERS} characters"


def bound_library(library: Any) -> None:
    """Has transformers' module of chat templates, `library`, compile them for BoundedEnvironment."""
    if library.ImmutableSandboxedEnvironment is not BoundedEnvironment:
        library.ImmutableSandboxedEnvironment = BoundedEnvironment
        library._compile_jinja_template.cache_clear()


class _BoundedTemplate(Template):
    def generate(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        return _bounded_pieces(super().generate(*args, **kwargs))


class _Generator(CodeGenerator):
    @optimizeconst
    def visit_Concat(self, node: Concat, frame: Frame) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super().visit_Concat(node, frame)
            return
        self.write("environment.concat(map(str, (")
        for each in node.nodes:
            self.visit(each, frame)
            self.write(", ")
        self.write(")))")


class _Filters(dict[str, Callable[..., Any]]):
    """Filters by name; those that may lengthen a text are bounded as they are added."""

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        if name in ("center", "indent", "format", "batch", "slice", "tojson", "wordwrap"):
            function = _bounded(function)
        elif name in ("replace", "join"):
            function = _bounded_method(name, function)
        super().__setitem__(name, function)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """No file, no attribute that starts with an underscore, no change of a value, no text that only its length makes large."""

    # Those are not computed when a template is compiled, where nothing bounds them.
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = _Generator
    template_class = _BoundedTemplate

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        filters, self.filters = self.filters, _Filters()
        for name, function in filters.items():
            self.filters[name] = function

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Joins the pieces of a text. Raises SecurityError for one that is too long."""
        return "".join(_bounded_pieces(pieces))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Computes `left operator right`. Raises SecurityError for a result that is too large."""
        if operator == "%":
            _check_format(left)
        else:
            _check_size(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a function of a template. Raises SecurityError for a number or a text that is too large."""
        _check_arguments(*args, *kwargs.values())
        text, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(text, str):
            _check_method(name, (text, *args))
        return super().call(context, function, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Returns the safe form of a text's own format, None for anything else. Raises SecurityError for a large width."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped


def _bounded_pieces(pieces: Iterable[str]) -> Iterator[str]:
    length = 0
    for each in pieces:
        length += len(each)
        if length > MAX_RENDERED_CHARACTERS:
            raise SecurityError(_TOO_LONG)
        yield each


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def checked(value: Any, *args: Any, **kwargs: Any) -> Any:
        _check_arguments(*args, *kwargs.values())
        if function.__name__ == "do_format":
            _check_format(value)
        return function(value, *args, **kwargs)

    return checked


def _bounded_method(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def checked(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        # The filter takes the joined values first, and the method of a text the separator.
        given = (*args, *kwargs.values())
        _check_method(name, (given[0] if given else "", value) if name == "join" else (value, *given))
        return function(context, value, *args, **kwargs)

    return checked


def _check_method(name: str, values: tuple[Any, ...]) -> None:
    """Raises SecurityError for a replacement or a joint of texts whose result is too long."""
    length = 0
    match name, values:
        case "replace", (str(text), str(old), str(new), *_):
            length = len(text) + text.count(old) * len(new)
        case "join", (str(between), list() | tuple() as parts):
            length = len(between) * len(parts) + sum(len(each) for each in parts if isinstance(each, str))
    if length > MAX_RENDERED_CHARACTERS:
        raise SecurityError(_TOO_LONG)


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
    if operator == "+":
        if (
            isinstance(left, Sized)
            and isinstance(right, Sized)
            and len(left) + len(right) > MAX_RENDERED_CHARACTERS
        ):
            raise SecurityError(_TOO_LONG)
        return
    for sized, times in ((left, right), (right, left)):
        if (
            isinstance(sized, Sized)
            and isinstance(times, int)
            and len(sized) * times > MAX_RENDERED_CHARACTERS
        ):
            raise SecurityError(f"it repeats a text to more than {MAX_RENDERED_CHARACTERS} characters")
