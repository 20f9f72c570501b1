"""Measures one method for a student's distillation step in a process of its own: seconds per step, and growth of
memory.

Run by benchmarks/student as `python -m benchmarks.student.step_worker METHOD CHUNK STEPS SIZES`, where SIZES is JSON;
prints one line of JSON. All methods get the same student, rows and teacher, in the type of SIZES; memory counts from
before the first step, with the method's inputs in place: resident memory, or on a GPU torch's allocations. B
sequences, T positions, N = B T, V vocabulary, H hidden units, K kept tokens.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.student.sizes import K, Sizes, T

Loss = Callable[[Tensor, Tensor], Tensor]
"""Maps (hidden [N, H], weight [V, H]) to the mean loss."""


def main() -> None:
    """Measures the method named by the arguments."""
    method, chunk, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    sizes = Sizes(**json.loads(sys.argv[4]))
    with torch.device(sizes.device):
        model = _student(sizes)
        rows = _drawn(sizes, (sizes.sequences, T), seed=1)
        loss = METHODS[method](chunk, sizes)
    memory = _Memory(sizes.device)
    seconds = []
    for _ in range(steps):
        begin = memory.time()
        hidden = model.model(input_ids=rows, use_cache=False).last_hidden_state.flatten(0, 1)
        value = loss(hidden, model.lm_head.weight)
        value.backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)
        seconds.append(memory.time() - begin)
    print(json.dumps({"loss": value.item(), "seconds": seconds, "memory_mib": memory.growth_mib()}))


def _student(sizes: Sizes) -> Any:
    """Builds a Qwen2 with tied embeddings."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    settings = Qwen2Config(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=3 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads // 2,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(settings).to(_dtype(sizes))


def _dtype(sizes: Sizes) -> torch.dtype:
    found = getattr(torch, sizes.dtype)
    assert isinstance(found, torch.dtype)
    return found


def _matmul_dtype(sizes: Sizes) -> torch.dtype:
    """Matmul dtype of a run's loss on this device."""
    from stillhouse.student_trainer.config.settled.matmul_dtype import Processor, matmul_dtype

    if sizes.device != "cpu":
        return _dtype(sizes)
    found = getattr(torch, matmul_dtype(sizes.dtype, Processor.read()))
    assert isinstance(found, torch.dtype)
    return found


def _drawn(sizes: Sizes, shape: tuple[int, ...], *, seed: int) -> Tensor:
    """Random token ids, the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(0, sizes.vocabulary, shape, generator=generator, device="cpu").to(sizes.device)


def _teacher_hidden(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Teacher's hidden states [N, H] and output layer [V, H]; its logits are their matmul."""
    generator = torch.Generator("cpu").manual_seed(2)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(sizes.device)

    hidden = drawn(sizes.positions, sizes.hidden).to(_dtype(sizes))
    # Logits of standard deviation 4, whatever the width.
    weight = 4.0 / sizes.hidden**0.5 * drawn(sizes.vocabulary, sizes.hidden)
    return hidden, weight.to(_dtype(sizes))


