"""Names that other trainers give to a setting, and the field that means the same here; none stands for another meaning."""

from __future__ import annotations

import re
from collections.abc import Mapping

_ROWS_OF_A_DEVICE = (
    *("per_device_train_batch_size", "per_device_batch_size", "per_gpu_train_batch_size", "micro_batch"),
    *("micro_bsz", "train_micro_batch_size_per_gpu", "device_batch_size", "gradient_accumulation_steps"),
    *("gradient_accumulation", "grad_accumulation_steps", "grad_accum", "accumulate_grad_batches"),
    "accumulation_steps",
)
"""Parts of the product that `batch_size` is."""

_FIELDS: Mapping[str, tuple[str, ...]] = {
    "display_name": ("run_name", "experiment_name", "wandb_run_name"),
    "labels": ("tags",),
    "contexts": ("lmbda", "on_policy", "on_policy_fraction", "seq_kd", "student_data_fraction"),
    "contexts[].student.generation.max_new_tokens": ("max_completion_length", "rollout_length"),
    "contexts[].student.generation.samples_per_prompt": ("num_generations", "num_samples_per_prompt"),
    "student.model": (
        *("model_name_or_path", "model_name", "model_id", "model_path", "base_model", "pretrained_model"),
        *("student_model", "student_name_or_path", "student_model_name_or_path", "checkpoint_path"),
    ),
    "student.lora": ("peft", "use_peft", "peft_config", "use_lora", "lora_config", "qlora"),
    "student.lora.rank": ("r", "lora_r", "lora_rank", "lora_dim"),
    "student.lora.alpha": ("lora_alpha",),
    "student.lora.dropout": ("lora_dropout",),
    "student.lora.target_modules": ("lora_target_modules", "lora_modules", "lora_target"),
    "student.lora.bias": ("lora_bias",),
    "student.quantization": ("load_in_4bit", "load_in_8bit", "quantization_bit", "bnb_4bit_quant_type"),
    "student.gradient_checkpointing": ("activation_checkpointing", "use_gradient_checkpointing"),
    "student.keep_layers": ("num_hidden_layers", "num_layers", "n_layers", "layers_to_keep"),
    "teachers[].targets": (
        *(
            "teacher_model",
            "teacher_model_name_or_path",
            "teacher_name_or_path",
            "teacher_url",
            "teacher_path",
        ),
        *("base_url", "url", "host", "address", "addresses", "endpoint", "server"),
    ),
    "data.train": (
        *("dataset", "datasets", "dataset_name", "dataset_path", "train_file", "train_files"),
        *("train_data", "train_dataset", "data_path"),
    ),
    "data.eval": (
        *("eval_file", "eval_dataset", "eval_data", "validation", "validation_file", "valid", "val"),
        *("test", "dev"),
    ),
    "data.eval_fraction": (
        *("val_fraction", "validation_fraction", "validation_split", "val_split", "val_size"),
        *("val_set_size", "test_size", "validation_split_percentage"),
    ),
    "data.max_sequence_tokens": (
        *("max_length", "max_len", "max_seq_length", "max_seq_len", "max_sequence_length", "seq_len"),
        *("seq_length", "sequence_len", "sequence_length", "cutoff_len", "block_size", "context_length"),
        *("model_max_length", "max_tokens"),
    ),
    "data.packing": ("sample_packing", "pack", "packed", "pack_sequences"),
    "data.completion_only": (
        *("completion_only_loss", "assistant_only_loss", "train_on_responses_only", "mask_prompt"),
        "train_on_inputs",
    ),
    "loss.terms[].divergence": (
        *("kl_div", "kl_type", "kd_loss", "kd_loss_fn", "kd_type", "distill_loss", "distillation_loss"),
        *("loss_type", "loss_fn", "loss_function", "objective", "criterion"),
    ),
    "loss.terms[].weight": (
        *("kd_weight", "kd_ratio", "kd_coef", "kl_weight", "kl_coef", "kl_coeff", "soft_weight"),
        *("distill_weight", "distillation_weight", "alpha_kd", "lambda_kd"),
    ),
    "loss.hard_weight": (
        *("ce_weight", "hard_loss_weight", "hard_label_weight", "sft_weight", "sft_alpha", "alpha_ce"),
        *("cross_entropy_weight", "lm_weight", "lambda_ce"),
    ),
    "loss.temperature": (
        *("t", "tau", "kd_temperature", "distill_temperature", "distillation_temperature"),
        *("softmax_temperature", "teacher_temperature", "temp"),
    ),
    "loss.top_k": ("topk", "top_k_logits", "top_k_logprobs", "num_logprobs", "loss_top_k", "logprobs"),
    "optimizer.name": ("optim", "optimizer_name", "optimizer_type"),
    "optimizer.learning_rate": ("lr", "learningrate", "max_lr", "peak_lr", "base_lr"),
    "optimizer.weight_decay": ("wd", "decay", "l2"),
    "optimizer.lr_scheduler": (
        *("lr_scheduler_type", "scheduler", "schedule", "lr_schedule", "scheduler_type", "lr_decay_style"),
    ),
    "optimizer.warmup_fraction": ("warmup_ratio", "warmup", "warmup_steps", "num_warmup_steps"),
    "optimizer.batch_size": (
        *("train_batch_size", "global_batch_size", "total_batch_size", "effective_batch_size"),
        *_ROWS_OF_A_DEVICE,
    ),
    "optimizer.micro_batch_tokens": ("max_tokens_per_batch", "max_batch_tokens", "tokens_per_batch"),
    "optimizer.max_grad_norm": (
        *("gradient_clipping", "gradient_clip_val", "grad_clip", "clip_grad", "clip_grad_norm"),
        *("max_gradient_norm", "grad_norm"),
    ),
    "optimizer.epochs": ("num_train_epochs", "num_epochs", "n_epochs", "max_epochs", "train_epochs"),
    "optimizer.max_steps": (
        *("num_steps", "num_train_steps", "max_train_steps", "num_training_steps", "total_steps"),
        *("max_iters", "iterations", "train_iters"),
    ),
    "optimizer.precision": (
        *("bf16", "fp16", "fp32", "tf32", "mixed_precision", "dtype", "torch_dtype", "amp", "half"),
    ),
    "optimizer.seed": ("random_seed", "manual_seed"),
    "checkpoint": ("save", "saving", "checkpointing", "save_strategy"),
    "checkpoint.every_steps": ("save_steps", "save_interval", "checkpoint_steps", "checkpoint_interval"),
    "checkpoint.keep": ("save_total_limit", "max_checkpoints", "keep_checkpoints"),
    "evaluation": ("eval_strategy", "evaluation_strategy", "evaluate"),
    "evaluation.every_steps": ("eval_steps", "eval_interval", "eval_every", "eval_freq"),
    "evaluation.metrics": ("compute_metrics", "ppl", "perplexity", "eval_metrics"),
    "resources.gpu_count": ("num_gpus", "n_gpus", "n_gpu", "num_devices", "ngpus", "nproc_per_node"),
    "resources.gpus": ("devices", "device", "gpu_ids", "cuda_visible_devices"),
    "resources.num_processes": ("world_size", "num_proc"),
    "retry.max_attempts": ("max_retries", "retries", "num_retries"),
    "retry.teacher_wait_s": ("teacher_timeout", "teacher_timeout_s"),
}
"""Field, with [] after lists, to the other names of it."""

