"""Routes of OpenAI's API: completions and chats, at once or as streams, and the models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from stillhouse.client.teacher.generate import Gathering, Piece
from stillhouse.client.teacher.tool_calls import Format
from stillhouse.client.web.api.context import WebContext
from stillhouse.client.web.api.messages import check_names, read_json
from stillhouse.client.web.openai.answers import Answer, Echo, Usage
from stillhouse.client.web.openai.ask import Ask, chat_ask, completion_ask, request_of
from stillhouse.client.web.openai.batches.handlers import BatchRoutes
from stillhouse.client.web.openai.errors import PREFIX, data_frame, error_frame, error_response
from stillhouse.client.web.openai.models import Models, named
from stillhouse.client.web.problems import JsonResponse
from stillhouse.client.web.security.callers import Caller
from stillhouse.client.web.streams.sse import EventStream
from stillhouse.client.web.teachers.calls import Room, TeacherCalls
from stillhouse.client.web.teachers.running import Running, unless_gone
from stillhouse.client.web.teachers.token_texts import Tokenizers, TokenTexts
from stillhouse.protos.errors import Reason, StillhouseError, from_status, to_status
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.protos.tensors.layout import encode

_END = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class OpenAi:
    """Handlers of the paths."""

    context: WebContext
    models: Models
    tokenizers: Tokenizers = field(default_factory=Tokenizers)
    running: Running = field(default_factory=Running)

    def routes(self) -> tuple[tuple[str, str, Callable[[Request], Awaitable[Response]]], ...]:
        """Method, path and handler of each route."""
        return (
            ("POST", f"{PREFIX}/completions", self.completions),
            ("POST", f"{PREFIX}/chat/completions", self.chats),
            ("GET", f"{PREFIX}/models", self.list_models),
            ("GET", f"{PREFIX}/models/{{model:path}}", self.get_model),
        )

    async def list_models(self, request: Request) -> Response:
        """The models of all teachers that answer, and their adapters."""
        check_names(request.query_params, ())
        found = await self.models.all(self.context.callers.of(request))
        return JsonResponse({"object": "list", "data": [self.models.document(each) for each in found]})

    async def get_model(self, request: Request) -> Response:
        """One of them."""
        check_names(request.query_params, ())
        found = await self.models.all(self.context.callers.of(request))
        return JsonResponse(self.models.document(named(found, request.path_params["model"])))

    async def completions(self, request: Request) -> Response:
        """Continues text or token ids."""
        return await self._answer(request, completion_ask)

    async def chats(self, request: Request) -> Response:
        """Continues a conversation, which the teacher renders with the model's chat template."""
        return await self._answer(request, chat_ask)

    async def _answer(self, request: Request, read: Callable[[dict[str, Any]], Ask]) -> Response:
        check_names(request.query_params, ())
        caller = self.context.callers.of(request)
        models = await self.models.all(caller)  # refuses a caller before its body is read
        values = await read_json(request)
        ask = await asyncio.to_thread(read, values)
        model = named(models, ask.model)
        model.check_top(ask.logprobs_field, ask.logprobs or 0)
        session = _Session(ask, TeacherCalls(caller=caller, model=model), self.tokenizers)
        if not ask.stream:
            with self.running.one(caller):
                return await unless_gone(request, session.whole())
        frames = self._frames(caller, session)
        first = await unless_gone(request, anext(frames))
        return EventStream(first, frames, error_frame)

    async def _frames(self, caller: Caller, session: _Session) -> AsyncGenerator[bytes, None]:
        with self.running.one(caller):
            async with aclosing(session.frames()) as frames:
                async for each in frames:
                    if self.context.is_over(caller):
                        raise StillhouseError(Reason.DRAINING, "This server is stopping.", retry_after_s=2.0)
                    yield each


