"""Collective operations of the processes that train one run: agreement, exchange and sums; a single process is the trivial case.

Every process makes the same calls in the same order, so that all leave a step, and the run, together. Small values
travel as JSON over gloo, even if gradients use NCCL: gloo notices at once that another process has ended.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stillhouse.protos.errors import (
    Reason,
    StillhouseError,
    first_line,
    from_json,
    from_status,
    to_json,
    to_status,
)
from stillhouse.student_trainer.train.distributed.rank_env import RankInfo, attribute_to_rank, timeout_s
from stillhouse.student_trainer.train.process.waiting import Stopped

if TYPE_CHECKING:
    from collections.abc import Callable

Value = TypeVar("Value")

ALIVE_S = 20.0
"""Interval at which a process that others wait for tells them that it lives."""
BUCKET_BYTES = 64 * 2**20
"""Largest amount of gradients reduced at once."""


class Ranks:
    """All processes of a run, as seen by this one."""

    def __init__(
        self,
        rank_info: RankInfo | None = None,
        *,
        patient: Any = None,
        swift: Any = None,
        bulk: Any = None,
    ) -> None:
        """Takes process groups, None for a single process: `patient` between steps, `swift` inside, `bulk` for gradients."""
        place = rank_info or RankInfo()
        self.rank = place.rank
        """Rank of this process, from 0."""
        self.size = place.size
        """Number of processes."""
        self._patient = patient
        self._swift = swift
        self._bulk = bulk

    @classmethod
    def join(cls, rank_info: RankInfo, store: Any, *, wait_s: float) -> Ranks:
        """Connects to the others through `store`; `wait_s` is how long one may wait for a teacher while others wait for it.

        Raises StillhouseError: PROCESS_DIED if they do not connect, INVALID_SPEC if this one has no device.
        """
        on_gpus = torch.cuda.is_available()
        if on_gpus:
            _select_device(rank_info)
        swift_time = timedelta(seconds=timeout_s())
        with _connected():
            dist.init_process_group(
                "gloo",
                store=store,
                rank=rank_info.rank,
                world_size=rank_info.size,
                timeout=timedelta(seconds=wait_s + timeout_s()),
            )
            swift = dist.new_group(backend="gloo", timeout=swift_time)
            bulk = dist.new_group(backend="nccl", timeout=swift_time) if on_gpus else swift
        return cls(rank_info, patient=dist.group.WORLD, swift=swift, bulk=bulk)

    @property
    def is_first(self) -> bool:
        """True in the process that writes the run directory."""
        return self.rank == 0

    def is_mine(self, number: int) -> bool:
        """Returns True if item `number` of a global order is this process's."""
        return number % self.size == self.rank

    def gather(self, data: bytes, *, patient: bool = False) -> list[bytes]:
        """Returns every process's bytes, by rank. `patient`: some may come late, because they wait for a teacher."""
        if self.size == 1:
            return [data]
        group = self._patient if patient else self._swift
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with _connected():
            dist.all_gather(sizes, torch.tensor([len(data)]), group=group)
            longest = max(1, *(int(size) for size in sizes))
            own = torch.zeros(longest, dtype=torch.uint8)
            own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else own[:0]
            parts = [torch.empty_like(own) for _ in range(self.size)]
            dist.all_gather(parts, own, group=group)
        return [part[: int(size)].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]

    def exchange(self, value: Any, *, patient: bool = False) -> list[Any]:
        """Returns every process's value, by rank; it must be JSON."""
        if self.size == 1:
            return [value]
        return [json.loads(each) for each in self.gather(json.dumps(value).encode(), patient=patient)]

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums values by name over all processes, bit for bit the same in each of them."""
        if self.size == 1:
            return dict(values)
        total: dict[str, float] = {}
        for each in self.exchange(dict(values)):
            for name, value in each.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def agree(self, do: Callable[[], Value]) -> Value:
        """Returns the result of `do` once it has returned in every process.

        Raises:
            Stopped: one of the processes stops; then all do.
            StillhouseError: the error of `do` in one of them; the others report it too.
        """
        item: list[Value] = []
        said: dict[str, Any] = {}
        own: StillhouseError | None = None
        try:
            item.append(do())
        except Stopped:
            said["stop"] = True
        except StillhouseError as error:
            own, said["error"] = error, to_json(to_status(error))
        answers = self.exchange(said, patient=True)
        if own is not None:
            raise own
        for rank, answer in enumerate(answers):
            if "error" in answer:
                raise attribute_to_rank(from_status(from_json(answer["error"])), rank, self.size)
        if any("stop" in answer for answer in answers):
            raise Stopped
        return item[0]

    def after_first(self, do: Callable[[], Value]) -> Value:
        """Returns the result of `do`, which the first process runs before the others, e.g. to write a shared file.

        Raises what `agree` raises.
        """
        if self.is_first:
            done = self.agree(do)
            self.agree(lambda: None)
            return done
        self.agree(lambda: None)
        return self.agree(do)

    def while_first(self, do: Callable[[Callable[[], None]], Value]) -> Value | None:
        """Returns the result of `do` in the first process, and None in the others, which wait for it however long it takes.

        `do` is given a function to call at least every few seconds. Raises what `agree` raises.
        """
        if self.size == 1:
            return do(lambda: None)
        if not self.is_first:
            while self.exchange(True, patient=True)[0]:
                pass
            return self.agree(lambda: None)
        told = time.monotonic()

        def alive() -> None:
            nonlocal told
            if time.monotonic() - told > ALIVE_S:
                told = time.monotonic()
                self.exchange(True, patient=True)

        def work() -> Value:
            try:
                return do(alive)
            finally:
                self.exchange(False, patient=True)

        return self.agree(work)

    def in_lockstep(self, steps: Iterable[Value], stop_requested: Callable[[], bool]) -> Iterator[Value]:
        """Yields the items of `steps` once every process has its own; all have equally many. Raises what `agree` raises."""
        iterator = iter(steps)

        def following() -> Value | None:
            item = next(iterator, None)
            if item is not None and stop_requested():
                raise Stopped
            return item

        while (item := self.agree(following)) is not None:
            yield item

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replaces every gradient by its sum over all processes; a gradient that no process has stays absent."""
        if self.size == 1:
            return
        device = parameters[0].device
        present = torch.tensor(
            [each.grad is not None for each in parameters], dtype=torch.int32, device=device
        )
        with _connected():
            dist.all_reduce(present, dist.ReduceOp.MAX, group=self._bulk)
            there = [each for each, flag in zip(parameters, present.tolist(), strict=True) if flag]
            for bucket in _buckets(there):
                gradients = [
                    torch.zeros_like(each) if each.grad is None else each.grad.contiguous() for each in bucket
                ]
                flat = torch.cat([each.view(-1) for each in gradients])
                dist.all_reduce(flat, group=self._bulk)
                parts = torch.split(flat, [each.numel() for each in gradients])
                for each, part in zip(bucket, parts, strict=True):
                    each.grad = part.view_as(each)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Copies the first process's values of `tensors` to all, in place."""
        if self.size > 1:
            with _connected(), torch.no_grad():
                for tensor in tensors:
                    dist.broadcast(tensor, 0, group=self._bulk)

    def leave(self) -> None:
        """Closes the connections, as all processes do at the end."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()
            # The groups' own threads end with the last reference, not while the interpreter goes down.
            self._patient = self._swift = self._bulk = None

    def abandon(self) -> None:
        """Closes the connections while others may be gone; NCCL's end with the process."""
        if not torch.cuda.is_available():
            self.leave()


