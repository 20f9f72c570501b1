"""The arms of both comparisons: each trains with one program and leaves its step times and students."""

from __future__ import annotations

import http.client
import json
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.end_to_end.processes import Watch, halves_of_cores, on_cores, run_process, tail
from benchmarks.end_to_end.runs import make_run_dir, metric_of, started_s, step_times
from benchmarks.end_to_end.sizes import Sizes, Work
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec
from stillhouse.protos.telemetry import pace
from stillhouse.student_trainer.run_dir import RunDir
from tests.support.programs import SHARED_CORES, Program, ProgramError, start_program, start_teacher

ROOT = Path(__file__).parents[2]
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
SERVE_START_S = 300.0
TIMES = pace.NAMES
"""Metrics of which an arm keeps the mean of all steps."""


@dataclass(kw_only=True, slots=True)
class ArmResult:
    """Time and memory that an arm took, and the folders that it left."""

    name: str
    problem: str = ""
    """Reason for an early end; empty if all steps were taken."""
    began_s: float | None = None
    """Time at which steps began, in seconds since the epoch."""
    steps: dict[int, float] = field(default_factory=dict)
    """Time at the end of each step."""
    folders: dict[int, str] = field(default_factory=dict)
    """Kept students by step."""
    process_s: float = 0.0
    """Seconds of the whole training process, imports and export included."""
    memory_mib: list[tuple[str, float]] = field(default_factory=list)
    """Peak resident memory of each process, services included."""
    cpu_s: list[tuple[str, float]] = field(default_factory=list)
    """Processor seconds of each process while the training process lived, start of services included."""
    steps_cpu_s: list[tuple[str, float]] = field(default_factory=list)
    """Processor seconds of each process from the beginning of steps to the end of the last, in the order of their start: other
    work hardly changes them."""
    metrics: dict[str, float] = field(default_factory=dict)
    scores: dict[int, float] = field(default_factory=dict)
    """Nats per token, by step."""
    text_tokens: list[int] = field(default_factory=list)
    """Tokens of each text that the last student wrote while it was scored."""
    others: list[ArmResult] = field(default_factory=list)
    """The same arm with other seeds."""

    @property
    def last_step(self) -> int:
        """Steps taken."""
        return max(self.steps, default=0)

    def seconds(self, step: int | None = None) -> float | None:
        """Seconds from the beginning of steps to the end of one, by default of the last."""
        end = self.steps.get(self.last_step if step is None else step)
        return None if end is None or self.began_s is None else end - self.began_s

    @property
    def cpu_s_a_step(self) -> float | None:
        """Processor seconds of all processes for a step."""
        total = sum(seconds for _, seconds in self.steps_cpu_s)
        return total / self.last_step if self.last_step and total else None

    def count(self, used: Watch) -> None:
        """Takes over what the processes used, once steps and their times are known."""
        self.memory_mib, self.cpu_s = used.peaks_mib(), used.cpu_s()
        if self.began_s is not None and self.steps:
            self.steps_cpu_s = used.cpu_between(self.began_s, self.steps[self.last_step])

    def to_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        return asdict(self) | {"seconds": self.seconds(), "last_step": self.last_step}


