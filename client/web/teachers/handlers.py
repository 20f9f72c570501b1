"""Generate and Score over HTTP: a prompt continued as server-sent events, and a text's tokens with their distributions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from stillhouse.client.web.api.context import WebContext
from stillhouse.client.web.api.handlers import add_route
from stillhouse.client.web.api.messages import check_names, invalid, read_json
from stillhouse.client.web.api.routes import PREFIX
from stillhouse.client.web.problems import JsonResponse
from stillhouse.client.web.security.callers import Caller
from stillhouse.client.web.streams.sse import EventStream, json_frame
from stillhouse.client.web.teachers.ask import GenerateAsk, generate_ask, score_ask
from stillhouse.client.web.teachers.calls import Room, TeacherCalls
from stillhouse.client.web.teachers.documents import token_documents
from stillhouse.client.web.teachers.running import Running, unless_gone
from stillhouse.client.web.teachers.served import Served
from stillhouse.client.web.teachers.token_texts import Tokenizers, TokenTexts
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor

MAX_BODY_BYTES = 1 << 20
INFO_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class TeacherTrials:
    """Handlers of the paths."""

    context: WebContext
    tokenizers: Tokenizers = field(default_factory=Tokenizers)
    running: Running = field(default_factory=Running)

    async def generate(self, request: Request) -> Response:
        """Continues a prompt, as a stream of events."""
        caller, model = await self._open(request)
        ask = await asyncio.to_thread(generate_ask, await read_json(request, limit=MAX_BODY_BYTES))
        model = Served(id=model.id, service=model.service, info=model.info, adapter=ask.adapter)
        model.check_top("top_k", ask.top_k)
        frames = self._frames(TeacherCalls(caller=caller, model=model), ask)
        first = await unless_gone(request, anext(frames))
        return EventStream(first, frames)

    async def score(self, request: Request) -> Response:
        """Scores the tokens of a text."""
        caller, model = await self._open(request)
        ask = await asyncio.to_thread(score_ask, await read_json(request, limit=MAX_BODY_BYTES))
        model = Served(id=model.id, service=model.service, info=model.info, adapter=ask.adapter)
        model.check_top("top_k", ask.top_k)
        calls = TeacherCalls(caller=caller, model=model)

        async def work() -> Response:
            with self.running.one(caller):
                texts = await self._texts(calls)
                [ids] = await calls.prompt_ids([ask.prompt], "token_ids")
                if ask.start >= len(ids):
                    raise invalid(
                        "start",
                        f"it is {ask.start}, and the text has {len(ids)} tokens; give less, or more text.",
                    )
                Room().take(len(ids), ask.top_k)
                [rows] = await calls.score([ids], ask.top_k)
                assert rows is not None
                shown = rows.rows(ask.start - 1, rows.num_rows)
                listed = ids.tolist()
                tokens = await asyncio.to_thread(token_documents, texts, listed[ask.start :], shown)
                before = token_documents(texts, listed[: ask.start], None)
                return JsonResponse({"start": ask.start, "before": before, "tokens": tokens})

        return await unless_gone(request, work())

    async def _open(self, request: Request) -> tuple[Caller, Served]:
        """The caller, and the teacher's own model; refuses a caller before its body is read."""
        check_names(request.query_params, ())
        caller = self.context.callers.of(request)
        service = self.context.upstream.teacher(request.path_params["teacher"])
        message = teacher_pb2.GetTeacherInfoRequest()
        info = await caller.call(service, "GetTeacherInfo", message, timeout_s=INFO_TIMEOUT_S)
        if info.num_classes:
            raise StillhouseError(
                Reason.CAPABILITY,
                f"{info.model} is a classifier, which neither writes nor scores tokens. Ask another teacher.",
            )
        return caller, Served(id=info.model, service=service, info=info)

    async def _texts(self, calls: TeacherCalls) -> TokenTexts:
        model = calls.model
        return (await self.tokenizers.of(calls.caller, model.service, model.info)).texts

    async def _frames(self, calls: TeacherCalls, ask: GenerateAsk) -> AsyncGenerator[bytes, None]:
        """Events: `chunk` with new text and tokens of a sample, and `end` with the numbers of tokens."""
        request = teacher_pb2.GenerateRequest(
            prompts=[ask.prompt], sampling=ask.sampling, num_samples=ask.num_samples
        )
        request.distributions.top_k = ask.top_k
        request.distributions.logprob_dtype = Tensor.DATA_TYPE_FLOAT32
        room, prompt_tokens, generated = Room(), 0, 0
        with self.running.one(calls.caller):
            texts = await self._texts(calls)
            async with aclosing(calls.pieces(request)) as pieces:
                async for piece in pieces:
                    if self.context.is_over(calls.caller):
                        raise StillhouseError(Reason.DRAINING, "This server is stopping.", retry_after_s=2.0)
                    room.take(len(piece.token_ids), ask.top_k)
                    prompt_tokens = max(prompt_tokens, piece.prompt_tokens)
                    generated += len(piece.token_ids)
                    yield json_frame(
                        "chunk",
                        {
                            "sample_index": piece.sample_index,
                            "text": piece.text,
                            "tokens": token_documents(texts, piece.token_ids.tolist(), piece.distributions),
                            "finish_reason": piece.finish or None,
                        },
                    )
            yield json_frame("end", {"prompt_tokens": prompt_tokens, "generated_tokens": generated})


def add_teacher_routes(app: FastAPI, context: WebContext) -> None:
    """Adds both routes."""
    trials = TeacherTrials(context)
    handlers: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "generate": trials.generate,
        "score": trials.score,
    }
    for name, handle in handlers.items():
        add_route(app, "POST", f"{PREFIX}/teachers/{{teacher}}:{name}", handle)
