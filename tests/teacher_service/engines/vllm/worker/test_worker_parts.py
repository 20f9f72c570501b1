"""Rows between vLLM's worker and front end, and the threads that compute them: the parts that need no model."""

from __future__ import annotations

import pickle
import threading
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed")

from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists

from stillhouse.teacher_service.engines.vllm.logprobs_processor import RawRows, _processor
from stillhouse.teacher_service.engines.vllm.worker.cpu_threads import HelperThreads
from stillhouse.teacher_service.engines.vllm.worker.eager_ranks import count_eagerly
from stillhouse.teacher_service.engines.vllm.worker.extension import PromptScorer
from stillhouse.teacher_service.engines.vllm.worker.request_plan import STREAM_INTERVAL_TOKENS
from stillhouse.teacher_service.engines.vllm.worker.row_buffer import OutgoingRows, RowBuffer, is_due, known


def block(first: int, count: int, width: int = 3) -> tuple[Any, Any]:
    ids = np.arange(first, first + count, dtype=np.int32)[:, None].repeat(width, axis=1)
    return ids, ids.astype(np.float32)


def test_slices_keep_blocks_and_order() -> None:
    rows = RawRows([block(0, 1), block(1, 4), block(5, 2, width=2)])
    assert len(rows) == 7
    assert len(rows[:0]) == 0
    last = rows[-3:]
    assert [len(ids) for ids, _ in last.blocks] == [1, 2]
    assert last.joined()[0].tolist() == [[4, 4], [5, 5], [6, 6]]
    assert len(rows) == 7
    rows.extend(RawRows([block(7, 1)]))
    ids, values = rows[-5:].joined()
    assert ids[:, 0].tolist() == values[:, 0].tolist() == [3, 4, 5, 6, 7]


def test_rows_are_emitted_once_and_in_order() -> None:
    processor = _processor(LogprobsProcessor)(
        tokenizer=None,
        logprobs=RawRows(),
        prompt_logprobs=None,
        cumulative_logprob=None,
        num_logprobs=1,
        num_prompt_logprobs=None,
    )
    emitted = []
    for first in (0, 4):
        for token in range(first, first + 4):
            rows = LogprobsLists(*block(token, 1), np.zeros(1, np.int32))
            processor.update_from_output(
                EngineCoreOutput(request_id="0", new_token_ids=[token], new_logprobs=rows)
            )
        emitted.append(processor.logprobs[-4:])
        assert processor.pop_prompt_logprobs() is None
        assert len(processor.logprobs) == 0
    assert [rows.joined()[0][:, 0].tolist() for rows in emitted] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_buffered_rows_are_released_in_the_order_of_their_steps() -> None:
    held = RowBuffer([(known(*block(10 * step, 3)), step % 3) for step in range(5)])
    ids, values, _ = held.drain()
    assert ids[:, 0].tolist() == values[:, 0].tolist() == [0, 11, 22, 30, 41]
    assert held.rows == []


def test_outgoing_rows_can_be_pickled_and_hold_only_released_requests() -> None:
    leaving = pickle.loads(pickle.dumps(OutgoingRows({2: (*block(5, 2), np.empty(0, np.int32))}).tolists()))
    assert leaving.slice_request(0, 1) is None
    assert leaving.slice_request(2, 1).logprob_token_ids[:, 0].tolist() == [5, 6]


def test_rows_are_released_when_the_front_end_emits_them() -> None:
    def due(written: int, token: int = 9) -> bool:
        params = SimpleNamespace(max_tokens=60, stop_token_ids=[5], eos_token_id=None)
        return is_due(params, token, written=written, room=50)

    assert [each for each in range(49) if due(each)] == [0, *range(16, 49, STREAM_INTERVAL_TOKENS)]
    assert due(7, token=5)
    assert due(59)  # max_tokens
    assert due(49)  # prompt and sample fill the model


@pytest.mark.parametrize("count", [0, 1, 3])
def test_helpers_do_all_work_and_raise_its_errors(count: int) -> None:
    helpers, done, threads = HelperThreads(count), set(), set()

    def work(number: int) -> None:
        assert torch.is_inference_mode_enabled()
        threads.add(threading.get_ident())
        done.add(number)
        if number == 40:
            raise ValueError("forty")

    with torch.inference_mode():
        with helpers.sharing() as share:
            for number in range(40):
                share(partial(work, number))
        assert done == set(range(40))
        assert len(threads) <= count + 1
        with pytest.raises(ValueError, match="forty"), helpers.sharing() as share:
            share(partial(work, 40))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_deferred_results_come_from_any_thread_and_are_few_at_once(count: int) -> None:
    helpers, held, begun = HelperThreads(count), threading.Event(), threading.Event()

    def first() -> int:
        begun.set()
        assert held.wait(10)
        return -1

    def work(number: int) -> int:
        assert torch.is_inference_mode_enabled()
        if number == 20:
            raise ValueError("twenty")
        return number

    with torch.inference_mode():
        if not count:
            held.set()
        slow = helpers.defer(first)
        if count:
            assert begun.wait(10), "a helper begins before anybody needs the result"
        # This thread does what no helper has begun; the third waits for the first.
        threading.Timer(0.1, held.set).start()
        results = [helpers.defer(partial(work, number)) for number in range(20)]
        assert held.is_set()
        assert slow.result() == -1
        assert [each.result() for each in results] == [each.result() for each in results] == [*range(20)]
        wrong = helpers.defer(partial(work, 20))
        for _ in range(2):
            with pytest.raises(ValueError, match="twenty"):
                wrong.result()


def test_ranks_are_counted_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.sample import sampler

    monkeypatch.setattr(sampler, "batched_count_greater_than", sampler.batched_count_greater_than)
    assert hasattr(sampler.batched_count_greater_than, "_torchdynamo_orig_callable"), "vLLM compiles it"
    count_eagerly()
    assert not hasattr(sampler.batched_count_greater_than, "_torchdynamo_orig_callable")
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-3.0, -1.0, -2.0]])
    assert sampler.batched_count_greater_than(logprobs, torch.tensor([[-2.0], [-1.0]])).tolist() == [2, 1]


@pytest.mark.parametrize(
    ("vocab_size", "hidden_size", "rows"),
    [
        (32_000, 256, 131),  # the layer stays in a cache, and so do its logits
        (32_000, 1024, 524),  # each chunk reads the layer again
        (1024, 64, 4096),
    ],
)
def test_chunks_of_logits_are_small_beside_a_layer_that_stays_in_a_cache(
    vocab_size: int, hidden_size: int, rows: int
) -> None:
    runner = SimpleNamespace(
        model=torch.nn.Module(),
        device=torch.device("cpu"),
        input_batch=SimpleNamespace(vocab_size=vocab_size),
        max_num_reqs=8,
    )
    scorer = PromptScorer(runner, lambda *_: {}, HelperThreads(0))
    assert scorer._chunk_rows(5000, hidden_size, None) == rows
