"""Starts all sides of the benchmark, each with the engine settings of the teacher, and records the commands."""

from __future__ import annotations

import http.client
import json
import shlex
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.teacher.json_worker import LineProcess
from benchmarks.teacher.models import Shape
from benchmarks.teacher.peers.environment import VLLM_GRPC, Peers
from benchmarks.teacher.scoring_clients import CountingTeacher
from stillhouse.teacher_service.engines.vllm.engine_args import MAX_RUNNING_SEQUENCES
from stillhouse.teacher_service.engines.vllm.parallelism import num_cores
from tests.support.programs import Program, ProgramError, start_program, start_teacher

MAX_TOP_K = 256
MAX_BATCH_TOKENS = 8192
CPU_LOGITS_ELEMENTS = 1 << 28
KV_CACHE_GIB = 1
GPU_SHARE, LARGE_GPU_SHARE = 0.15, 0.4
"""Share of a GPU's memory for each concurrent engine, and for each of two with a large model."""
LARGE_HIDDEN = 2048
"""Width from which a model is large."""
START_TIMEOUT_S = 300.0
LOG_BYTES = 4000
QUIET = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """Settings shared by all engines."""

    dtype: str
    on_cpu: bool
    threads: int
    """Threads of an engine on a CPU; 0 leaves it to vLLM, which keeps one core free."""

    @property
    def engine_threads(self) -> int:
        """Computing threads of an engine."""
        return self.threads or max(1, num_cores() - 1)

    @property
    def helpers(self) -> int:
        """Helper threads that select the teacher's rows: see `cpu_threads`."""
        return int(self.on_cpu and not self.threads and self.engine_threads == 1 and num_cores() > 1)


