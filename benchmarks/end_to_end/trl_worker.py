"""Trains with TRL, in an environment that has it: `python -m benchmarks.end_to_end.trl_worker ARM WORK SIZES FOLDER MINUTES [URL]`.

Arms: "local" is GKDTrainer on given texts with a teacher in the process; "server" is ServerDistillationTrainer against
`vllm serve`, which gets the given texts where it would generate its own; "gkd" and "distillation" write the student's own
texts, "-lora" with an adapter. Model, rows, order, optimiser and steps are those of Stillhouse's arms. Prints one line of
JSON for each step, with its time, and saves students into FOLDER.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks.end_to_end.sizes import Sizes, Work

TOP_K = 64
"""Top-k of the server's teacher: Stillhouse's own default where a bucket stands for the tail."""
LORA_RANK = 16


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Reports steps, saves students, and ends the run at its limit."""

    def __init__(self, folder: Path, sizes: Sizes, limit_s: float) -> None:
        self._folder, self._sizes, self._until_s = folder, sizes, time.monotonic() + limit_s

    def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
        """Tells when the first step begins."""
        _say(event="started")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Tells when a step has ended."""
        step = int(state.global_step)
        _say(event="step", step=step)
        over = time.monotonic() > self._until_s
        if step in self._sizes.snapshots or over:
            _save(kwargs["model"], self._folder / str(step))
        if over:
            control.should_training_stop = True


def _say(**values: Any) -> None:
    print(json.dumps({"time": time.time(), **values}), flush=True)


def _save(model: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "peft_config"):
        model.save_pretrained(folder)
        return
    torch.save(
        {name: each.detach().clone() for name, each in model.state_dict().items()}, folder / "weights.pt"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """One arm."""

    work: Work
    sizes: Sizes
    folder: Path
    url: str
    """Address of `vllm serve`, for the arm that asks one."""
    options: dict[str, Any]
    """Arguments of every trainer: model, tokenizer, callbacks and adapter."""

    def teacher(self) -> Any:
        """The teacher in this process."""
        return AutoModelForCausalLM.from_pretrained(
            self.work.teacher, dtype=getattr(torch, self.sizes.teacher_dtype)
        )


def main() -> None:
    """Trains one arm."""
    arm, work, sizes = sys.argv[1], Work(Path(sys.argv[2])), Sizes(**json.loads(sys.argv[3]))
    folder, minutes = Path(sys.argv[4]), float(sys.argv[5])
    kind, _, lora = arm.partition("-")
    base = work.student if kind in {"local", "server"} else work.warm_student
    options = {
        "model": AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        "processing_class": AutoTokenizer.from_pretrained(work.teacher),
        "callbacks": [_Watch(folder, sizes, 60 * minutes)],
        "peft_config": _lora() if lora else None,
    }
    make = {"local": _local, "server": _server, "gkd": _gkd, "distillation": _distillation}[kind]
    url = sys.argv[6] if len(sys.argv) > 6 else ""
    trainer = make(_Job(work=work, sizes=sizes, folder=folder, url=url, options=options))
    trainer.train()
    _say(event="done", step=int(trainer.state.global_step))


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def _settings(job: _Job) -> dict[str, Any]:
    sizes = job.sizes
    return {
        "output_dir": str(job.folder / "trainer"),
        "per_device_train_batch_size": sizes.batch,
        "gradient_accumulation_steps": 1,
        "max_steps": sizes.steps,
        "learning_rate": sizes.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "bf16": sizes.precision == "bf16",
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": sizes.seed,
    }


def _padded(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> torch.Tensor:
    longest = max(map(len, rows))
    filled = [
        [value] * (longest - len(row)) + list(row) if left else list(row) + [value] * (longest - len(row))
        for row in rows
    ]
    return torch.tensor(filled)


def _texts(work: Work) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(work.rows.read_text())
    return rows


def _text_batch(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Collates rows as GKDTrainer does, padded to the longest of a batch; labels are those that Stillhouse trains on."""
    labels = [
        [token if own else -100 for token, own in zip(row["token_ids"], row["mask"], strict=True)]
        for row in rows
    ]
    ids = [row["token_ids"] for row in rows]
    first = torch.tensor([row[:1] for row in ids])
    return {
        "input_ids": _padded(ids, 0),
        "attention_mask": _padded([[1] * len(row) for row in ids], 0),
        "labels": _padded(labels, -100),
        "prompts": first,
        "prompt_attention_mask": torch.ones_like(first),
    }


def _prompt_batch(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """As GKDTrainer's own collator has it: whole rows, in whose place the student's texts come, and their prompts."""
    ids = [row["token_ids"][: row["num_prompt"]] for row in rows]
    return {
        **_text_batch(rows),
        "prompts": _padded(ids, 0, left=True),
        "prompt_attention_mask": _padded([[1] * len(row) for row in ids], 0, left=True),
    }


def _local(job: _Job) -> Any:
    return _gkd_trainer(job, _texts(job.work), _text_batch, lmbda=0.0, beta=0.0)


def _gkd(job: _Job) -> Any:
    rows = json.loads(job.work.prompt_rows(job.sizes).read_text())
    return _gkd_trainer(job, rows, _prompt_batch, lmbda=1.0, beta=1.0)


def _gkd_trainer(
    job: _Job, rows: Sequence[dict[str, Any]], collate: Any, *, lmbda: float, beta: float
) -> Any:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class Trainer(GKDTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    return Trainer(
        teacher_model=job.teacher(),
        args=GKDConfig(
            **_settings(job),
            lmbda=lmbda,
            beta=beta,
            temperature=1.0,
            max_new_tokens=job.sizes.new_tokens,
            max_length=None,
        ),
        data_collator=collate,
        train_dataset=Dataset.from_list([dict(each) for each in rows]),
        **job.options,
    )


def _distillation(job: _Job) -> Any:
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    rows = json.loads(job.work.prompt_rows(job.sizes).read_text())
    tokenizer = job.options["processing_class"]
    prompts = [row["token_ids"][: row["num_prompt"]] for row in rows]
    return DistillationTrainer(
        teacher_model=job.teacher(),
        args=DistillationConfig(
            **_settings(job),
            beta=1.0,
            max_completion_length=job.sizes.new_tokens,
            shuffle_dataset=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": tokenizer.decode(each)} for each in prompts]),
        **job.options,
    )


def _server(job: _Job) -> Any:
    from datasets import Dataset
    from trl.experimental.server_distillation import ServerDistillationConfig, ServerDistillationTrainer

    class Trainer(ServerDistillationTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            """The given texts in the place of generated ones."""
            begins = [row["mask"].index(True) for row in inputs]
            prompts, completions = zip(
                *(
                    (row["token_ids"][:at], row["token_ids"][at:])
                    for row, at in zip(inputs, begins, strict=True)
                ),
                strict=True,
            )
            mask = _padded([[1] * len(each) for each in completions], 0)
            return {
                "prompt_ids": _padded(prompts, 0, left=True),
                "prompt_mask": _padded([[1] * len(each) for each in prompts], 0, left=True),
                "completion_ids": _padded(completions, 0),
                "completion_mask": mask,
                "num_items_in_batch": mask.sum(),
            }

    return Trainer(
        args=ServerDistillationConfig(
            **_settings(job),
            teacher_model_server_url=job.url,
            beta=0.0,
            loss_top_k=TOP_K,
            loss_add_tail=True,
            max_completion_length=job.sizes.length,
            shuffle_dataset=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": "", **each} for each in _texts(job.work)]),
        **job.options,
    )


if __name__ == "__main__":
    main()
