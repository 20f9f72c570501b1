"""Chat templates by name, for tokenizers that have none or another: `data.chat_template`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_ALPACA = (
    "{{ bos_token or '' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}"
    "{% else %}{{ 'Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\\n\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '### Response:\\n' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\\n\\n' if not loop.last else '' }}"
    "{% elif message['role'] != 'system' or not loop.first %}"
    "{{ raise_exception('alpaca has turns of system (the first), user and assistant, and no ' + message['role']) }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
NAMED: Mapping[str, str] = {"chatml": _CHATML, "alpaca": _ALPACA}
"""Name to template: ChatML of OpenAI, with <|im_start|> and <|im_end|>, and the prompt of Stanford's Alpaca."""
MAX_FILE_BYTES = 128 << 10
_NAME = re.compile(r"[A-Za-z][\w-]*")


def read_setting(path: Path) -> str:
    """Returns the text of a file with a template or tools. Raises OSError, or ValueError for one that is too long or no text."""
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
    return data.decode("utf-8-sig")


def is_file_name(template: str) -> bool:
    """Returns True for a setting that can only mean a file: neither a template's text nor a name."""
    return bool(template) and not any(each in template for each in "{\n") and not _NAME.fullmatch(template)


def template_source(own: Any, wanted: str) -> str:
    """Returns the template that `wanted`, its text or its name, means; `own` are the tokenizer's, by name if several.

    Raises ValueError with a sentence for a name that none has.
    """
    if not _NAME.fullmatch(wanted):
        return wanted
    names = {**NAMED, **(own if isinstance(own, Mapping) else {})}
    if wanted not in names:
        raise ValueError(
            f'data.chat_template is "{wanted}", which no template is called; there are {", ".join(names)}.'
        )
    return str(names[wanted])
