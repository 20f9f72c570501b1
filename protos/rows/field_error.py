"""The error of one field of a row, before a program adds the place of the row."""

from __future__ import annotations

MAX_SHOWN_CHARS = 40


class FieldError(Exception):
    """A field whose value is not usable; each program turns it into a StillhouseError with the place of its row."""

    def __init__(self, field: str, problem: str) -> None:
        """`problem` continues a sentence that begins with `field`, and ends with the remedy."""
        super().__init__(f"{field} {problem}")
        self.field = field
        self.problem = problem


def kind_of(value: object) -> str:
    """Returns the type of a value in words, for errors."""
    return "missing" if value is None else f"a {type(value).__name__}"


def shown(name: object) -> str:
    """Returns a name from a file, short enough for a sentence."""
    return repr(name)[:MAX_SHOWN_CHARS]


def require_unicode(text: str, field: str) -> str:
    """Returns `text` unless it holds half of a surrogate pair, which no tokenizer takes. Raises FieldError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FieldError(
            field, f"has text that is not Unicode: {error}. Write whole characters, not half of a pair."
        ) from error
    return text
