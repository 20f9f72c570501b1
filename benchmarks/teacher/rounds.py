"""All rounds over one model: starts the servers of the requested ratios, and takes passes in turns.

Batch inference comes last: vLLM's offline engine replaces the other baselines, the teacher stays.
"""

from __future__ import annotations

import operator
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from benchmarks.teacher.models import Shape, make_teacher
from benchmarks.teacher.passes import SERVERS, Runner, Workload, kind_of
from benchmarks.teacher.peers.environment import TRL, VLLM_GRPC, Peers
from benchmarks.teacher.ratios import RATIOS, Costs, ModelResult, Ratio, top_k_of
from benchmarks.teacher.servers import EngineSettings, Servers
from benchmarks.teacher.timed_pass import Pass
from stillhouse.protos.errors import StillhouseError
from tests.support.programs import ProgramError

SHARE_OF_TIME = {"small": 0.55, "wide": 0.12, "qwen": 0.33, "qwen7b": 0.33}
"""Share of the total time per model."""
LAST = ("batch", "batch_llm")
LAST_SHARE = 0.12
"""Share of a model's time for the last passes."""
QUICK = ("score", "engine", "gen", "gen_plain")
QUICK_REPEATS = {"small": 3}
"""Repeats per round of the passes of a model that take a second each."""

Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Selection and duration of the benchmark."""

    models: tuple[str, ...]
    only: frozenset[str]
    """Names of ratios; empty means all."""
    rounds: int
    minutes: float
    settings: EngineSettings

    def selected(self) -> list[Ratio]:
        """Selected ratios."""
        named = [ratio for ratio in RATIOS if not self.only or ratio.name in self.only]
        return [ratio for ratio in named if ratio.model in self.models]

    def requirements(self) -> frozenset[str]:
        """Peers of the selected ratios."""
        return frozenset(filter(None, (peer_of(ratio) for ratio in self.selected())))

    def ratios(self, model: str, peers: Peers) -> list[Ratio]:
        """Selected ratios of a model that can be measured here."""
        return [ratio for ratio in self.selected() if ratio.model == model and not is_missing(ratio, peers)]

    def seconds(self, model: str) -> float:
        """Time of a model."""
        share = SHARE_OF_TIME[model] / sum(SHARE_OF_TIME[each] for each in self.models)
        return 60 * self.minutes * share


def is_missing(ratio: Ratio, peers: Peers) -> bool:
    """True if a side of it cannot run here."""
    return peer_of(ratio) in peers.missing


def peer_of(ratio: Ratio) -> str | None:
    """Peer to install for its other side; None for what the project has."""
    kind = kind_of(ratio.other)
    if kind == "trl":
        return TRL
    return VLLM_GRPC if kind in {"vllm_grpc", "gen_vllm_grpc"} else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Results of one model's rounds."""

    result: ModelResult
    engine: str
    """The teacher's engine and tier."""
    commands: dict[str, str]
    """Command of each server."""
    concurrencies: dict[str, Any]
    """Fastest concurrency of each baseline."""
    failures: dict[str, str]
    """Errors of failed passes."""
    log: str = ""
    """End of the teacher's log, after a failure."""


def measure(
    shape: Shape,
    options: Options,
    peers: Peers,
    directory: Path,
    log: Log,
    *,
    keep: Callable[[Measured], None] = lambda measured: None,  # noqa: ARG005
) -> Measured | None:
    """Runs all rounds of one model; None if nothing of it was selected. `keep` receives the results after each round."""
    ratios = options.ratios(shape.name, peers)
    if not ratios:
        return None
    seconds = options.seconds(shape.name)
    until = time.monotonic() + seconds
    log(f"{shape.name}: making the model")
    model = make_teacher(shape, directory / shape.name)
    workload = Workload(shape=shape, settings=options.settings, directory=directory)
    servers = Servers(model, shape, options.settings, directory / f"{shape.name}-logs", peers)
    rounds = _Rounds(workload, servers, options, log, keep)
    names = list(dict.fromkeys(name for ratio in ratios for name in (ratio.ours, ratio.other)))
    last = [name for name in names if name in LAST]
    first = [name for name in names if name not in LAST]
    try:
        if first:
            top_ks = sorted({top_k_of(ratio.ours) for ratio in ratios} - {0})
            rounds.run(first, top_ks, until - LAST_SHARE * seconds * bool(last))
        if last:
            rounds.run(last, (), until)
        return rounds.measured()
    except StillhouseError as error:
        raise ProgramError(f"{error}\nThe teacher's log ends with:\n{servers.teacher_log()}") from error
    finally:
        servers.close()