@dataclass(frozen=True, kw_only=True, slots=True)
class Arms:
    """Runs arms of one comparison."""

    work: Work
    sizes: Sizes
    peers: Path | None
    """Python of an environment that has TRL; None without it."""
    minutes: float
    """Most minutes of an arm."""
    say: Callable[[str], object]

    def trl(self, name: str, kind: str, *, serve: bool = False) -> ArmResult:
        """An arm of trl_worker, with `vllm serve` beside it if it needs one."""
        result = ArmResult(name=name)
        if self.peers is None:
            result.problem = "TRL is not installed"
            return result
        folder, log = self._folder(name)
        used = Watch()
        with ExitStack() as stack:
            url = ""
            if serve:
                try:
                    with self._cores("services"):
                        served = _Served(self.work.teacher, folder, self.sizes)
                    url = stack.enter_context(served).url
                except ProgramError as error:
                    return self._unable(result, error)
            command = [
                *(self.peers, "-m", "benchmarks.end_to_end.trl_worker", kind, self.work.path),
                *(json.dumps(asdict(self.sizes)), folder, str(self.minutes), *([url] if url else [])),
            ]
            limit_s = 60 * self.minutes + 120
            stack.enter_context(used.watch())
            # Threads that wait spin by default, in the way of a server on the same cores.
            environment = {**QUIET, "PYTHONPATH": str(ROOT), **(SHARED_CORES if serve else {})}
            with self._cores("student"):
                code, result.process_s = run_process(
                    command, log=log, limit_s=limit_s, environment=environment
                )
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith('{"time"'):
                event = json.loads(line)
                if event["event"] == "started":
                    result.began_s = event["time"]
                elif event["event"] == "step":
                    result.steps[event["step"]] = event["time"]
        result.count(used)
        result.folders = {int(each.name): str(each) for each in folder.iterdir() if each.name.isdigit()}
        self._judge(result, code, log, steps=self.sizes.steps)
        return result

    def stillhouse(
        self,
        name: str,
        spec: Callable[[Sequence[str]], RunSpec],
        *,
        services: Sequence[tuple[Path, Sequence[str]]] = (),
        watch: Callable[[Sequence[Program]], Any] | None = None,
    ) -> ArmResult:
        """A training process beside services, each a model with options; `spec` gets their addresses.

        `watch` may open a context with the services, for the time of the training process.
        """
        result = ArmResult(name=name)
        folder, log = self._folder(name)
        run_dir = RunDir(folder / "run")
        used = Watch()
        with ExitStack() as stack:
            try:
                with self._cores("services"):
                    running = _start(services, folder, stack, dtype=self.sizes.teacher_dtype)
            except ProgramError as error:
                return self._unable(result, error)
            asked = spec([each.target for each in running])
            make_run_dir(run_dir.path, asked)
            command = [
                sys.executable,
                "-m",
                "stillhouse.student_trainer.train",
                run_dir.path,
                "--attempt",
                "1",
            ]
            stack.enter_context(used.watch())
            if watch is not None:
                stack.enter_context(watch(running))
            with self._cores("student"):
                code, result.process_s = run_process(
                    command, log=log, limit_s=60 * self.minutes + 60, environment=QUIET
                )
        result.began_s, result.steps = started_s(run_dir), step_times(run_dir)
        result.count(used)
        for step in result.steps:
            if step in self.sizes.snapshots and run_dir.checkpoint_path(step).is_dir():
                result.folders[step] = str(run_dir.checkpoint_path(step))
        if run_dir.metrics_path.exists():
            for key in ("train/trained_tokens", "train/rollout_staleness", "train/rollouts_dropped"):
                values = metric_of(run_dir, key)
                if values:
                    result.metrics[key] = values[max(values)]
            for key in TIMES:
                values = metric_of(run_dir, key)
                if values:
                    result.metrics[key] = statistics.fmean(values.values())
        self._judge(result, code, log, steps=0 if asked.task == "cache" else self.sizes.steps)
        return result

    def keep(self, result: ArmResult) -> None:
        """Leaves what an arm gave in its folder, for a later call."""
        path = self._result_path(result.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(result)))

    def earlier(self, name: str) -> ArmResult | None:
        """Result that an earlier call left of an arm of the same sizes; None if it did not run."""
        path = self._result_path(name)
        if not path.exists():
            return None
        return _result(json.loads(path.read_text()))

    def _result_path(self, name: str) -> Path:
        return self.work.arm(name, self.sizes) / "result.json"

    def score(self, kind: str, results: Sequence[ArmResult]) -> None:
        """Scores the kept students of all arms, in a process of its own."""
        folders = {each.name: [each.folders[step] for step in sorted(each.folders)] for each in results}
        command = [
            *(sys.executable, "-m", "benchmarks.end_to_end.scores", kind, self.work.path),
            *(
                json.dumps(asdict(self.sizes)),
                json.dumps({name: each for name, each in folders.items() if each}),
            ),
        ]
        log = self.work.path / f"scores-{kind}.log"
        run_process(command, log=log, limit_s=600.0, environment={**QUIET, "PYTHONPATH": str(ROOT)})
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("{")]
        if not lines:
            self.say(f"students were not scored: {tail(log)}")
            return
        found = json.loads(lines[-1])
        for result in results:
            scores, lengths = (found[name].get(result.name, {}) for name in ("scores", "lengths"))
            result.scores = {int(step): value for step, value in scores.items()}
            if any(lengths.values()):
                result.text_tokens = lengths[str(max(result.scores))]

    def _cores(self, host: str) -> AbstractContextManager[None]:
        """Cores of a host's programs: all, or its half where hosts are apart."""
        if not self.sizes.apart:
            return nullcontext()
        student, services = halves_of_cores()
        return on_cores(student if host == "student" else services)

    def _folder(self, name: str) -> tuple[Path, Path]:
        import shutil

        folder = self.work.arm(name, self.sizes)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.say(f"{name} …")
        return folder, folder / "log"

    def _unable(self, result: ArmResult, error: ProgramError) -> ArmResult:
        result.problem = f"a service did not start: {str(error).partition(' Its log:')[0][-200:]}"
        self.say(f"{result.name}: {result.problem}")
        return result

    def _judge(self, result: ArmResult, code: int | None, log: Path, *, steps: int) -> None:
        if code is None:
            result.problem = f"stopped after {self.minutes:g} minutes"
        elif code:
            result.problem = f"ended with {code}: {tail(log)}"
        elif result.began_s is not None and result.last_step < steps:
            result.problem = f"took {result.last_step} of {steps} steps in {self.minutes:g} minutes"
        seconds = result.seconds()
        took = (
            f"{seconds:.1f} s for {result.last_step} steps"
            if seconds is not None
            else f"{result.process_s:.1f} s"
        )
        self.say(f"{result.name}: {took}{'; ' if result.problem else ''}{result.problem}")


