"""TeacherService over gRPC: each rpc delegates to a session on the loaded teacher."""

# ruff: noqa: ARG002 - the generated base class fixes the arguments of every rpc

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import structlog

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rpc.channel import FLUSH_BYTES
from stillhouse.protos.rpc.client_identity import client_of
from stillhouse.protos.stillhouse.v1 import teacher_pb2, teacher_pb2_grpc
from stillhouse.teacher_service.adapters.registry import AdapterRegistry
from stillhouse.teacher_service.adapters.upload_store import UploadStore
from stillhouse.teacher_service.admission.fair_queue import Capacity
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engine import Engine, LoadedAdapter
from stillhouse.teacher_service.models.tokenizer import TextCodec
from stillhouse.teacher_service.rpc.generate import GenerateSession
from stillhouse.teacher_service.rpc.load import load_of
from stillhouse.teacher_service.rpc.score import ScoreSession
from stillhouse.teacher_service.rpc.score_validation import all_capabilities, require
from stillhouse.teacher_service.rpc.service_state import Counters, ServiceState

LOADING_RETRY_S = 5.0
LIMITED = frozenset({"/stillhouse.v1.TeacherService/Score", "/stillhouse.v1.TeacherService/Generate"})
"""Rpcs under --max-calls; the others answer at once."""
BATCHES_INSIDE = 8
"""Engine batches in flight: three quarters of them, the share of a single client, still keep the engine busy."""

log = structlog.get_logger(__name__)


