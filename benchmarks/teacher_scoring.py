"""How fast does the teacher score? Tokens per second over gRPC against its engine without logprobs and vLLM's HTTP server.

All three serve the same random model on this machine and stay up together; within a round they take turns on sequences
of equal number and length, so that what disturbs the machine disturbs all of them. Ratios are taken round by round.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.scoring_clients import Timing, random_sequences, time_grpc, time_http
from examples.demo import signals_as_exceptions
from examples.programs import Program, ProgramError, start_program, start_teacher
from examples.small_models import make_model, make_tokenizer
from teacher_service.vllm_setup import MAX_RUNNING_SEQUENCES

VOCAB_SIZE = 4096
CONCURRENCIES = (8, 16, 32)
"""Requests at once that vLLM's HTTP server is tried with; the fastest counts."""
MAX_TOP_K = 256
MAX_BATCH_TOKENS = 8192
START_TIMEOUT_S = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is measured."""

    sizes: tuple[int, ...]
    num_sequences: int
    length: int
    rounds: int
    dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One pass of each, for one top_k."""

    top_k: int
    grpc: Timing
    plain_tokens_per_s: float
    http: Timing


class PlainEngine:
    """The engine without logprobs, in a process of its own."""

    def __init__(self, model: Path, settings: Settings, log_path: Path) -> None:
        self._settings = settings
        arguments = ["-m", "benchmarks.plain_engine", str(model), settings.dtype, str(MAX_BATCH_TOKENS)]
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        if self._ask(None) != "ready":
            raise ProgramError(f"the engine does not start:\n{log_path.read_text()[-4000:]}")

    def tokens_per_s(self, seed: int) -> float:
        """Of one pass over fresh sequences."""
        settings = self._settings
        seconds = float(self._ask(f"{settings.num_sequences} {settings.length} {seed}\n"))
        return settings.num_sequences * settings.length / seconds

    def stop(self) -> None:
        """Ends it and what it started."""
        try:
            self._process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()  # its guard ends the rest
            self._process.communicate()

    def _ask(self, line: str | None) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if line is not None:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        return self._process.stdout.readline().strip()


