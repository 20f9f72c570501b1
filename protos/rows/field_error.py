"""The error of one field of a row, before a program adds the place of the row; it names values in JSON's words."""

from __future__ import annotations

import json

MAX_SHOWN_CHARS = 40


class FieldError(Exception):
    """A field whose value is not usable; each program turns it into a StillhouseError with the place of its row."""

    def __init__(self, field: str, problem: str) -> None:
        """`problem` continues a sentence that begins with `field`, and ends with the remedy."""
        super().__init__(f"{field} {problem}")
        self.field = field
        self.problem = problem


def kind_of(value: object) -> str:
    """Returns a value for a sentence: missing, the string "a", the number 3, true, an array, an object."""
    if value is None:
        return "missing"
    if isinstance(value, bool):
        return shown(value)
    if isinstance(value, str):
        return f"the string {shown(value)}"
    if isinstance(value, int | float):
        return f"the number {shown(value)}"
    if isinstance(value, list | tuple):
        return "an array"
    # Tables have values that JSON has not, such as dates.
    return "an object" if isinstance(value, dict) else f"of type {type(value).__name__}"


def shown(value: object) -> str:
    """Returns a value from a file as JSON, short enough for a sentence; an array or an object by its kind."""
    if isinstance(value, list | tuple | dict):
        return kind_of(value)
    cut = value[: MAX_SHOWN_CHARS + 1] if isinstance(value, str) else value
    text = json.dumps(cut, ensure_ascii=False, default=str)
    # Half of a surrogate pair could not be printed.
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}…"


def require_text(value: object, field: str) -> str:
    """Returns `value` if it is text. Raises FieldError."""
    if isinstance(value, str):
        return value
    # A number's own spelling is the text that was meant, mostly.
    is_short = isinstance(value, bool | int | float) and len(shown(value)) < MAX_SHOWN_CHARS
    example = f', such as "{shown(value)}"' if is_short else ""
    raise FieldError(field, f"is {kind_of(value)}, where text is needed. Write it as a string{example}.")


def require_unicode(text: str, field: str) -> str:
    """Returns `text` unless it holds half of a surrogate pair, which no tokenizer takes. Raises FieldError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise FieldError(
            field,
            f"has {half} without its other half: a pair such as \\ud83d\\ude00 is one character, half of it is none. "
            "Write both, or the character itself.",
        ) from error
    return text
