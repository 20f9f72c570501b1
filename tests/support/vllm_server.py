"""vLLM's own OpenAI server as a program; `vllm serve` itself does not start from the package of the CPU build."""

from __future__ import annotations

import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.support.processes import no_process_left
from tests.support.programs import ProgramError, start_program

NAME = "tiny"
"""The served model's name."""


@contextmanager
def vllm_server(
    model: Path,
    *,
    directory: Path,
    key: str,
    adapters: Mapping[str, Path],
    max_logprobs: int,
    wait_s: float = 240.0,
) -> Iterator[str]:
    """Address of a server that listens on this machine and asks for `key`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = {
        "--model": model,
        "--served-model-name": NAME,
        "--host": "127.0.0.1",
        "--port": port,
        "--dtype": "float32",
        "--max-logprobs": max_logprobs,
        "--max-num-seqs": 16,
        "--kv-cache-memory-bytes": 1 << 28,
        "--max-lora-rank": 8,
    }
    flat = [str(part) for pair in arguments.items() for part in pair]
    modules = [f"{name}={path}" for name, path in adapters.items()]
    url = f"http://127.0.0.1:{port}"
    with (
        no_process_left() as mark,
        start_program(
            "vllm",
            [
                "vllm.entrypoints.openai.api_server",
                *flat,
                *(
                    "--enforce-eager",
                    "--disable-uvicorn-access-log",
                    "--enable-lora",
                    "--lora-modules",
                    *modules,
                ),
            ],
            directory=directory,
            environment={
                **mark,
                "VLLM_API_KEY": key,
                "VLLM_PLUGINS": "",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            },
            listens=False,
        ) as program,
    ):
        deadline = time.monotonic() + wait_s
        while not _healthy(url):
            if program.process.poll() is not None or time.monotonic() > deadline:
                raise ProgramError(f"vLLM's server does not start. Its log:\n{program.log()}")
            time.sleep(0.2)
        try:
            yield url
        finally:
            program.kill()  # its last words are not a service's


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
