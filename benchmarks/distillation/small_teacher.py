"""Teacher, text and batches that all students of the sparse targets' benchmark share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LENGTH, TEACHER_BATCH = 128, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Settings shared by students of all seeds and forms."""

    teacher: Any
    train: Tensor
    held_out: Tensor
    results: Path
    """Folder with one file per student."""
    sizes: Mapping[str, int]


class _Sharpened:
    """A teacher with its logits times a factor."""

    def __init__(self, model: Any, sharpness: float) -> None:
        self._model, self._sharpness = model, sharpness

    def __call__(self, **inputs: Any) -> Any:
        output = self._model(**inputs)
        output.logits = output.logits * self._sharpness
        return output


def open_setting(text: Path, work_dir: Path, sizes: Mapping[str, int], sharpness: float = 1.0) -> Setting:
    """Trains the teacher, once per work folder."""
    train, held_out = _blocks(text, sizes["vocabulary"])
    held_out = held_out[: sizes["held_out_rows"]]
    torch.manual_seed(0)
    teacher = make_model(sizes["teacher_width"], 4, sizes["vocabulary"])
    path = work_dir / "teacher-{teacher_width}-{vocabulary}-{teacher_steps}.pt".format(**sizes)
    results = path.with_suffix("") / "students-{student_width}-{student_batch}-{steps}".format(**sizes)
    if sizes["warm_steps"]:
        results = results.with_name("{}-warm-{warm_steps}".format(results.name, **sizes))
    if sharpness != 1:
        results = results.with_name(f"{results.name}-sharp-{sharpness:g}")
    results.mkdir(parents=True, exist_ok=True)
    if path.exists():
        teacher.load_state_dict(torch.load(path, weights_only=True))
    else:
        optimizer, schedule = make_optimizer(teacher, sizes["teacher_steps"])
        generator = torch.Generator().manual_seed(0)
        for _ in range(sizes["teacher_steps"]):
            batch = train[torch.randint(len(train), (TEACHER_BATCH,), generator=generator)]
            output = teacher(input_ids=batch, labels=batch, use_cache=False)
            take_step(output.loss, teacher, optimizer, schedule)
        torch.save(teacher.state_dict(), path)
    return Setting(
        teacher=_Sharpened(teacher, sharpness), train=train, held_out=held_out, results=results, sizes=sizes
    )


def batches(setting: Setting, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a seed, and the teacher's log-probabilities of each next token, [N, V]."""
    for batch in training_rows(setting, seed):
        with torch.no_grad():
            logits = setting.teacher(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        yield batch, logits.log_softmax(-1)


def training_rows(setting: Setting, seed: int) -> Iterator[Tensor]:
    """The rows of each step of a seed."""
    rows, sizes = torch.Generator().manual_seed(seed), setting.sizes
    for _ in range(sizes["steps"]):
        yield setting.train[torch.randint(len(setting.train), (sizes["student_batch"],), generator=rows)]


def _blocks(text: Path, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Rows of LENGTH ids of a byte-level BPE trained on the text; the last tenth is held out."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(text)], vocab_size=vocabulary, show_progress=False)
    ids = torch.tensor(tokenizer.encode(text.read_text()).ids)
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    num_held_out = max(1, min(len(rows) // 10, 64))
    return rows[:-num_held_out], rows[-num_held_out:]


def make_model(width: int, num_layers: int, vocabulary: int) -> Any:
    """A small Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(settings)


def make_optimizer(model: Any, steps: int) -> tuple[Any, Any]:
    """AdamW with a cosine schedule."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    # Both phases of the schedule have a step at least.
    warm_up = max(0.05, 2 / steps) if steps > 2 else 0.5
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=steps, pct_start=warm_up
    )


def take_step(loss: Tensor, model: Any, optimizer: Any, schedule: Any) -> None:
    """Takes one step down `loss`, which is divided already."""
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
