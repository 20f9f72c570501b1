"""Collective operations of processes, without any model: all agree, exchange, add up and leave together."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.synchronize import Event
from typing import Any

import pytest
import torch
from torch import nn

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.train.distributed.rank_env import TIMEOUT_VARIABLE, RankInfo
from stillhouse.student_trainer.train.distributed.ranks import BUCKET_BYTES, Ranks
from stillhouse.student_trainer.train.process.waiting import Stopped

PATIENCE_S = 60.0
SILENCE_S = 12
SIZE = 2


def main(rank: int, listener: int | None, port: int, part: str, started: Event) -> None:
    """Runs one of the processes; the first has the socket of the store, and waits until the second has started."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    own: dict[str, Any] = {} if listener is None else {"master_listen_fd": listener}
    store = TCPStore(
        "127.0.0.1",
        port,
        is_master=listener is not None,
        timeout=timedelta(seconds=PATIENCE_S),
        wait_for_workers=False,
        **own,
    )
    if rank == 0:
        assert started.wait(PATIENCE_S)
    started.set()
    ranks = Ranks.join(RankInfo(rank=rank, size=SIZE, local_rank=rank), store, wait_s=0)
    PARTS[part](ranks)


def check_all(ranks: Ranks) -> None:
    rank = ranks.rank
    assert ranks.exchange({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert ranks.gather(b"\0x" * (3 * rank)) == [b"", b"\0x" * 3]
    assert ranks.sum({"a": 0.1, "only": 1.0} if rank else {"a": 0.2}) == {"a": 0.2 + 0.1, "only": 1.0}
    assert [number for number in range(5) if ranks.is_mine(number)] == ([0, 2, 4] if rank == 0 else [1, 3])
    assert list(ranks.in_lockstep([1, 2], lambda: False)) == [1, 2]
    taken: list[int] = []
    with pytest.raises(Stopped):
        taken.extend(ranks.in_lockstep([1, 2, 3], lambda: rank == 1 and len(taken) == 2))
    assert taken == [1, 2]
    check_errors(ranks)
    check_gradients(ranks)
    weight = torch.full((3,), float(rank))
    ranks.broadcast([weight])
    assert weight.tolist() == [0, 0, 0]
    ranks.leave()


def check_errors(ranks: Ranks) -> None:
    done: list[int] = []

    def fail_in_second() -> None:
        done.append(ranks.rank)
        if ranks.rank == 1:
            raise StillhouseError(Reason.NON_FINITE, "non-finite.")

    expected = "^non-finite" if ranks.rank else r"^Process 1 of 2 \(from 0\): non-finite"
    with pytest.raises(StillhouseError, match=expected) as caught:
        ranks.after_first(fail_in_second)
    assert caught.value.reason is Reason.NON_FINITE
    assert done == [ranks.rank]


def check_gradients(ranks: Ranks) -> None:
    shapes = [(3, 2), (5,), (BUCKET_BYTES // 4 + 1,), (2,)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    parameters[0].grad = torch.full((3, 2), 1.0 + ranks.rank)
    if ranks.rank == 1:
        parameters[1].grad = torch.arange(5.0)
    parameters[2].grad = torch.ones(shapes[2])
    ranks.sum_gradients(parameters)
    first, second, large, nobody = (each.grad for each in parameters)
    assert first is not None
    assert torch.equal(first, torch.full((3, 2), 3.0))
    assert second is not None
    assert torch.equal(second, torch.arange(5.0))
    assert large is not None
    assert bool((large == 2).all())
    assert nobody is None


def wait_in_vain(ranks: Ranks) -> None:
    """The second process never responds; the first gives up."""
    if ranks.rank == 1:
        ranks.exchange(None)
        multiprocessing.Event().wait(PATIENCE_S)
    ranks.exchange(None)
    with pytest.raises(StillhouseError, match=f"did not respond for {SILENCE_S} s") as caught:
        ranks.exchange("anybody there?")
    assert caught.value.reason is Reason.PROCESS_DIED


PARTS: dict[str, Callable[[Ranks], None]] = {"all": check_all, "silent": wait_in_vain}


@pytest.mark.parametrize("part", PARTS)
def test_processes_agree(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv(TIMEOUT_VARIABLE, f"{SILENCE_S if part == 'silent' else PATIENCE_S:g}")
    spawn = multiprocessing.get_context("spawn")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(SIZE)
        port = listener.getsockname()[1]
        started = spawn.Event()
        second = spawn.Process(target=main, args=(1, None, port, part, started))
        second.start()
        try:
            main(0, os.dup(listener.fileno()), port, part, started)
            if part == "all":
                second.join(PATIENCE_S)
                assert second.exitcode == 0
        finally:
            second.kill()
            second.join()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
