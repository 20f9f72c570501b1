"""Life of a teacher process: listen, load, warm up, serve, then drain or exit; a dead engine ends the process."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import sys
from dataclasses import asdict, replace
from typing import Protocol

import numpy as np
import structlog

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.atomic import write_atomic
from stillhouse.protos.import_scans import keep_scans
from stillhouse.protos.library_imports import MODEL_MODULES, import_modules
from stillhouse.protos.rpc.audit import AuditLog
from stillhouse.protos.rpc.auth import TokenFile
from stillhouse.protos.rpc.server import Server
from stillhouse.protos.rpc.tls import ServerTls
from stillhouse.protos.stillhouse.v1 import teacher_pb2, teacher_pb2_grpc
from stillhouse.protos.telemetry.gpu_memory import GpuMemory
from stillhouse.protos.telemetry.metrics import Metrics
from stillhouse.teacher_service.adapters.registry import AdapterRegistry
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engine import DistributionOptions, Engine, ScoreInput
from stillhouse.teacher_service.metrics import TeacherMetrics
from stillhouse.teacher_service.models.files import is_classifier, locate_model
from stillhouse.teacher_service.models.tokenizer import TextCodec
from stillhouse.teacher_service.rpc.score_validation import prepare_encoding
from stillhouse.teacher_service.rpc.servicer import LIMITED, TeacherServicer

SERVICE = teacher_pb2.DESCRIPTOR.services_by_name["TeacherService"].full_name
CHECK_INTERVAL_S = 1.0
"""Interval of the engine's health check."""
CLOSE_TIMEOUT_S = 40.0
"""Longest wait for the engine to free the model."""
CHILD_TIMEOUT_S = 5.0
"""Longest wait for a child process of a half-loaded engine to exit before it is killed."""

_ENGINES = {
    "vllm": ("stillhouse.teacher_service.engines.vllm.engine", "VllmEngine"),
    "openai": ("stillhouse.teacher_service.engines.openai.engine", "OpenAiEngine"),
    "hf": ("stillhouse.teacher_service.engines.hf.engine", "HfEngine"),
    "vllm classifier": (
        "stillhouse.teacher_service.engines.vllm.classifier_engine",
        "VllmClassifierEngine",
    ),
    "hf classifier": ("stillhouse.teacher_service.engines.hf.classifier_engine", "HfClassifierEngine"),
}

_EXTRAS = {"vllm": "teacher (or teacher-cpu)", "openai": "teacher-openai", "hf": "teacher-hf"}
"""Extras of the package that bring the engines."""

_DRAWS = frozenset(
    {
        teacher_pb2.CAPABILITY_SAMPLED_TOKENS,
        teacher_pb2.CAPABILITY_TAIL_SAMPLES,
        teacher_pb2.CAPABILITY_STRATIFIED_SAMPLES,
    }
)

log = structlog.get_logger(__name__)


class _LoadedEngine(Engine, Protocol):
    """An engine with the tokenizer that it was loaded with."""

    codec: TextCodec


def serve(config: TeacherConfig) -> int:
    """Serves until drained; returns exit code 0. Raises `StillhouseError` for settings that cannot work, or
    PROCESS_DIED."""
    return asyncio.run(_TeacherProcess(config).live())


