"""Handlers of the page of teachers: what each serves, its present load, and a box to try a prompt."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from stillhouse.client.core.json_output import enum_name
from stillhouse.client.web.api.context import WebContext
from stillhouse.client.web.api.messages import check_names
from stillhouse.client.web.api.sessions import check_knows
from stillhouse.client.web.pages.failure import Failure, failure_of
from stillhouse.client.web.pages.rendering import render
from stillhouse.client.web.pages.text import duration, number
from stillhouse.client.web.pages.views import frame_of
from stillhouse.client.web.security.callers import Caller
from stillhouse.client.web.upstream import Service
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.teacher_pb2 import (
    Capability,
    ClientLoad,
    GetTeacherInfoRequest,
    GetTeacherInfoResponse,
)

INFO_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherSummary:
    """Values that the page shows of a teacher."""

    id: int
    """Number of the teacher, from 1."""
    target: str
    info: GetTeacherInfoResponse | None
    failure: Failure | None
    replicas: tuple[int, ...] = ()
    """Other teachers of this server that serve the same weights."""

    @property
    def title(self) -> str:
        """Its model, or its address."""
        return self.info.model if self.info is not None else self.target

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Names and values of the model, the engine and what they can."""
        info = self.info
        if info is None:
            return []
        names = [enum_name(Capability.DESCRIPTOR, each) or "" for each in info.capabilities]
        quantised = f", quantised by {info.quantization}" if info.quantization else ""
        facts = [
            ("Revision", info.revision),
            ("Engine and tier", info.engine),
            ("Type", f"{info.dtype}{quantised}"),
            ("Classes", ", ".join(info.class_names)),
            ("Vocabulary", f"{info.tokenizer_size:,} tokens, {info.vocab_size:,} with padding"),
            ("Longest sequence", f"{info.max_sequence_tokens:,} tokens"),
            ("Largest top-k", "" if info.num_classes else f"{info.max_top_k:,}"),
            ("Capabilities", ", ".join(each.lower().replace("_", " ") for each in names)),
            (
                "Replicas",
                f"teachers {', '.join(map(str, self.replicas))}" if self.replicas else "none known here",
            ),
            ("Fingerprint of the model", info.model_fingerprint),
            ("Fingerprint of its tokenizer", info.tokenizer_fingerprint),
            ("Version", info.service_version),
        ]
        return [(name, value) for name, value in facts if value]

    @property
    def load_facts(self) -> list[tuple[str, str]]:
        """Its present work; nothing if it tells none."""
        if self.info is None or not self.info.HasField("load"):
            return []
        load = self.info.load
        return [
            ("Waiting", f"{load.waiting:,} sequences and samples"),
            ("In the engine", f"{load.running:,}, {load.engine_used:.0%} of its capacity"),
            ("Tokens scored", f"{load.tokens_scored:,}"),
            ("Tokens generated", f"{load.tokens_generated:,}"),
            ("Up for", duration(load.uptime_s)),
        ]

    @property
    def clients(self) -> list[tuple[str, str, str, str]]:
        """Name, tokens scored and generated in a second, and waiting items of each client."""
        return [_client(each) for each in self.info.load.clients] if self.info is not None else []

    @property
    def window(self) -> str:
        """Time over which the rates are means."""
        return duration(self.info.load.window_s) if self.info is not None else ""

    @property
    def writes(self) -> bool:
        """True if prompts can be tried on it."""
        return self.info is not None and not self.info.num_classes


async def show_teachers(context: WebContext, request: Request) -> Response:
    """The page of teachers."""
    teachers = await _teachers(context, request)
    return render("teachers/page.html", **frame_of(context, request), teachers=teachers)


async def show_teacher_load(context: WebContext, request: Request) -> Response:
    """The part of the page that changes with the load."""
    return render("teachers/list.html", teachers=await _teachers(context, request))


async def _teachers(context: WebContext, request: Request) -> list[TeacherSummary]:
    check_names(request.query_params, ())
    caller = context.callers.of(request)
    await check_knows(context, caller)
    services = context.upstream.teachers
    answers = await asyncio.gather(*(_info(caller, each) for each in services))
    errors = [error for _, error in answers if error is not None]
    if (
        errors
        and all(each.reason == Reason.UNAUTHENTICATED for each in errors)
        and len(errors) == len(answers)
    ):
        raise errors[0]  # a browser is led to the sign-in
    same: dict[str, list[int]] = {}
    for place, (info, _) in enumerate(answers, 1):
        if info is not None:
            same.setdefault(info.model_fingerprint, []).append(place)
    return [
        TeacherSummary(
            id=place,
            target=service.target,
            info=info,
            failure=failure_of(error) if error is not None else None,
            replicas=tuple(each for each in same[info.model_fingerprint] if each != place) if info else (),
        )
        for place, (service, (info, error)) in enumerate(zip(services, answers, strict=True), 1)
    ]


async def _info(
    caller: Caller, service: Service
) -> tuple[GetTeacherInfoResponse | None, StillhouseError | None]:
    try:
        message = GetTeacherInfoRequest(load=True)
        return await caller.call(service, "GetTeacherInfo", message, timeout_s=INFO_TIMEOUT_S), None
    except StillhouseError as error:
        return None, error


def _client(load: ClientLoad) -> tuple[str, str, str, str]:
    kind, _, name = load.name.partition(":")
    shown = f"{name} ({kind})" if name else "others together"
    return shown, number(load.scored_per_s, 3), number(load.generated_per_s, 3), f"{load.waiting:,}"
