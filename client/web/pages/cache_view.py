"""Handler of the page of caches: those that runs name, with the contents of those that a run has built."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from starlette.requests import Request
from starlette.responses import Response

from stillhouse.client.trainer.cache_list import NamedCache
from stillhouse.client.trainer.run_lookup import run_id
from stillhouse.client.web.api.context import WebContext
from stillhouse.client.web.api.messages import check_names
from stillhouse.client.web.api.stored.caches import contents_of, find_caches
from stillhouse.client.web.pages.rendering import render
from stillhouse.client.web.pages.run_summary import RunSummary
from stillhouse.client.web.pages.text import number, size
from stillhouse.client.web.pages.views import frame_of
from stillhouse.client.web.security.callers import Caller
from stillhouse.protos.errors import Reason, StillhouseError

SHOWN_CACHES = 50
READ_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSummary:
    """Values that the page shows of a cache."""

    cache: NamedCache
    contents: Mapping[str, Any] | None
    """The summary of its build; None if there is none."""
    problem: str = ""
    """Reason for which it cannot be read."""

    @property
    def last(self) -> RunSummary:
        """The last run that names it."""
        return RunSummary(run=self.cache.last_run)

    @property
    def build_id(self) -> str:
        """Id of the run that built it; empty if there is none."""
        return run_id(self.cache.build.name) if self.cache.build is not None else ""

    @property
    def spec(self) -> Any:
        """Settings of the build, else of the last run."""
        return (self.cache.build or self.cache.last_run).effective_spec

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Rows, tokens and bytes of the whole."""
        return _totals(self.contents) if self.contents is not None else []

    @property
    def kinds(self) -> list[list[tuple[str, str]]]:
        """Facts of each kind of outputs in it."""
        found = self.contents.get("kinds") if self.contents is not None else None
        return [_kind(each) for each in found if isinstance(each, dict)] if isinstance(found, list) else []

    @property
    def damaged(self) -> list[str]:
        """Files that cannot be read, with their faults."""
        found = self.contents.get("broken") if self.contents is not None else None
        return [str(each.get("why", "")) for each in found or () if isinstance(each, dict)]


async def show_caches(context: WebContext, request: Request) -> Response:
    """The page of caches."""
    check_names(request.query_params, ())
    caller = context.callers.of(request)
    found, searched = await find_caches(context, caller)
    slots = asyncio.Semaphore(READ_AT_ONCE)
    shown = await asyncio.gather(*(_summary(context, caller, each, slots) for each in found[:SHOWN_CACHES]))
    return render(
        "teachers/caches.html",
        **frame_of(context, request),
        caches=shown,
        num_all=len(found),
        searched=searched,
    )


async def _summary(
    context: WebContext, caller: Caller, cache: NamedCache, slots: asyncio.Semaphore
) -> CacheSummary:
    if cache.build is None:
        return CacheSummary(cache=cache, contents=None)
    try:
        async with slots:
            contents = await contents_of(context, caller, run_id(cache.build.name))
    except StillhouseError as error:
        if error.reason in (Reason.ARTIFACT_NOT_FOUND, Reason.RUN_NOT_FOUND):
            return CacheSummary(cache=cache, contents=None)
        return CacheSummary(cache=cache, contents=None, problem=error.message)
    return CacheSummary(cache=cache, contents=contents)


def _totals(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    per_token, num_bytes = values.get("bytes_per_token"), values.get("bytes")
    facts = [
        ("Rows", _count(values.get("sequences"))),
        ("Tokens", _count(values.get("tokens"))),
        ("Size", size(int(num_bytes)) if _is_number(num_bytes) else ""),
        ("Bytes a token", number(float(per_token)) if _is_number(per_token) else ""),
    ]
    return [(name, value) for name, value in facts if value]


def _kind(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    temperatures, sampling = values.get("temperatures"), values.get("sampling")
    extras = [f"partition at temperature {each:g}" for each in temperatures or () if _is_number(each)]
    extras += [
        text
        for name, text in (
            ("entropy", "entropy"),
            ("held_out", "held-out text"),
            ("prompted", "behind prompts of the teacher alone"),
        )
        if values.get(name) is True
    ]
    if isinstance(sampling, dict):
        extras += [_sampling(name, value) for name, value in sampling.items()]
    facts = [
        ("Teacher", str(values.get("model") or "")),
        ("Adapter", str(values.get("adapter") or "")),
        ("Fingerprint of the teacher", str(values.get("teacher_fingerprint") or "")),
        ("Fingerprint of its tokenizer", str(values.get("tokenizer_fingerprint") or "")),
        (
            "Target form",
            f"top-{values.get('top_k')}, {values.get('logprob_dtype')}, {values.get('codec')}",
        ),
        ("Further values", ", ".join(extras)),
    ]
    return [(name, value) for name, value in facts if value] + _totals(values)


def _sampling(name: Any, value: Any) -> str:
    """A setting of draws, such as "num sampled tokens 192"; of a switch that is on its name alone."""
    words = str(name).replace("_", " ")
    return words if value is True else f"{words} {value}"


def _count(value: Any) -> str:
    return f"{int(value):,}" if _is_number(value) else ""


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63
