"""Checked fields of a request's body; one that would change the answer and is not served is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stillhouse.client.core.errors import field_errors
from stillhouse.client.web.api.messages import invalid
from stillhouse.protos.rows.field_error import kind_of, require_unicode, shown

WITHOUT_EFFECT = frozenset(
    {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
"""Fields that never change an answer."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "functions": ([],),
    "function_call": ("auto", "none"),
}
"""Fields that are taken at these values alone, at which they change nothing."""


class Body:
    """The fields of a body, each taken once; null is the same as absent."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._left = {name: value for name, value in values.items() if value is not None}

    def take(self, name: str, default: Any = None) -> Any:
        """The value of a field, as it is."""
        return self._left.pop(name, default)

    def integer(self, name: str, *, least: int, most: int) -> int | None:
        """A whole number in [least, most]. Raises StillhouseError(INVALID_REQUEST)."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise invalid(name, f"it is {shown(value)}; give a whole number in [{least}, {most}].")
        return value

    def number(self, name: str, *, least: float, most: float) -> float | None:
        """A number in [least, most]. Raises StillhouseError(INVALID_REQUEST)."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise invalid(name, f"it is {shown(value)}; give a number in [{least:g}, {most:g}].")
        return float(value)

    def boolean(self, name: str) -> bool:
        """True or false; false if absent. Raises StillhouseError(INVALID_REQUEST)."""
        value = self.take(name, default=False)
        if not isinstance(value, bool):
            raise invalid(name, f"it is {shown(value)}; give true or false.")
        return value

    def text(self, name: str, *, most: int) -> str:
        """Text of at most `most` characters, which must be there. Raises StillhouseError(INVALID_REQUEST)."""
        value = self.take(name)
        if not isinstance(value, str) or not 0 < len(value) <= most:
            raise invalid(name, f"it is {shown(value)}; give text of 1 to {most} characters.")
        return unicode_text(value, name)

    def end(self) -> None:
        """Raises StillhouseError(INVALID_REQUEST) for a field that nobody took and that may change the answer."""
        for name, value in self._left.items():
            if name in WITHOUT_EFFECT:
                continue
            if name not in NEUTRAL:
                raise invalid(name[:80], "there is no such field here; leave it out.")
            if not any(_same(value, each) for each in NEUTRAL[name]):
                only = " or ".join(shown(each) for each in NEUTRAL[name])
                raise invalid(name, f"it is {shown(value)}, and only {only} is served; leave it out.")


def unicode_text(value: Any, name: str) -> str:
    """Checks that a value is text of whole characters. Raises StillhouseError(INVALID_REQUEST)."""
    if not isinstance(value, str):
        raise invalid(name, f"it is {kind_of(value)}; give text.")
    with field_errors():
        require_unicode(value, name)
    return value


def _same(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)