class Servers:
    """The running programs of one model; `stop` ends some of them, `close` all."""

    def __init__(
        self, model: Path, shape: Shape, settings: EngineSettings, directory: Path, peers: Peers | None
    ) -> None:
        self.model, self._shape, self._settings = model, shape, settings
        self._directory, self._peers = directory, peers
        self._stacks: dict[str, ExitStack] = {}
        self._ready: dict[str, Callable[[], Any]] = {}
        self._teacher_program: Program | None = None
        self.commands: dict[str, str] = {}
        """Command of each program, for reproduction."""

    def start(self, names: Sequence[str]) -> dict[str, Any]:
        """Starts these together and waits for all.

        Names and values are "teacher": CountingTeacher; "engine", "llm", "torch", "trl", "vllm_grpc_client":
        LineProcess; "http": URL; "vllm_grpc": address.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        for name in names:
            self._stacks[name] = ExitStack()
            self._ready[name] = getattr(self, f"_{name}")(self._stacks[name])
        return {name: self._ready.pop(name)() for name in names}

    def stop(self, names: Sequence[str]) -> None:
        """Ends the running ones of these."""
        for name in names:
            if name in self._stacks:
                self._stacks.pop(name).close()

    def close(self) -> None:
        """Ends all."""
        self.stop(list(self._stacks))

    @property
    def _batch_tokens(self) -> int:
        """Batch tokens of peers: on a CPU, as many as have 1 GiB of float32 logits."""
        if not self._settings.on_cpu:
            return MAX_BATCH_TOKENS
        return min(MAX_BATCH_TOKENS, CPU_LOGITS_ELEMENTS // self._shape.vocab_size)

    def _teacher(self, running: ExitStack) -> Callable[[], CountingTeacher]:
        def wait() -> CountingTeacher:
            options: list[str] = []
            for name, value in self._engine_options().items():
                options += [f"--{name.replace('_', '-')}", str(value)]
            self.commands["teacher"] = shlex.join(
                ["stillhouse-teacher", "--model", self.model.name, "--engine", "vllm", *options]
            )
            program = running.enter_context(
                start_teacher(
                    self.model, engine="vllm", directory=self._directory, options=options, environment=QUIET
                )
            )
            self._teacher_program = program
            return running.enter_context(CountingTeacher(program.target, program.pid))

        return wait

    def teacher_log(self) -> str:
        """End of the teacher's log."""
        return self._teacher_program.log(LOG_BYTES) if self._teacher_program else ""

    def _engine_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "dtype": self._settings.dtype,
            "max_adapters": 0,
        }
        if self._settings.threads:
            options["threads"] = self._settings.threads
        if not self._settings.on_cpu:
            is_large = self._shape.hidden_size >= LARGE_HIDDEN
            options["gpu_memory_utilization"] = LARGE_GPU_SHARE if is_large else GPU_SHARE
        return options

    def _engine_all(self, running: ExitStack) -> Callable[[], LineProcess]:
        return self._engine(running, "engine_all", {"threads": num_cores()} if self._settings.on_cpu else {})

    def _engine(
        self, running: ExitStack, name: str = "engine", more: Mapping[str, Any] | None = None
    ) -> Callable[[], LineProcess]:
        options = json.dumps(
            self._engine_options() | {"max_batch_tokens": MAX_BATCH_TOKENS} | dict(more or {})
        )
        self.commands[name] = (
            f"python -m benchmarks.teacher.peers.vllm_engine {self.model.name} '{options}'  "
            "# the teacher's engine: AsyncLLM.generate, max_tokens=1, no logprobs, prefix cache on"
        )
        return self._lines(running, "benchmarks.teacher.peers.vllm_engine", [str(self.model), options], QUIET)

    def _llm(self, running: ExitStack) -> Callable[[], LineProcess]:
        arguments: dict[str, Any] = {
            "dtype": self._settings.dtype,
            "max_num_batched_tokens": self._batch_tokens,
            "max_num_seqs": min(MAX_RUNNING_SEQUENCES, self._batch_tokens),
            "generation_config": "vllm",
        }
        if self._settings.on_cpu:
            arguments |= {"enforce_eager": True, "kv_cache_memory_bytes": KV_CACHE_GIB * 2**30}
        else:
            arguments["gpu_memory_utilization"] = GPU_SHARE
        shown = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        self.commands["llm"] = f"vllm.LLM({self.model.name!r}, {shown}).generate(prompts, use_tqdm=False)"
        return self._lines(
            running,
            "benchmarks.teacher.peers.vllm_offline",
            [str(self.model), json.dumps(arguments)],
            {**QUIET, "VLLM_PLUGINS": "", **self._thread_environment()},
        )

    def _torch(self, running: ExitStack) -> Callable[[], LineProcess]:
        self.commands["transformers"] = (
            f"AutoModelForCausalLM.from_pretrained({self.model.name!r}, dtype={self._settings.dtype})(ids)"
            ".logits.float().log_softmax(-1).topk(k)  # a sequence at a time, all cores"
        )
        return self._lines(
            running, "benchmarks.teacher.roofline", [str(self.model), self._settings.dtype], QUIET
        )

    def _http(self, running: ExitStack) -> Callable[[], str]:
        port, arguments = self._vllm_arguments("vllm.entrypoints.openai.api_server")
        arguments += ["--served-model-name", "model", "--disable-uvicorn-access-log"]
        program = self._vllm_program(running, "http", arguments, Path(sys.executable), plugins="")

        def wait() -> str:
            _wait(lambda: _is_healthy(port), program)
            return f"http://127.0.0.1:{port}"

        return wait

    def _vllm_grpc(self, running: ExitStack) -> Callable[[], str]:
        port, arguments = self._vllm_arguments("vllm.entrypoints.launchers.grpc_server")
        python = self._peer(VLLM_GRPC)
        program = self._vllm_program(running, "vllm_grpc", arguments, python, plugins="smg-servicer")

        def wait() -> str:
            _wait(lambda: _is_open(port), program)
            return f"127.0.0.1:{port}"

        return wait

    def _vllm_arguments(self, module: str) -> tuple[int, list[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments: dict[str, Any] = {
            "--host": "127.0.0.1",
            "--port": port,
            "--model": self.model,
            "--dtype": self._settings.dtype,
            "--max-logprobs": MAX_TOP_K,
            "--max-num-batched-tokens": self._batch_tokens,
            "--max-num-seqs": min(MAX_RUNNING_SEQUENCES, self._batch_tokens),
            "--generation-config": "vllm",
        }
        if self._settings.on_cpu:
            arguments["--kv-cache-memory-bytes"] = KV_CACHE_GIB * 2**30
        else:
            arguments["--gpu-memory-utilization"] = GPU_SHARE
        flags = ["--disable-log-stats", *(["--enforce-eager"] if self._settings.on_cpu else [])]
        return port, [module, *flags, *(str(part) for pair in arguments.items() for part in pair)]

    def _vllm_program(
        self, running: ExitStack, name: str, arguments: list[str], python: Path, *, plugins: str
    ) -> Program:
        # Our plug-in is disabled in peers; unrequested events of a peer's stream would cost it time.
        extra = {"VLLM_PLUGINS": plugins, "SMG_VLLM_SERVICER_KV_EVENTS": "0", **self._thread_environment()}
        shown = shlex.join([part if part != str(self.model) else self.model.name for part in arguments])
        self.commands[name] = f"python -m {shown}"
        program = start_program(
            name,
            arguments,
            directory=self._directory,
            listens=False,
            environment={**QUIET, **extra},
            python=python,
        )
        running.callback(program.kill)  # it needs no orderly end
        return program

    def _thread_environment(self) -> dict[str, str]:
        if not self._settings.threads:
            return {}
        return {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(self._settings.threads),
        }

    def _trl(self, running: ExitStack) -> Callable[[], LineProcess]:
        self.commands["trl"] = (
            "VLLMClient(base_url).get_sequence_logprobs(sequences, [1, ...], top_logprobs=k)"
        )
        return self._peer_client(running, "trl")

    def _vllm_grpc_client(self, running: ExitStack) -> Callable[[], LineProcess]:
        return self._peer_client(running, "vllm_grpc")

    def _peer_client(self, running: ExitStack, kind: str) -> Callable[[], LineProcess]:
        assert self._peers is not None
        process = LineProcess(
            "benchmarks.teacher.peers.clients",
            [kind],
            log_path=self._directory / f"{kind}-client.log",
            python=self._peers.python,
            environment={**QUIET, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        return self._whole(running, process)

    def _lines(
        self, running: ExitStack, module: str, arguments: list[str], environment: dict[str, str]
    ) -> Callable[[], LineProcess]:
        log_path = self._directory / f"{module.rpartition('.')[2]}.log"
        return self._whole(
            running, LineProcess(module, arguments, log_path=log_path, environment=environment)
        )

    def _whole(self, running: ExitStack, process: LineProcess) -> Callable[[], LineProcess]:
        running.callback(process.stop)

        def wait() -> LineProcess:
            process.wait_ready()
            return process

        return wait

    def _peer(self, requirement: str) -> Path:
        assert self._peers is not None
        assert requirement not in self._peers.missing
        return self._peers.python


def _wait(is_ready: Callable[[], bool], program: Program) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and program.process.poll() is None:
        if is_ready():
            return
        time.sleep(0.5)
    raise ProgramError(f"{program.name} does not start:\n{program.log()}")


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _is_open(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except OSError:
        return False
    return True
