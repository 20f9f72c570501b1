"""The reasons with which services say that a text was cut before its end."""

from __future__ import annotations

CUT_SHORT = frozenset(
    {
        "length",
        "max_tokens",
        "max_output_tokens",
        "model_length",
        "content_filter",
        "abort",
        "cancelled",
        "error",
        "timeout",
    }
)
"""Values of a row's finish_reason with which a text has no end, in small letters."""
_PREFIX = "finish_reason_"
"""Of the names that protocol buffers give them."""


def is_cut_short(finish_reason: object) -> bool:
    """Returns True if a text was cut when it was generated: its last token is no end."""
    return isinstance(finish_reason, str) and finish_reason.lower().removeprefix(_PREFIX) in CUT_SHORT
