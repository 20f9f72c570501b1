"""Settings files of models, such as generation_config.json: each is a JSON object."""

from __future__ import annotations

import json
from pathlib import Path

GENERATION_SETTINGS = "generation_config.json"
_SHOWN_CHARS = 40


def wrong_settings(path: Path) -> str:
    """Returns the problem with a file that holds JSON of another kind, with its remedy, as the end of the sentence "the model …".

    Empty if there is none, and for files that are no JSON, which transformers leaves out.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return ""
    if isinstance(value, dict):
        return ""
    shown = json.dumps(value)
    shown = shown if len(shown) <= _SHOWN_CHARS else f"{shown[:_SHOWN_CHARS]}…"
    return (
        f"has a {path.name} that holds {shown}, not an object of settings; save that file again, or remove it"
    )