def _teacher_top_k(sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, log-probabilities [N, K] and log-tail [N] of the teacher, as a service sends them."""
    hidden, weight = _teacher_hidden(sizes)
    ids, logprobs = [], []
    for rows in torch.split(hidden, 64):
        top = (rows @ weight.T).float().log_softmax(-1).topk(K, -1)
        ids.append(top.indices)
        logprobs.append(top.values)
    kept = torch.cat(logprobs)
    return torch.cat(ids), kept, torch.log1p(-kept.exp().sum(-1).clamp(max=1 - 1e-6))


def _text(sizes: Sizes) -> Tensor:
    return _drawn(sizes, (sizes.positions,), seed=3)


def _full(_: int, sizes: Sizes) -> Loss:
    """KL(teacher || student) on full logits of both."""
    teacher_hidden, teacher_weight = _teacher_hidden(sizes)
    teacher_logits = teacher_hidden @ teacher_weight.T

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        log_q = (hidden @ weight.T).float().log_softmax(-1)
        log_p = teacher_logits.float().log_softmax(-1)
        return functional.kl_div(log_q, log_p, reduction="sum", log_target=True) / sizes.positions

    return loss


def _ours(chunk: int, sizes: Sizes) -> Loss:
    """Forward KL on top-k and tail, fused with the output layer, as in the training step."""
    from stillhouse.student_trainer.config.schema import LossConfig
    from stillhouse.student_trainer.train.loss.fused import OutputLayer, fused_objective
    from stillhouse.student_trainer.train.loss.objective import Positions
    from stillhouse.student_trainer.train.loss.sparse import SparseTargets
    from stillhouse.student_trainer.train.loss.workspace import Workspace

    ids, logprobs, log_tail = _teacher_top_k(sizes)
    positions = Positions(
        target_ids=_text(sizes).unsqueeze(0),
        weights=torch.ones(1, sizes.positions),
        targets=SparseTargets(
            token_ids=ids.unsqueeze(0), logprobs=logprobs.unsqueeze(0), log_tail=log_tail.unsqueeze(0)
        ),
    )
    workspace = Workspace()
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # as the trainer does

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        layer = OutputLayer(weight=weight)
        total = fused_objective(
            hidden,
            layer,
            positions,
            LossConfig(),
            chunk_logits=chunk * sizes.vocabulary,
            workspace=workspace,
            matmul_dtype=_matmul_dtype(sizes),
            upstream=1 / sizes.positions,
        )
        return total.loss_sum * (1 / sizes.positions)

    return loss


class _Products(torch.autograd.Function):
    """The three matmuls of every exact loss, chunk by chunk; the values are meaningless."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, logits: Tensor, by_weight: Tensor) -> Tensor:
        wide_hidden, wide_weight = hidden.to(logits.dtype), weight.to(logits.dtype)
        by_hidden = torch.empty_like(wide_hidden)
        for first in range(0, hidden.shape[0], logits.shape[0]):
            rows = slice(first, first + logits.shape[0])
            here = logits[: hidden[rows].shape[0]]
            torch.mm(wide_hidden[rows], wide_weight.T, out=here)
            torch.mm(here, wide_weight, out=by_hidden[rows])
            by_weight.addmm_(here.T, wide_hidden[rows], beta=1.0 if first else 0.0)
        ctx.gradients = by_hidden.to(hidden.dtype), by_weight.to(weight.dtype, copy=True)
        return here[0, 0].float()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return (*ctx.gradients, None, None)


def _products(chunk: int, sizes: Sizes) -> Loss:
    """No loss: the lower bound of an exact one."""
    dtype = _matmul_dtype(sizes)
    logits = torch.empty(chunk, sizes.vocabulary, dtype=dtype)
    by_weight = torch.empty(sizes.vocabulary, sizes.hidden, dtype=dtype)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        value: Tensor = _Products.apply(hidden, weight, logits, by_weight)  # type: ignore[no-untyped-call]
        return value

    return loss


def _trl_async(chunk: int, sizes: Sizes) -> Loss:
    """TRL's AsyncDistillationTrainer: forward KL on the same top-k and tail, in recomputed chunks."""
    from trl.experimental.async_distillation import async_distillation_trainer as trl

    ids, logprobs, _ = _teacher_top_k(sizes)
    known = torch.ones_like(ids, dtype=torch.bool)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        arguments = (None, 1.0, None, ids, logprobs, known, 0.0, 1.0, True, None, 1, chunk)
        total: Tensor = trl._chunked_jsd_loss(hidden, weight, *arguments)[0]
        return total / sizes.positions

    return loss


def _trl_gkd(_: int, sizes: Sizes) -> Loss:
    """TRL's GKDTrainer: forward KL on all logits of both."""
    from trl.experimental.gkd import GKDTrainer

    teacher_hidden, teacher_weight = _teacher_hidden(sizes)
    teacher_logits = (teacher_hidden @ teacher_weight.T).unsqueeze(0)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = (hidden @ weight.T).unsqueeze(0)
        total: Tensor = GKDTrainer.generalized_jsd_loss(logits, teacher_logits, beta=0.0)
        return total / sizes.positions

    return loss


def _liger(chunk: int, sizes: Sizes) -> Loss:
    """Liger's fused linear JSD at beta 0, forward KL: it needs the teacher's hidden states and output layer here."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    teacher_hidden, teacher_weight = _teacher_hidden(sizes)
    text = _text(sizes)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        inputs = (hidden, weight, teacher_hidden, teacher_weight, text, None, None)
        total: Tensor = LigerFusedLinearJSDFunction.apply(*inputs, 0.0, 1.0, 0.0, -100, 1.0, False, chunk)
        return total

    return loss


class _Memory:
    """Timer, and memory growth since its start."""

    def __init__(self, device: str) -> None:
        gc.collect()
        self._on_gpu = device.startswith("cuda")
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() / 2**20
        else:
            self._before = _resident_mib("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")

    def time(self) -> float:
        """Seconds, once all started work is done."""
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def growth_mib(self) -> float:
        """Peak growth."""
        if self._on_gpu:
            return torch.cuda.max_memory_allocated() / 2**20 - self._before
        return _resident_mib("VmHWM") - self._before


def _resident_mib(name: str) -> float:
    """A value of /proc/self/status, such as VmHWM, the peak since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


METHODS: dict[str, Callable[[int, Sizes], Loss]] = {
    "full": _full,
    "ours": _ours,
    "products": _products,
    "trl_async": _trl_async,
    "trl_gkd": _trl_gkd,
    "liger_jsd": _liger,
}

if __name__ == "__main__":
    main()