def merge_metrics(parts: Sequence[tuple[float, Mapping[str, float]]]) -> dict[str, float]:
    """Merges the metrics of several processes, given with their weights.

    Means are weighted, and counts (dropped, queried, cached) are summed. The maximum is taken of times, for which all
    wait, and of device memory.
    """
    names = sorted({name for _, metrics in parts for name in metrics})
    result = {}
    for name in names:
        values = [(weight, metrics[name]) for weight, metrics in parts if name in metrics]
        total = sum(weight for weight, _ in values)
        if name.endswith("_dropped") or name.startswith(("teacher/", "cache/")):
            result[name] = sum(value for _, value in values)
        elif name.endswith("_s") or name.startswith("device/") or not total:
            result[name] = max(value for _, value in values)
        else:
            result[name] = sum(weight * value for weight, value in values) / total
    return result


def _select_device(rank_info: RankInfo) -> None:
    count = torch.cuda.device_count()
    if rank_info.local_rank >= count:
        raise StillhouseError(
            Reason.INVALID_SPEC,
            f"resources.num_processes starts process {rank_info.local_rank} (from 0) on this host, which shows it {count} "
            "devices; each process needs its own. Lower it, or give the run more devices.",
        )
    torch.cuda.set_device(rank_info.local_rank)


@contextmanager
def _connected() -> Iterator[None]:
    """Raises a collective operation that fails in the block as StillhouseError(PROCESS_DIED)."""
    try:
        yield
    except RuntimeError as error:
        raise StillhouseError(
            Reason.PROCESS_DIED,
            f"Another process of this run has ended, or did not respond for {timeout_s():g} s ({first_line(error)}). See its log; "
            "`run resume` continues from the last checkpoint, or begins again if there is none.",
        ) from error


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yields groups of neighbouring parameters of one dtype with at most BUCKET_BYTES of gradients, or a single one."""
    for _, group in itertools.groupby(parameters, key=lambda each: (each.dtype, each.device)):
        bucket: list[nn.Parameter] = []
        filled = 0
        for each in group:
            size = each.numel() * each.element_size()
            if bucket and filled + size > BUCKET_BYTES:
                yield bucket
                bucket, filled = [], 0
            bucket.append(each)
            filled += size
        if bucket:
            yield bucket
