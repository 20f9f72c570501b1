"""Passes over one model by name: workload and client of each, and the best concurrency of each baseline."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.teacher import batch_pass
from benchmarks.teacher.generation_clients import generate, generate_http
from benchmarks.teacher.models import Shape
from benchmarks.teacher.ratios import top_k_of
from benchmarks.teacher.scoring_clients import score, score_http
from benchmarks.teacher.servers import EngineSettings
from benchmarks.teacher.timed_pass import Pass, PassInput
from stillhouse.student_trainer.config.schema import LossConfig
from stillhouse.student_trainer.config.settled.target_choice import TargetChoice

CONCURRENCIES = {
    "engine": (8, 16, 64),
    "engine_all": (8, 16, 64),
    "http": (8, 16, 32),
    "vllm_grpc": (8, 16, 32),
    "gen_http": (16, 32, 64),
    "gen_vllm_grpc": (16, 32, 64),
    # Sequences per request, and concurrent requests; 0 is TRL's default, all in one request.
    "trl": ((0, 1), (1, 16), (4, 8)),
}
"""Concurrencies tried with each baseline."""
GROUP_SIZE = 4
"""Completions per prompt, in the pass with shared prompts."""
SHARED_PART = 0.75
"""Average share of the prompt in a sequence of that pass."""
SHARED_SPREAD = 32
"""Prompt lengths in that pass: a block of vLLM's cache on a CPU."""
PROMPTS = 64
PROMPT_TOKENS = 64
NEW_TOKENS = 64
SERVERS = {
    "score": ("teacher",),
    "score_draws": ("teacher",),
    "shared": ("teacher",),
    "gen": ("teacher",),
    "gen_plain": ("teacher",),
    "engine": ("engine",),
    "engine_shared": ("engine",),
    "engine_all": ("engine_all",),
    "http": ("http",),
    "gen_http": ("http",),
    "trl": ("http", "trl"),
    "vllm_grpc": ("vllm_grpc", "vllm_grpc_client"),
    "gen_vllm_grpc": ("vllm_grpc", "vllm_grpc_client"),
    "transformers": ("torch",),
    "batch": ("teacher",),
    "batch_llm": ("llm",),
}
"""Servers that each kind of pass needs."""


def default_draws(vocab_size: int) -> int:
    """Draws that a run takes beside the top 16 for forward KL."""
    choice = TargetChoice.draws(LossConfig(), "", form="stratified_tail", vocab_size=vocab_size)
    return choice.num_samples


