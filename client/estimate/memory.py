"""Predicts the memory that training a student and serving a teacher take, from shapes; an estimate, not a promise.

Counted are weights, gradients, optimizer states, activations, hidden states that are compared, and the logits of one chunk. The constants
follow the training process: trained weights and their gradients are float32, a frozen base is bfloat16 on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from stillhouse.client.core.errors import usage_error
from stillhouse.client.estimate.hidden_states import HiddenPlan
from stillhouse.client.estimate.model_shape import ModelShape
from stillhouse.client.runfile.schema import setting
from stillhouse.protos.rpc.channel import is_loopback
from stillhouse.protos.stillhouse.v1.run_pb2 import LoraSpec, OptimizerSpec, RunSpec

FLOAT_BYTES, HALF_BYTES = 4, 2
ROWS = 8
"""Rows of an update, or of a forward pass in a file that cuts by rows, where the file does not say."""
AUTO_TOKENS: Mapping[str, int] = {"cpu": 4096, "gpu": 16384}
"""Tokens of a forward pass at most, where the file leaves them to the training process."""
CPU_CHUNK_LOGITS, GPU_CHUNK_LOGITS = 2**26, 2**28
CPU_CHUNK_ROWS = 1024
PROCESS_BYTES: Mapping[str, int] = {"cpu": 600 * 2**20, "gpu": 900 * 2**20}
"""Bytes of a training process without a model: libraries, and on a GPU its context."""
SLACK = 0.1
"""Share on top for what an allocator cannot use."""
OPTIMIZER_BYTES = {"adamw": 8, "adam": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "sgd": 0}
_LINEAR_BYTES = {"int8": 1.0, "nf4": 0.56}


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """The settings of a run that decide its memory."""

    device: str
    """ "cpu" or "gpu"."""
    pass_tokens: int
    """Tokens of the largest forward pass, padding included."""
    rows_per_pass: int | None
    """Rows of a pass in a file that cuts by rows; None where passes are cut by tokens."""
    sequence_tokens: int
    lora_rank: int | None
    """None trains every weight."""
    quantization: str
    checkpointing: bool
    optimizer: str
    half: bool
    """True if it computes in 16 bits."""
    hidden: HiddenPlan | None = None
    """Comparison of hidden states, if there is one."""

    @classmethod
    def from_spec(cls, spec: RunSpec, device: str) -> MemoryPlan:
        """The plan of a run file, with the defaults of a run; its hidden states are added `with_hidden`."""
        student, optimizer = spec.student, spec.optimizer
        adapter = student.HasField("lora") or bool(student.adapter)
        name = setting(optimizer, "name")
        if name not in OPTIMIZER_BYTES:
            raise usage_error(f"optimizer.name is {name!r}; known are {', '.join(sorted(OPTIMIZER_BYTES))}.")
        precision = optimizer.precision or ("bf16" if device == "gpu" else "fp32")
        return cls(
            device=device,
            pass_tokens=_pass_tokens(spec, device),
            rows_per_pass=_rows_per_pass(optimizer),
            sequence_tokens=setting(spec.data, "max_sequence_tokens"),
            lora_rank=setting(student.lora, "rank") if adapter else None,
            quantization=setting(student, "quantization"),
            checkpointing=student.gradient_checkpointing,
            optimizer=name,
            half=precision != "fp32",
        )

    def with_hidden(self, spec: RunSpec, student: ModelShape, teacher: ModelShape) -> MemoryPlan:
        """The plan with the hidden states that a run file compares."""
        optimizer = spec.optimizer
        if self.rows_per_pass is None:
            rows = optimizer.batch_size or ROWS
        else:
            rows = self.rows_per_pass * (optimizer.grad_accum_steps or 1)
        return replace(self, hidden=HiddenPlan.from_spec(spec, student, teacher, rows=rows))


def _rows_per_pass(optimizer: OptimizerSpec) -> int | None:
    if optimizer.HasField("micro_batch_size") or optimizer.HasField("grad_accum_steps"):
        return optimizer.micro_batch_size or ROWS
    return None


def _pass_tokens(spec: RunSpec, device: str) -> int:
    longest = int(setting(spec.data, "max_sequence_tokens"))
    rows = _rows_per_pass(spec.optimizer)
    if rows is not None:
        return rows * longest
    tokens = spec.optimizer.micro_batch_tokens or AUTO_TOKENS[device]
    return max(1, min(tokens // longest, spec.optimizer.batch_size or ROWS)) * longest


def student_bytes(shape: ModelShape, plan: MemoryPlan) -> dict[str, int]:
    """Bytes by purpose, at the peak of a step."""
    element = HALF_BYTES if plan.half else FLOAT_BYTES
    trained = shape.parameters if plan.lora_rank is None else shape.lora(plan.lora_rank)
    if plan.hidden is not None:
        trained += plan.hidden.projections(shape)
    frozen = 0 if plan.lora_rank is None else _frozen(shape, plan)
    parts = {
        "weights": frozen + FLOAT_BYTES * trained,
        "gradients": FLOAT_BYTES * trained,
        "optimizer": OPTIMIZER_BYTES[plan.optimizer] * trained,
        "activations": _activations(shape, plan, element),
        "logits": _logits(shape, plan, element),
        "process": PROCESS_BYTES[plan.device],
    }
    if plan.half and plan.lora_rank is None:
        parts["weights"] += HALF_BYTES * shape.parameters  # the copies that autocast computes with
    if plan.hidden is not None:
        parts["hidden states"] = plan.hidden.pass_bytes(shape, plan.pass_tokens, element)
        if plan.device == "cpu":
            parts["hidden states"] += plan.hidden.ahead_bytes(plan.sequence_tokens)
    return parts | {"slack": round(SLACK * (sum(parts.values()) - parts["process"]))}


def _frozen(shape: ModelShape, plan: MemoryPlan) -> int:
    element = HALF_BYTES if plan.half else FLOAT_BYTES
    linear = _LINEAR_BYTES.get(plan.quantization, element)
    return round(linear * shape.linear + element * (shape.parameters - shape.linear))


def _activations(shape: ModelShape, plan: MemoryPlan, element: int) -> int:
    """Activations that layers keep for the backward pass; attention itself is computed without its matrix of weights.

    A layer keeps for each token: its input, both norms' inputs and outputs (6 hidden), queries, keys, values and the
    output of attention, and of the feed-forward part its inner vectors: gate, up, activation and product where gated.
    """
    tokens = plan.pass_tokens
    heads = 2 * shape.head_dim * (shape.heads + shape.kv_heads)
    inner = (shape.matrices + 1) * shape.inner * shape.active_experts
    layer = element * tokens * (6 * shape.hidden + heads + inner)
    if plan.checkpointing:
        return layer + element * tokens * shape.hidden * shape.layers
    return layer * shape.layers


def _logits(shape: ModelShape, plan: MemoryPlan, element: int) -> int:
    """One chunk's logits, which their gradient overwrites; on a GPU also their float32 exponentials."""
    if plan.device == "cpu":
        return element * min(min(plan.pass_tokens, CPU_CHUNK_ROWS) * shape.vocab, CPU_CHUNK_LOGITS)
    return (element + FLOAT_BYTES) * min(plan.pass_tokens * shape.vocab, GPU_CHUNK_LOGITS)