class _TeacherProcess:
    def __init__(self, config: TeacherConfig) -> None:
        self._config = config
        self._servicer = TeacherServicer(config)
        self._engine: Engine | None = None
        self._metrics = Metrics()

    async def live(self) -> int:
        server = self._make_server()
        address = await server.start()
        try:
            self._show_metrics(server, address)
        except StillhouseError:
            await server.stop(0)
            raise
        try:
            return await self._live(server, address)
        finally:
            self._metrics.close()

    def _show_metrics(self, server: Server, address: str) -> None:
        config = self._config
        self._metrics.watch_calls(lambda: server.running)
        self._metrics.add(TeacherMetrics(self._servicer.counters, lambda: self._servicer.serving))
        self._metrics.add(GpuMemory())
        any_port = config.metrics_port is None and config.listen.endswith(":0")
        port = 0 if any_port else config.metrics_port
        page = self._metrics.listen(address, host=config.metrics_host, port=port)
        if page is not None:
            log.info("metrics", address=page)

    async def _live(self, server: Server, address: str) -> int:
        ending = asyncio.create_task(
            server.run_until_signal(self._servicer.drain, self._config.shutdown_grace_s)
        )
        await asyncio.sleep(0)  # signals are handled from here on
        log.info(
            "listening",
            address=address,
            model=self._config.model or self._config.upstream,
            engine=self._config.engine,
        )
        serving = asyncio.create_task(self._serve(server, address))
        await asyncio.wait({serving, ending}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done() and not ending.done():
            server.set_serving(False)
            await server.stop(0)
        await ending
        if not serving.done() and self._engine is None:
            # A library that loads weights in a thread cannot be stopped, and there is no state to lose.
            log.info("stopped while loading")
            _leave(0)
        serving.cancel()
        outcome = (await asyncio.gather(serving, return_exceptions=True))[0]
        log.info("drained", **asdict(self._servicer.counters))
        await self._close()
        if isinstance(outcome, Exception):
            raise outcome
        return 0

    def _make_server(self) -> Server:
        config = self._config
        tls = None
        if config.tls_cert is not None and config.tls_key is not None:
            tls = ServerTls(cert=config.tls_cert, key=config.tls_key, client_ca=config.tls_client_ca)
        server = Server(
            listen=config.listen,
            tls=tls,
            insecure=config.insecure,
            reflection=config.reflection,
            services=[SERVICE],
            max_calls=config.max_calls,
            limited=LIMITED,
            tokens=TokenFile(config.tokens) if config.tokens is not None else None,
            observers=[
                self._metrics,
                *([AuditLog(config.audit_log)] if config.audit_log is not None else []),
            ],
        )
        teacher_pb2_grpc.add_TeacherServiceServicer_to_server(self._servicer, server.aio)
        return server

    async def _serve(self, server: Server, address: str) -> None:
        """Loads the engine and serves until it dies."""
        config = self._config
        engine = await _load(config)
        self._engine = engine
        adapters = AdapterRegistry(engine, (*config.allow_roots, config.upload_directory))
        for name, path in config.adapters:
            await adapters.load(name, str(path), trusted=True)
        adapters.adopt(engine.info.adapters)
        log.info("model loaded", model=engine.info.model, dtype=engine.info.dtype)
        await _warm_up(engine)
        # Otherwise each full collection would traverse the libraries' millions of objects.
        gc.collect()
        gc.freeze()
        self._servicer.serve(engine, engine.codec, adapters)
        server.set_serving(True)
        if config.address_file is not None:
            write_atomic(config.address_file, address.encode(), private=True)
        log.info("serving", address=address, engine=engine.info.engine, dtype=engine.info.dtype)
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            try:
                await engine.check()
            except Exception as error:
                log.exception("engine died")
                raise StillhouseError(
                    Reason.PROCESS_DIED,
                    "The engine has died; see the log above. Start the teacher again.",
                ) from error

    async def _close(self) -> None:
        if self._engine is None:
            return
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._engine.close()
        except TimeoutError:
            log.warning("engine does not close", timeout_s=CLOSE_TIMEOUT_S)
            _leave(0)


async def _load(config: TeacherConfig) -> _LoadedEngine:
    module, name = _ENGINES[await asyncio.to_thread(_engine_name, config)]
    if config.engine == "hf":
        # On a CPU its threads would spin while they wait, on cores that a trainer beside it needs.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        keep_scans()
        # In a thread: importing torch takes seconds, in which the loop refuses calls and handles signals.
        await asyncio.to_thread(import_modules, [module, *(MODEL_MODULES if config.engine == "hf" else [])])
        engine = getattr(sys.modules[module], name)
        log.info("engine imported", engine=config.engine)
        loaded: _LoadedEngine = await engine.load(config)
    except ImportError as error:
        extra = _EXTRAS[config.engine]
        raise StillhouseError(
            Reason.INVALID_CONFIG,
            f"The {config.engine} engine is not installed ({error}). Install stillhouse with the extra {extra}, or choose "
            "another --engine.",
        ) from error
    return loaded


def _engine_name(config: TeacherConfig) -> str:
    """Name in _ENGINES. Raises `StillhouseError` (MODEL_NOT_FOUND)."""
    if config.engine == "openai":
        return config.engine
    classifies = is_classifier(locate_model(config.model, config.revision).directory)
    return f"{config.engine} classifier" if classifies else config.engine


async def _warm_up(engine: Engine) -> None:
    """Scores a token, or the classes of two, with compiled code that a run needs: its first answer does not wait for that.

    A model that cannot be scored is not served, unless it only generates.
    """
    info = engine.info
    if teacher_pb2.CAPABILITY_GENERATION_ONLY in info.capabilities:
        return
    token = info.eos_token_ids[0] if info.eos_token_ids else 0
    classifies = bool(info.class_names)
    options = DistributionOptions(top_k=0 if classifies else 1, classes=classifies)
    if info.capabilities >= _DRAWS:
        options = replace(options, num_sampled_tokens=1, stratified_samples=True, sample_tail=True)
    item = ScoreInput(token_ids=np.array([token, token], np.int32), start=1, options=options)
    await asyncio.gather(engine.score(item), asyncio.to_thread(prepare_encoding, info))


def _leave(code: int) -> None:
    """Exits at once, after ending the child processes of a half-loaded engine."""
    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    for child in children:
        child.join(CHILD_TIMEOUT_S)
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
