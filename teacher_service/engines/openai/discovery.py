"""Kind of the upstream server and the models that it lists: the base that requests name, and adapters of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import structlog

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.settings import bad_setting
from stillhouse.teacher_service.engines.openai.http_client import HttpClient, UpstreamRefusalError
from stillhouse.teacher_service.engines.openai.rows import fields, items

Kind = Literal["vllm", "sglang", "other"]

MAX_MODELS = 1000
MAX_NAME_CHARS = 512
_SGLANG_RESERVE = 6
"""Tokens below its context at which SGLang refuses a prompt, where it does not tell that length."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedModel:
    """Entry of the server's list of models."""

    name: str
    root: str
    """The path that the server loaded it from; empty if it does not tell."""
    parent: str
    """Name of its base, if it is an adapter."""
    max_tokens: int
    """Longest sequence; 0 if it does not tell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """An upstream server."""

    kind: Kind
    version: str
    """Empty if it does not tell."""
    base: ListedModel
    adapters: tuple[ListedModel, ...]
    max_sequence_tokens: int
    """0 if it does not tell."""


async def discover(client: HttpClient, model: str) -> Server:
    """Asks the server what it is; `model` names one of its models, or none if it has a single base.

    Raises:
        StillhouseError: INVALID_CONFIG for a model that it does not list, or several; as `HttpClient.get`.
    """
    listed = await list_models(client)
    base = _base(listed, model)
    names = {base.name} | {
        each.name for each in listed if not each.parent and base.root and each.root == base.root
    }
    adapters = tuple(each for each in listed if each.parent in names and each.name not in names)
    native = await _optional(client, "/get_model_info") or await _optional(client, "/model_info")
    if isinstance(native, dict) and "model_path" in native:
        told = await _optional(client, "/get_server_info") or await _optional(client, "/server_info")
        server = told if isinstance(told, dict) else {}
        refused = _count(server.get("max_req_input_len")) or base.max_tokens - _SGLANG_RESERVE
        return Server(
            kind="sglang",
            version=_text(server.get("version")),
            base=base,
            adapters=adapters,
            max_sequence_tokens=max(0, refused - 1),
        )
    told = await _optional(client, "/version")
    version = _text(told.get("version")) if isinstance(told, dict) else ""
    return Server(
        kind="vllm" if version else "other",
        version=version,
        base=base,
        adapters=adapters,
        max_sequence_tokens=base.max_tokens,
    )


async def list_models(client: HttpClient, *, timeout_s: float | None = None) -> list[ListedModel]:
    """The models that the server lists. Raises `StillhouseError` as `HttpClient.get`."""
    answer = fields(await client.get("/v1/models", timeout_s=timeout_s))
    found = []
    for each in items(answer.get("data"), most=MAX_MODELS):
        card = fields(each)
        name = _text(card.get("id"))
        if name:
            found.append(
                ListedModel(
                    name=name,
                    root=_text(card.get("root")),
                    parent=_text(card.get("parent")),
                    max_tokens=_count(card.get("max_model_len")),
                )
            )
    return found


def output_rows(directory: Path) -> int:
    """Rows of the output layer in a model's config.json; 0 without one."""
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return 0
    for section in (config, config.get("text_config") if isinstance(config, dict) else None):
        if isinstance(section, dict) and (size := _count(section.get("vocab_size"))):
            return size
    return 0


def _base(listed: list[ListedModel], model: str) -> ListedModel:
    bases = [each for each in listed if not each.parent]
    if model:
        named = [each for each in listed if each.name == model]
        if not named:
            raise bad_setting(
                "--model", model, f"The upstream server has no model of this name; it lists {_names(listed)}."
            )
        return named[0]
    if not bases:
        raise StillhouseError(
            Reason.INVALID_CONFIG,
            "The upstream server lists no model. Name it by --model, or wait until it has loaded it.",
        )
    if len({each.root or each.name for each in bases}) > 1:
        raise StillhouseError(
            Reason.INVALID_CONFIG,
            f"The upstream server lists {len(bases)} models ({_names(bases)}). Choose one by --model.",
        )
    return bases[0]


def _names(listed: list[ListedModel]) -> str:
    shown = ", ".join(each.name[:80] for each in listed[:8])
    return f"{shown} and {len(listed) - 8} more" if len(listed) > 8 else shown or "none"


async def _optional(client: HttpClient, path: str) -> Any:
    """The JSON at a path that the server may lack, else None."""
    try:
        return await client.get(path)
    except UpstreamRefusalError:
        return None
    except StillhouseError as error:
        if error.reason is not Reason.TENSOR_INVALID:  # another server's page under this name
            raise
        return None


def _text(value: Any) -> str:
    """A short printable text, else an empty one."""
    return value if isinstance(value, str) and len(value) <= MAX_NAME_CHARS and value.isprintable() else ""


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31 else 0