def kind_of(name: str) -> str:
    """Kind of a pass: its name without k and packing."""
    return name.rpartition("_k")[0].removesuffix("_packed") if top_k_of(name) else name


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Size of one pass."""

    shape: Shape
    settings: EngineSettings
    directory: Path

    @property
    def shared(self) -> int:
        """Average prompt tokens of grouped sequences."""
        return int(self.shape.length * SHARED_PART)

    def score(self, seed: int) -> PassInput:
        """Unseen sequences."""
        shape = self.shape
        return PassInput(
            count=shape.num_sequences, length=shape.length, vocab_size=shape.vocab_size, seed=seed
        )

    def grouped(self, seed: int) -> PassInput:
        """Twice as many in groups with one prompt each, since a prefix cache saves half of their tokens."""
        work = self.score(seed)
        count = max(GROUP_SIZE, 2 * work.count // GROUP_SIZE * GROUP_SIZE)
        return replace(work, count=count, group_size=GROUP_SIZE, shared=self.shared, spread=SHARED_SPREAD)

    def prompts(self, seed: int) -> PassInput:
        """Prompts to complete."""
        return PassInput(count=PROMPTS, length=PROMPT_TOKENS, vocab_size=self.shape.vocab_size, seed=seed)


class Runner:
    """Runs passes against running servers."""

    def __init__(self, workload: Workload, servers: dict[str, Any]) -> None:
        self._workload, self._servers = workload, servers
        self._best: dict[str, Any] = {}
        self._seeds = itertools.count()
        self.failures: dict[str, str] = {}
        """Last error of each failed pass, by name."""

    def run(self, name: str, seed: int | None = None) -> Pass | None:
        """Runs one pass; None if it failed. Passes with one `seed` read the same tokens; with None they are unseen."""
        base = kind_of(name).removesuffix("_shared")
        return self._tried(name, self._best.get(base), next(self._seeds) if seed is None else seed)

    def _tried(self, name: str, choice: Any, seed: int) -> Pass | None:
        try:
            return self._pass(name, kind_of(name), choice, seed)
        except (
            Exception
        ) as error:  # any error of a client, a peer or another process: the other rows continue
            self.failures[name] = f"{type(error).__name__}: {error}"
            return None

    def fresh_seed(self) -> int:
        """A seed that no pass had."""
        return next(self._seeds)

    def warm_up(self, names: Sequence[str], log: Callable[[str], None]) -> None:
        """Runs a pass of each name, and of a baseline one per concurrency; the fastest is kept."""
        # A baseline over shared prompts runs at the concurrency of the plain one.
        for name in dict.fromkeys(each for asked in names for each in (asked.removesuffix("_shared"), asked)):
            kind = kind_of(name)
            if kind in self._best:
                continue  # found with another k
            choices = CONCURRENCIES.get(kind)
            if choices is None:
                self.run(name)
                continue
            self._first_use(name, choices[0])
            taken = {choice: self._tried(name, choice, next(self._seeds)) for choice in choices}
            rates = {choice: each.tokens_per_s for choice, each in taken.items() if each is not None}
            self._best[kind] = max(rates, key=lambda choice: rates[choice]) if rates else choices[0]
            shown = ", ".join(f"{choice}: {rate:,.0f} tok/s" for choice, rate in rates.items())
            log(f"{name} by concurrency: {shown or self.failures[name]}")

    def _first_use(self, name: str, choice: Any) -> None:
        """Runs a few sequences for lazy initialisation, so that no concurrency pays for it."""
        whole = self._workload
        self._workload = replace(whole, shape=replace(whole.shape, num_sequences=4))
        self._tried(name, choice, next(self._seeds))
        self._workload = whole

    @property
    def best(self) -> dict[str, Any]:
        """Best concurrency of each baseline."""
        return dict(self._best)

    def costs(self, top_ks: Sequence[int]) -> dict[str, Any]:
        """Seconds per token of the model's parts, and of the selection by k."""
        work = replace(self._workload.score(self.fresh_seed()), count=2)
        parts = {
            top_k: self._servers["torch"].request(
                kind="costs",
                work=asdict(work),
                top_k=top_k,
                threads=self._workload.settings.engine_threads,
            )
            for top_k in top_ks
        }
        return {
            "body": min(each["body"] for each in parts.values()),
            "head": min(each["head"] for each in parts.values()),
            "select": {top_k: each["select"] for top_k, each in parts.items()},
        }

    def _pass(self, name: str, kind: str, choice: Any, seed: int) -> Pass:
        top_k = top_k_of(name)
        work = self._workload.score(seed)
        match kind:
            case "score":
                return score(
                    self._servers["teacher"], work.sequences(), top_k, packed=name.startswith("score_packed")
                )
            case "score_draws":
                draws = default_draws(work.vocab_size)
                return score(self._servers["teacher"], work.sequences(), top_k, packed=True, draws=draws)
            case "shared":
                work = self._workload.grouped(seed)
                return score(self._servers["teacher"], work.sequences(), top_k, starts=work.shared_lengths())
            case "engine" | "engine_all" | "engine_shared":
                work = self._workload.grouped(seed) if kind == "engine_shared" else work
                (server,) = SERVERS[kind]
                seconds = self._servers[server].request(concurrency=choice, **asdict(work))
                return Pass(tokens=work.count * work.length, seconds=seconds)
            case "http":
                return score_http(self._servers["http"], work.sequences(), top_k, concurrency=choice)
            case "trl":
                chunk_size, concurrency = choice
                answer = self._servers["trl"].request(
                    kind="trl",
                    url=self._servers["http"],
                    work=asdict(work),
                    top_k=top_k,
                    chunk_size=chunk_size,
                    concurrency=concurrency,
                )
                return _scored(answer, work)
            case "vllm_grpc":
                return _scored(self._vllm_grpc("vllm_grpc", work, top_k, choice), work)
            case "transformers":
                seconds = self._servers["torch"].request(
                    kind="transformers", work=asdict(work), top_k=top_k, threads=num_cores()
                )
                return Pass(tokens=work.count * work.length, seconds=seconds)
            case _:
                return self._written(kind, top_k, choice, seed)

    def _written(self, kind: str, top_k: int, choice: Any, seed: int) -> Pass:
        work = self._workload.prompts(seed)
        match kind:
            case "gen" | "gen_plain":
                return generate(self._servers["teacher"], work.sequences(), NEW_TOKENS, top_k)
            case "gen_http":
                return generate_http(
                    self._servers["http"], work.sequences(), NEW_TOKENS, top_k, concurrency=choice
                )
            case "gen_vllm_grpc":
                answer = self._vllm_grpc("vllm_grpc_generate", work, top_k, choice)
                return Pass(tokens=answer["rows"], seconds=answer["seconds"], num_bytes=answer["num_bytes"])
            case "batch":
                return batch_pass.ours(
                    self._servers["teacher"], self._workload.directory, self._workload.shape.num_texts, seed
                )
            case "batch_llm":
                return batch_pass.llm(self._servers["llm"], self._workload.shape.num_texts, seed)
        raise ValueError(f"there is no pass {kind}")

    def _vllm_grpc(self, kind: str, work: PassInput, top_k: int, concurrency: int) -> Any:
        return self._servers["vllm_grpc_client"].request(
            kind=kind,
            target=self._servers["vllm_grpc"],
            work=asdict(work),
            top_k=top_k,
            concurrency=concurrency,
            new_tokens=NEW_TOKENS,
        )


def _scored(answer: dict[str, Any], work: PassInput) -> Pass:
    expected = work.count * (work.length - 1)
    if answer["rows"] != expected:
        raise RuntimeError(f"{answer['rows']} rows came for {expected}")
    return Pass(tokens=work.count * work.length, seconds=answer["seconds"], num_bytes=answer["num_bytes"])


def num_cores() -> int:
    """Cores available to this process."""
    return len(os.sched_getaffinity(0))
