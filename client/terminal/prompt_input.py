"""Reads prompts and sequences from arguments, files and standard input; errors name file and line."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillhouse.client.core.errors import field_errors, file_error, file_errors, usage_error
from stillhouse.client.teacher.score import ScoreItem
from stillhouse.protos.rows.conversation import OPTIONS, parse_turns
from stillhouse.protos.rows.reading.strict_json import StrictJson

if TYPE_CHECKING:
    from stillhouse.client.teacher.generate import Prompt

MAX_TEXT_BYTES = 64 << 20


def read_text(path: str) -> str:
    """Reads a file, or standard input for "-". Raises StillhouseError if it cannot be read."""
    with file_errors("read", path):
        if path == "-":
            content = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
        else:
            with Path(path).open("rb") as file:
                content = file.read(MAX_TEXT_BYTES + 1)
    if len(content) > MAX_TEXT_BYTES:
        raise usage_error(f"{path} is larger than {MAX_TEXT_BYTES} bytes; split it.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise usage_error(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8.") from error


def text_prompts(arguments: Sequence[str], files: Sequence[str]) -> list[Prompt]:
    """Makes a prompt of each argument and of each complete file."""
    return [*arguments, *(read_text(path) for path in files)]


def chat_prompts(arguments: Sequence[str], files: Sequence[str]) -> list[Prompt]:
    """Makes a conversation of each argument, as a user's message; each file is JSON or JSON lines of conversations.

    A conversation is a list of messages, or an object with such a list as `messages`, and optionally `tools` and
    `chat_template_kwargs`.
    """
    prompts: list[Prompt] = [[{"role": "user", "content": each}] for each in arguments]
    for path in files:
        prompts += _conversations(read_text(path), path)
    return prompts


def _conversations(text: str, path: str) -> Iterator[Prompt]:
    decoder = StrictJson()
    try:
        parsed = decoder.parse(text)
    except ValueError:
        parsed = None
    if parsed is not None:
        _require_sound(decoder, path)
        yield _conversation(parsed, path)
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield _conversation(_json(line, f"{path}:{number}"), f"{path}:{number}")


def _conversation(value: object, where: str) -> Prompt:
    given = value if isinstance(value, Mapping) else {"messages": value}
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise usage_error(
            f'{where}: expects a list of messages, such as [{{"role": "user", "content": "Hello"}}].'
        )
    with field_errors(f"{where}: "):
        parse_turns(messages, given.get("tools"), given.get(OPTIONS))
    return {name: given[name] for name in ("messages", "tools", OPTIONS) if given.get(name)}


def score_items(path: str, adapter: str) -> Iterator[ScoreItem]:
    """Reads sequences from JSON lines {"token_ids": [...]}, with `id` (else the line's number), `start` and `adapter`.

    Streams its input, so that a pipe may be longer than memory.
    """
    try:
        with nullcontext(sys.stdin) if path == "-" else Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _score_item(_json(line, f"{path}:{number}"), f"{path}:{number}", number, adapter)
    except OSError as error:
        raise file_error("read", path, error) from error
    except UnicodeDecodeError as error:
        raise usage_error(f"{path} is not UTF-8; save it as UTF-8.") from error


def _score_item(value: Any, where: str, number: int, adapter: str) -> ScoreItem:
    if not isinstance(value, dict) or not isinstance(value.get("token_ids"), list):
        raise usage_error(f'{where}: expects an object such as {{"id": 1, "token_ids": [5, 9], "start": 1}}.')
    unknown = sorted(value.keys() - {"id", "token_ids", "start", "adapter"})
    if unknown:
        raise usage_error(
            f'{where}: there is no field "{unknown[0]}"; the fields are id, token_ids, start, adapter.'
        )
    ids, start = value["token_ids"], value.get("start", 1)
    name, own_adapter = value.get("id", number), value.get("adapter", adapter)
    if not all(isinstance(each, int) and not isinstance(each, bool) and abs(each) < 2**31 for each in ids):
        raise usage_error(f"{where}: token_ids expects whole numbers in [0, 2^31).")
    if not isinstance(start, int) or isinstance(start, bool) or not 0 <= start < 2**31:
        raise usage_error(f"{where}: start expects a whole number of at least 1, not {start!r}.")
    if not isinstance(name, str | int) or not isinstance(own_adapter, str):
        raise usage_error(f"{where}: id expects text or a whole number, and adapter expects text.")
    return ScoreItem(id=name, token_ids=ids, start=start, adapter=own_adapter)


def _json(line: str, where: str) -> Any:
    decoder = StrictJson()
    try:
        value = decoder.parse(line)
    except ValueError as error:
        raise usage_error(f"{where}: this line is not JSON: {error}.") from error
    _require_sound(decoder, where)
    return value


def _require_sound(decoder: StrictJson, where: str) -> None:
    if decoder.fault is not None:
        raise usage_error(f"{where}: {decoder.fault}")