_NOTES: Mapping[str, tuple[str, ...]] = {
    "it is the rows of one update: those of a device times devices times accumulated passes": _ROWS_OF_A_DEVICE,
    "it is the share of all steps, not their number": ("warmup_steps", "num_warmup_steps"),
    "it lists the sources of text, each with a weight": (
        *("lmbda", "on_policy", "on_policy_fraction", "seq_kd", "student_data_fraction"),
    ),
    "it says the opposite: true leaves the prompt out of the loss": ("train_on_inputs",),
    "write nf4": ("load_in_4bit",),
    "write int8": ("load_in_8bit",),
    "write precision: bf16": ("bf16",),
    "write precision: fp16": ("fp16",),
    "write precision: fp32": ("fp32",),
    "write metrics: [perplexity]": ("ppl", "perplexity"),
    "it is a fraction, not a percentage": ("validation_split_percentage",),
    "it lists the layers that stay": ("num_hidden_layers", "num_layers", "n_layers"),
    "it is the address of a stillhouse-teacher, which has the model": (
        *("teacher_model", "teacher_model_name_or_path", "teacher_name_or_path", "teacher_path"),
    ),
}
"""Sentence on the difference, to the names whose values are others than those of the field."""

_HERE: Mapping[tuple[str, str], str] = {
    ("", "name"): 'it is "display_name" here',
    ("", "eval"): 'held-out rows are "data.eval" here, and the settings of evaluations "evaluation"',
    ("", "alpha"): (
        'the parts of the objective have "loss.terms[].weight" (teacher) and "loss.hard_weight" (text) here'
    ),
    ("", "output_dir"): "the trainer keeps what a run makes, and `stillhouse run pull` copies it",
    ("", "resume_from_checkpoint"): "`stillhouse run resume` continues a run from its last checkpoint",
    ("loss", "alpha"): (
        'the parts of the objective have "loss.terms[].weight" (teacher) and "loss.hard_weight" (text) here; '
        '"loss.terms[].alpha" is the parameter of a divergence'
    ),
    ("loss", "top_p"): 'targets are cut by "loss.top_k" alone; top_p is one of sampling, in contexts[]',
    ("", "steps"): 'it is "optimizer.max_steps" here',
    ("optimizer", "steps"): 'it is "max_steps" here',
    ("evaluation", "steps"): 'it is "every_steps" here',
    ("checkpoint", "steps"): 'it is "every_steps" here',
    ("optimizer", "momentum"): "sgd is without it here",
    ("generation", "top_k"): "text is sampled by temperature and top_p; loss.top_k is one of the targets",
}
"""Sentences for a name at one place: the section, or its last part, and the name."""

SYNONYMS: Mapping[str, str] = {name: path for path, names in _FIELDS.items() for name in names}
"""Other name to field."""
_NOTE_OF = {name: note for note, names in _NOTES.items() for name in names}


def synonym_sentence(name: str, prefix: str) -> str | None:
    """Names the field that `name` means in the section `prefix`; None if it is no other name of any."""
    section = re.sub(r"\[\d*\]", "", prefix).rpartition(".")[2]
    if (section, name) in _HERE:
        return f"there is no such field; {_HERE[section, name]}."
    if name not in SYNONYMS:
        return None
    note = f"; {_NOTE_OF[name]}" if name in _NOTE_OF else ""
    return f'there is no such field; "{SYNONYMS[name]}" is its name here{note}.'