class TeacherServicer(teacher_pb2_grpc.TeacherServiceServicer):
    """The rpcs of one teacher. Until `serve` is called every rpc is answered with TEACHER_LOADING."""

    def __init__(self, config: TeacherConfig) -> None:
        self._config = config
        self.serving: ServiceState | None = None
        """State of the loaded teacher; None while the model loads."""
        self.counters = Counters()
        """Totals since the start, for logs and tests."""

    def serve(self, engine: Engine, codec: TextCodec, adapters: AdapterRegistry) -> None:
        """Starts to serve calls with this engine."""
        self.serving = ServiceState(
            config=self._config,
            engine=engine,
            info=engine.info,
            codec=codec,
            adapters=adapters,
            uploads=UploadStore(self._config.upload_directory, max_bytes=self._config.max_upload_bytes),
            counters=self.counters,
            capacity=Capacity(
                max_tokens=self._config.max_inflight_tokens or BATCHES_INSIDE * engine.info.batch_tokens,
                max_samples=engine.info.max_running_samples,
            ),
        )

    async def drain(self) -> None:
        """Stops reading requests; each call ends once all it has read is answered."""
        if self.serving is not None:
            self.serving.draining.set()

    async def GetTeacherInfo(
        self, request: teacher_pb2.GetTeacherInfoRequest, context: Any
    ) -> teacher_pb2.GetTeacherInfoResponse:
        """Describes the loaded model, its limits and its adapters."""
        serving = self._ready()
        info, codec, config = serving.info, serving.codec, serving.config
        return teacher_pb2.GetTeacherInfoResponse(
            model=info.model,
            revision=info.revision,
            model_fingerprint=info.model_fingerprint,
            tokenizer_fingerprint=codec.tokenizer_fingerprint,
            chat_template_fingerprint=codec.chat_template_fingerprint,
            tokenizer_size=info.tokenizer_size,
            vocab_size=info.vocab_size,
            max_sequence_tokens=info.max_sequence_tokens,
            max_top_k=info.max_top_k,
            max_query_tokens=info.max_query_tokens,
            max_inflight_sequences=config.max_inflight_sequences,
            max_prompts=config.max_prompts,
            adapters=[_adapter(each) for each in serving.adapters.adapters()],
            capabilities=[teacher_pb2.Capability.ValueType(each) for each in sorted(all_capabilities(info))],
            engine=info.engine,
            dtype=info.dtype,
            quantization=info.quantization,
            eos_token_ids=info.eos_token_ids,
            service_version=_own_version(),
            max_adapters=info.max_adapters,
            num_classes=len(info.class_names),
            class_names=info.class_names,
            num_token_types=info.num_token_types,
            num_layers=info.num_layers,
            hidden_size=info.hidden_size,
            load=load_of(serving, client_of(context)) if request.load else None,
        )

    async def GetTokenizer(
        self, request: teacher_pb2.GetTokenizerRequest, context: Any
    ) -> AsyncIterator[teacher_pb2.GetTokenizerResponse]:
        """Streams the tokenizer's files, in chunks."""
        files = await asyncio.to_thread(lambda: list(self._ready().codec.files()))
        for name, data in files:
            for begin in range(0, max(1, len(data)), FLUSH_BYTES):
                yield teacher_pb2.GetTokenizerResponse(
                    file_name=name if begin == 0 else "", data=data[begin : begin + FLUSH_BYTES]
                )

    async def Score(
        self, request_iterator: AsyncIterator[teacher_pb2.ScoreRequest], context: Any
    ) -> AsyncGenerator[teacher_pb2.ScoreResponse, None]:
        """Computes distributions of given sequences."""
        session = ScoreSession(self._ready(), aiter(request_iterator), client=client_of(context))
        async with aclosing(session.responses()) as responses:
            async for response in responses:
                yield response

    async def Generate(
        self, request: teacher_pb2.GenerateRequest, context: Any
    ) -> AsyncGenerator[teacher_pb2.GenerateResponse, None]:
        """Streams samples as they are generated."""
        session = GenerateSession(self._ready(), request, client=client_of(context))
        async with aclosing(session.responses()) as responses:
            async for response in responses:
                yield response

    async def UploadAdapter(
        self, request_iterator: AsyncIterator[teacher_pb2.UploadAdapterRequest], context: Any
    ) -> teacher_pb2.UploadAdapterResponse:
        """Stores an adapter on this host, under a path that LoadAdapter may read."""
        serving = self._ready(teacher_pb2.CAPABILITY_HOT_ADAPTERS)
        in_use = {each.path for each in serving.adapters.adapters() if each.path is not None}
        path, fingerprint = await serving.uploads.receive(aiter(request_iterator), in_use=in_use)
        log.info("adapter uploaded", fingerprint=fingerprint, path=str(path))
        return teacher_pb2.UploadAdapterResponse(path=str(path), fingerprint=fingerprint)

    async def LoadAdapter(
        self, request: teacher_pb2.LoadAdapterRequest, context: Any
    ) -> teacher_pb2.LoadAdapterResponse:
        """Makes an adapter usable by name."""
        serving = self._ready(teacher_pb2.CAPABILITY_HOT_ADAPTERS)
        adapter = await serving.adapters.load(request.adapter, request.path)
        log.info("adapter loaded", adapter=adapter.name, fingerprint=adapter.fingerprint, rank=adapter.rank)
        return teacher_pb2.LoadAdapterResponse(adapter=_adapter(adapter))

    async def UnloadAdapter(
        self, request: teacher_pb2.UnloadAdapterRequest, context: Any
    ) -> teacher_pb2.UnloadAdapterResponse:
        """Unloads an adapter once no request uses it."""
        serving = self._ready(teacher_pb2.CAPABILITY_HOT_ADAPTERS)
        await serving.adapters.unload(request.adapter)
        log.info("adapter unloaded", adapter=request.adapter)
        return teacher_pb2.UnloadAdapterResponse()

    def _ready(self, needs: teacher_pb2.Capability.ValueType | None = None) -> ServiceState:
        if self.serving is None:
            raise StillhouseError(
                Reason.TEACHER_LOADING,
                f"The teacher is loading {self._config.model or self._config.upstream}. Ask again in a few seconds.",
                retry_after_s=LOADING_RETRY_S,
            )
        if needs is not None:
            require(self.serving.info, needs)
        return self.serving


def _adapter(loaded: LoadedAdapter) -> teacher_pb2.Adapter:
    return teacher_pb2.Adapter(name=loaded.name, fingerprint=loaded.fingerprint, rank=loaded.rank)


def _own_version() -> str:
    try:
        return version("stillhouse")
    except PackageNotFoundError:  # run from a checkout
        return "0.0.0"