class _Rounds:
    """Takes passes and stores their results."""

    def __init__(
        self,
        workload: Workload,
        servers: Servers,
        options: Options,
        log: Log,
        keep: Callable[[Measured], None],
    ) -> None:
        self._workload, self._servers, self._options, self._log = workload, servers, options, log
        self._keep = keep
        self._running: dict[str, Any] = {}
        self._rounds: list[dict[str, Pass]] = []
        self._costs: list[dict[str, Any]] = []
        self._best: dict[str, Any] = {}
        self._failures: dict[str, str] = {}

    def run(self, names: Sequence[str], top_ks: Sequence[int], until: float) -> None:
        """Runs rounds of these passes, at least one, and none that would end after `until`; then ends their servers."""
        started = self._start(names, with_torch=bool(top_ks))
        runner = Runner(self._workload, self._running)
        runner.warm_up(names, self._log)
        self._best |= runner.best
        longest = 0.0
        for number in range(self._options.rounds):
            begin = time.monotonic()
            if number and begin + longest > until:
                break
            if top_ks:
                self._costs.append(runner.costs(top_ks))
            self._add(number, self._turns(runner, names, is_even=number % 2 == 0))
            self._keep(self.measured())
            longest = max(longest, time.monotonic() - begin)
        self._servers.stop([name for name in started if name != "teacher"])
        self._running = {name: server for name, server in self._running.items() if name == "teacher"}

    def measured(self) -> Measured:
        """Results of all rounds."""
        group = self._workload.grouped(0)
        own = group.length - group.shared
        tokens = group.group_size * group.length
        return Measured(
            result=ModelResult(
                rounds=self._rounds,
                costs=_median_costs(self._costs, self._options.settings.helpers),
                computed=(group.shared + group.group_size * own) / tokens,
                answered=group.group_size * own / tokens,
            ),
            engine=self._running["teacher"].info().engine,
            commands=self._servers.commands,
            concurrencies=self._best,
            failures=self._failures,
            log=self._servers.teacher_log() if self._failures else "",
        )

    def _start(self, names: Sequence[str], *, with_torch: bool) -> list[str]:
        wanted = dict.fromkeys(server for name in names for server in SERVERS[kind_of(name)])
        if with_torch:
            wanted["torch"] = None
        missing = [name for name in wanted if name not in self._running]
        begin = time.monotonic()
        self._running |= self._servers.start(missing)
        self._log(f"started {', '.join(missing)} in {time.monotonic() - begin:.0f} s")
        return missing

    def _turns(self, runner: Runner, names: Sequence[str], *, is_even: bool) -> dict[str, Pass]:
        seed = runner.fresh_seed()
        taken: dict[str, Pass] = {}
        for name in names if is_even else reversed(names):
            kind = kind_of(name)
            repeats = QUICK_REPEATS.get(self._workload.shape.name, 1) if kind in QUICK else 1
            # Passes over shared prompts read the same tokens; no other pass repeats any.
            same = seed if "shared" in kind or kind in LAST else None
            passes = [runner.run(name, same) for _ in range(repeats)]
            whole = [one for one in passes if one is not None]
            if len(whole) < repeats:
                self._log(f"{name} failed: {runner.failures[name]}")
            else:
                taken[name] = reduce(operator.add, whole)
        self._failures |= runner.failures
        return taken

    def _add(self, number: int, taken: dict[str, Pass]) -> None:
        if number == len(self._rounds):
            self._rounds.append({})
        self._rounds[number] |= taken
        rates = ", ".join(f"{name} {each.tokens_per_s:,.0f}" for name, each in taken.items())
        self._log(f"{self._workload.shape.name}, round {number + 1}: {rates} tok/s")


def _median_costs(costs: Sequence[dict[str, Any]], helpers: int) -> Costs | None:
    if not costs:
        return None
    return Costs(
        body=statistics.median(each["body"] for each in costs),
        head=statistics.median(each["head"] for each in costs),
        select={
            top_k: statistics.median(each["select"][top_k] for each in costs) for top_k in costs[0]["select"]
        },
        helpers=helpers,
    )