def _result(found: dict[str, Any]) -> ArmResult:
    """A result that was written as JSON."""
    for field_name in ("steps", "folders", "scores"):
        found[field_name] = {int(step): value for step, value in found[field_name].items()}
    for field_name in ("memory_mib", "cpu_s", "steps_cpu_s"):
        found[field_name] = [(process, value) for process, value in found[field_name]]
    return ArmResult(**{**found, "others": [_result(each) for each in found.get("others", ())]})


def _start(
    services: Sequence[tuple[Path, Sequence[str]]], folder: Path, stack: ExitStack, *, dtype: str
) -> list[Program]:
    """Starts services, which end with `stack`. Raises ProgramError if one does not start."""
    return [
        stack.enter_context(
            start_teacher(
                model,
                engine="vllm",
                directory=folder / f"service-{number}",
                options=["--dtype", dtype, *options],
                environment=QUIET,
            )
        )
        for number, (model, options) in enumerate(services)
    ]


class _Served:
    """`vllm serve` of a model, as TRL's guide starts it for a teacher."""

    def __init__(self, model: Path, folder: Path, sizes: Sizes) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        arguments = [
            *("vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1"),
            *("--port", str(self._port), "--dtype", sizes.teacher_dtype, "--max-logprobs", "-1"),
            *("--logprobs-mode", "processed_logprobs", "--enforce-eager", "--disable-log-stats"),
            *("--kv-cache-memory-bytes", str(2**30), "--generation-config", "vllm"),
        ]
        # Our plug-in is no part of a peer.
        environment = {**QUIET, "VLLM_PLUGINS": ""}
        self._program = start_program(
            "vllm-serve", arguments, directory=folder, listens=False, environment=environment
        )

    def __enter__(self) -> _Served:
        until_s = time.monotonic() + SERVE_START_S
        while not self._answers():
            ended = self._program.process.poll() is not None
            if ended or time.monotonic() > until_s:
                log = self._program.log()
                self._program.kill()
                raise ProgramError(f"vllm serve {'ended' if ended else 'does not answer'}: {log[-300:]}")
            time.sleep(0.5)
        return self

    def __exit__(self, *_: object) -> None:
        self._program.kill()

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=2)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()