class _Session:
    """One request for completions."""

    def __init__(self, ask: Ask, calls: TeacherCalls, tokenizers: Tokenizers) -> None:
        self._ask, self._calls, self._tokenizers = ask, calls, tokenizers
        self._room = Room()
        self._usage = Usage()
        self._echoes: list[Echo] = []
        self._texts: TokenTexts | None = None
        self._tool_format: Format | None = None

    async def whole(self) -> Response:
        """The response with all choices."""
        await self._prepare()
        gathering = Gathering()
        done: dict[tuple[int, int], Piece] = {}
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                self._room.take(len(piece.token_ids), self._ask.logprobs)
                if (completion := gathering.add(piece)) is not None:
                    done[completion.prompt_index, completion.sample_index] = completion
        return await asyncio.to_thread(self._whole, [done[key] for key in sorted(done)])

    def _whole(self, pieces: list[Piece]) -> Response:
        answer = self._answer()
        choices = [answer.choice(each, self._echo(each)) for each in pieces]
        return JsonResponse(answer.whole(choices, self._usage))

    def _answer(self) -> Answer:
        return Answer(self._ask, self._calls.model, self._texts, self._tool_format)

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """The events of the stream, up to its end."""
        await self._prepare()
        answer = self._answer()
        begun: set[tuple[int, int]] = set()
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                key = piece.prompt_index, piece.sample_index
                echo = None if key in begun else self._echo(piece)
                begun.add(key)
                yield data_frame(answer.part([answer.choice(piece, echo)]))
        if self._ask.include_usage:
            yield data_frame(answer.part([], self._usage))
        yield _END

    async def _prepare(self) -> None:
        """Reads and scores the prompts that are repeated, and gets the tokens' texts if they are shown."""
        ask, calls = self._ask, self._calls
        if ask.logprobs is not None or ask.echo or ask.has_tools:
            await self._read_tokenizer()
        if not ask.echo:
            return
        assert self._texts is not None
        ids = await calls.prompt_ids(ask.prompts)
        self._room.take(ask.n * sum(map(len, ids)), ask.logprobs)
        scored: list[Distributions | None] = [None] * len(ids)
        if ask.logprobs is not None:
            scored = await calls.score(ids, ask.logprobs)
        for at, (prompt, own) in enumerate(zip(ask.prompts, ids, strict=True)):
            self._usage.prompts[at] = len(own)
            plain = own.tolist()
            text = prompt.text if prompt.HasField("text") else self._texts.text(plain)
            self._echoes.append(Echo(text=text, token_ids=plain, rows=scored[at]))
            prompt.token_ids.CopyFrom(encode(own))

    async def _read_tokenizer(self) -> None:
        """Without its texts alone calls of tools are not found."""
        model, ask = self._calls.model, self._ask
        try:
            found = await self._tokenizers.of(self._calls.caller, model.service, model.info)
        except StillhouseError as error:
            if error.reason is not Reason.TOKENIZER_INVALID or ask.logprobs is not None or ask.echo:
                raise
        else:
            self._texts, self._tool_format = found.texts, found.tool_format

    async def _pieces(self) -> AsyncGenerator[Piece, None]:
        """The pieces of all choices; empty ones where only the prompt is asked for."""
        ask = self._ask
        if ask.max_tokens == 0:
            for index in range(len(ask.prompts) * ask.n):
                prompt, sample = divmod(index, ask.n)
                yield Piece(prompt_index=prompt, sample_index=sample, finish="length")
            return
        async with aclosing(
            self._calls.pieces(request_of(ask, self._calls.model.info.max_sequence_tokens))
        ) as pieces:
            async for piece in pieces:
                self._usage.add(piece)
                yield piece

    def _echo(self, piece: Piece) -> Echo | None:
        return self._echoes[piece.prompt_index] if self._echoes else None


def add_openai_routes(app: FastAPI, context: WebContext) -> BatchRoutes:
    """Adds every route; their errors have OpenAI's form. Returns what is to be closed.

    Raises StillhouseError(INVALID_REQUEST) if the folder of batches cannot be used.
    """
    models = Models(context.upstream)
    door, batches = OpenAi(context, models), BatchRoutes(context, models)
    for method, path, handle in (*door.routes(), *batches.routes()):
        app.add_api_route(
            path, _endpoint(handle), methods=[method], response_model=None, include_in_schema=False
        )
    return batches


def _endpoint(
    handle: Callable[[Request], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return await handle(request)
        except StillhouseError as error:
            return error_response(error)
        except Exception as error:
            return error_response(from_status(to_status(error)))  # a bug, which this logs

    return endpoint