def teacher_bytes(shape: ModelShape, *, dtype_bytes: float, sequence_tokens: int) -> dict[str, int]:
    """Bytes that a teacher needs at least: weights, keys and values of one longest sequence, and a chunk of logits."""
    parts = {
        "weights": round(
            dtype_bytes * shape.linear + max(HALF_BYTES, dtype_bytes) * (shape.parameters - shape.linear)
        ),
        "keys and values": shape.cache_per_token(HALF_BYTES) * sequence_tokens,
        "logits": FLOAT_BYTES * min(sequence_tokens, 1024) * shape.vocab,
        "process": PROCESS_BYTES["gpu"],
    }
    return parts | {"slack": round(SLACK * (sum(parts.values()) - parts["process"]))}


def num_sharing(spec: RunSpec, device: str) -> int:
    """Training processes that share one device: all of them on a CPU, one on a GPU."""
    return max(1, spec.resources.num_processes) if device == "cpu" else 1


def is_beside_trainer(spec: RunSpec) -> bool:
    """True if a teacher of the run is on the trainer's host, as far as the addresses tell; also if there are none."""
    targets = [target for each in spec.teachers for target in each.targets]
    return not targets or any(map(is_loopback, targets))


def remedies(shape: ModelShape, plan: MemoryPlan) -> Iterator[tuple[str, int]]:
    """Changes that lower the student's memory, and the bytes that it then takes; each alone."""
    now = sum(student_bytes(shape, plan).values())
    shorter = plan.sequence_tokens // 2
    fewer = max(1, plan.pass_tokens // plan.sequence_tokens // 2)
    half = replace(plan, pass_tokens=fewer * plan.sequence_tokens)
    named = f"optimizer.micro_batch_tokens: {half.pass_tokens}"
    if plan.rows_per_pass is not None:
        named = f"optimizer.micro_batch_size: {fewer}, with twice optimizer.grad_accum_steps"
    lora = replace(plan, lora_rank=plan.lora_rank or setting(LoraSpec(), "rank"))
    tried = {
        named: half,
        "student.gradient_checkpointing: true": replace(plan, checkpointing=True),
        f"data.max_sequence_tokens: {shorter}": replace(
            plan,
            sequence_tokens=shorter,
            pass_tokens=plan.pass_tokens if plan.pass_tokens > plan.sequence_tokens else shorter,
        ),
        "student.lora: {}": lora,
        "student.lora: {} and student.quantization: nf4": replace(lora, quantization="nf4"),
    }
    if plan.hidden is not None and plan.hidden.num_pairs > 1:
        tried["one pair in loss.hidden_mse.layers"] = replace(plan, hidden=plan.hidden.last_pair())
    for sentence, other in tried.items():
        bytes_then = sum(student_bytes(shape, other).values())
        if bytes_then < now:
            yield sentence, bytes_then
