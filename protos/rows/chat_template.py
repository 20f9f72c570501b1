"""Chat templates as tokenizers have them: one or several by name, whose messages hold text, or lists of parts of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stillhouse.protos.rows.field_error import FieldError

STAND_IN = "\U000f5a17\U000f5a18"
"""Text that no row has, to find where a template puts what it is given."""

Message = Mapping[str, Any]


def select_template(template: Any, tools: Sequence[Message]) -> str:
    """Returns the source of a tokenizer's `template`: of several by name "tool_use" with tools, else "default", if they exist.

    Raises FieldError if none fits.
    """
    if isinstance(template, Mapping):
        wanted = ("tool_use", "default") if tools else ("default", "tool_use")
        names = [name for name in wanted if name in template] or list(template)
        if len(names) > 1 and names[0] not in wanted:
            raise FieldError(
                "messages",
                "needs a chat template named default or tool_use, and those of the tokenizer are named "
                f"{', '.join(template)}; rename one of them.",
            )
        template = template[names[0]] if names else None
    if not template:
        raise FieldError(
            "messages", "needs a chat template, which the tokenizer lacks; give prompt and completion."
        )
    return str(template)


class ContentForm:
    """The form in which one template takes a message's text, found by trying it once: text, or as of models that see images."""

    def __init__(self, render: Callable[[Sequence[Message]], str]) -> None:
        """`render` applies the template and may raise anything."""
        self._render = render
        self._takes_parts: bool | None = None

    def apply(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Returns the messages with their text in the template's form."""
        if self._takes_parts is None:
            question = {"role": "user", "content": STAND_IN}
            # Text leaves no trace in a template that loops over parts.
            self._takes_parts = not self._copies(question) and self._copies(_in_parts(question))
        return [dict(_in_parts(message) if self._takes_parts else message) for message in messages]

    def _copies(self, message: Message) -> bool:
        try:
            return STAND_IN in self._render([dict(message)])
        except Exception:  # a template is the model author's program
            return False


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    return (
        {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message
    )