@contextmanager
def http_server(model: Path, settings: Settings, directory: Path) -> Iterator[str]:
    """The URL of vLLM's own server, started with what the teacher gives its engine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = {
        "--host": "127.0.0.1",
        "--port": port,
        "--model": model,
        "--served-model-name": "model",
        "--dtype": settings.dtype,
        "--max-logprobs": MAX_TOP_K,
        "--max-num-batched-tokens": MAX_BATCH_TOKENS,
        "--max-num-seqs": MAX_RUNNING_SEQUENCES,
        "--kv-cache-memory-bytes": 2**30,
        "--generation-config": "vllm",
    }
    flags = ["--enforce-eager", "--disable-log-stats", "--disable-uvicorn-access-log"]
    program = start_program(
        "vllm-http",
        [
            "vllm.entrypoints.openai.api_server",
            *flags,
            *(str(part) for pair in arguments.items() for part in pair),
        ],
        directory=directory,
        listens=False,
        environment={"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"},
    )
    with program:
        _wait_until_healthy(port, program)
        yield f"http://127.0.0.1:{port}"


def _wait_until_healthy(port: int, program: Program) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and program.process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.5)
        finally:
            connection.close()
    raise ProgramError(f"vLLM's HTTP server does not start:\n{program.log()}")


def make_teacher(directory: Path) -> Path:
    """A random model: 4 layers of 256, 4096 tokens. So small that Python between engine and network is what limits it."""
    texts = [
        " ".join(str((number * 7919 + step * 104729) % 99991) for step in range(12)) for number in range(4000)
    ]
    tokenizer_dir = make_tokenizer(texts, directory / "tokenizer", VOCAB_SIZE)
    return make_model(
        directory / "teacher",
        tokenizer_dir=tokenizer_dir,
        hidden_size=256,
        num_layers=4,
        num_heads=4,
        max_sequence_tokens=2048,
        vocab_padding=VOCAB_SIZE - _tokenizer_size(tokenizer_dir),
        initializer_range=0.1,
    )


def _tokenizer_size(directory: Path) -> int:
    from transformers import AutoTokenizer

    return len(AutoTokenizer.from_pretrained(directory))


def measure(settings: Settings, directory: Path, say: Any) -> list[Round]:
    """All rounds; the first pass of each, which is not counted, also finds the best concurrency over HTTP."""
    model = make_teacher(directory)
    num_ids = _tokenizer_size(model)
    with ExitStack() as running:
        say("starting three engines")
        teacher = running.enter_context(
            start_teacher(
                model,
                engine="vllm",
                directory=directory,
                options=[
                    "--dtype",
                    settings.dtype,
                    "--max-adapters",
                    "0",
                    "--max-batch-tokens",
                    str(MAX_BATCH_TOKENS),
                ],
            )
        )
        plain = PlainEngine(model, settings, directory / "plain.log")
        running.callback(plain.stop)
        url = running.enter_context(http_server(model, settings, directory))
        seeds = iter(range(1 << 30))

        def fresh() -> list[Any]:
            return random_sequences(settings.num_sequences, settings.length, num_ids, next(seeds))

        def over_grpc(top_k: int) -> Timing:
            return asyncio.run(time_grpc(teacher.target, fresh(), top_k, VOCAB_SIZE))

        def over_http(top_k: int, concurrency: int) -> Timing:
            return asyncio.run(time_http(url, "model", fresh(), top_k, concurrency))

        best = {}
        plain.tokens_per_s(next(seeds))
        for top_k in settings.sizes:
            say(f"warming up, k = {top_k}")
            over_grpc(top_k)
            tried = {number: over_http(top_k, number).tokens_per_s for number in CONCURRENCIES}
            best[top_k] = max(tried, key=lambda number: tried[number])
        rounds = []
        for number in range(settings.rounds):
            for top_k in settings.sizes:
                say(f"round {number + 1} of {settings.rounds}, k = {top_k}, HTTP with {best[top_k]} at once")
                rounds.append(
                    Round(
                        top_k=top_k,
                        grpc=over_grpc(top_k),
                        plain_tokens_per_s=plain.tokens_per_s(next(seeds)),
                        http=over_http(top_k, best[top_k]),
                    )
                )
        return rounds


def table(rounds: Sequence[Round], settings: Settings) -> Table:
    """Medians over the rounds; a ratio is followed by the least and the greatest of its rounds."""
    shown = Table(
        title=f"Scoring {settings.num_sequences} sequences of {settings.length} tokens, vocabulary {VOCAB_SIZE}, {settings.dtype}"
    )
    for column in (
        "top_k",
        "gRPC tok/s",
        "engine without logprobs tok/s",
        "ratio",
        "vLLM HTTP tok/s",
        "ratio",
        "gRPC bytes/token",
        "HTTP bytes/token",
    ):
        shown.add_column(column, justify="right")
    for top_k in settings.sizes:
        own = [each for each in rounds if each.top_k == top_k]
        shown.add_row(
            str(top_k),
            f"{statistics.median(each.grpc.tokens_per_s for each in own):,.0f}",
            f"{statistics.median(each.plain_tokens_per_s for each in own):,.0f}",
            _ratio([each.grpc.tokens_per_s / each.plain_tokens_per_s for each in own]),
            f"{statistics.median(each.http.tokens_per_s for each in own):,.0f}",
            _ratio([each.grpc.tokens_per_s / each.http.tokens_per_s for each in own]),
            f"{own[0].grpc.bytes_per_token:,.0f}",
            f"{own[0].http.bytes_per_token:,.0f}",
        )
    return shown


def _ratio(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


@click.command()
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every round to this file.")
@click.option("--sizes", default="20,64,128", show_default=True, help="Values of top_k, with commas.")
@click.option("--sequences", "num_sequences", type=click.IntRange(1), default=32, show_default=True)
@click.option(
    "--length", type=click.IntRange(2, 2047), default=512, show_default=True, help="Tokens of a sequence."
)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float32", "float16"]), default="bfloat16", show_default=True
)
def main(
    *, json_file: Path | None, sizes: str, num_sequences: int, length: int, rounds: int, dtype: str
) -> None:
    """Print the teacher's scoring rate over gRPC as ratios to its engine alone and to vLLM's own HTTP server."""
    try:
        top_ks = tuple(int(size) for size in sizes.split(","))
    except ValueError:
        raise click.BadParameter(
            f"{sizes} is no list of numbers such as 20,64,128.", param_hint="--sizes"
        ) from None
    if not all(1 <= top_k <= MAX_TOP_K for top_k in top_ks):
        raise click.BadParameter(f"top_k lies in [1, {MAX_TOP_K}].", param_hint="--sizes")
    settings = Settings(sizes=top_ks, num_sequences=num_sequences, length=length, rounds=rounds, dtype=dtype)
    progress = Console(stderr=True)
    try:
        with signals_as_exceptions(), tempfile.TemporaryDirectory(prefix="stillhouse-bench-") as directory:
            measured = measure(settings, Path(directory), progress.print)
    except (ProgramError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error
    Console(width=170).print(table(measured, settings))
    if json_file is not None:
        result = {"settings": asdict(settings), "rounds": [asdict(each) for each in measured]}
        json_file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
