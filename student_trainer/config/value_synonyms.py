"""Names that other trainers give to the values of a choice, and the value that means the same here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_VALUES: Mapping[str, tuple[str, ...]] = {
    "distil": ("distill", "distillation", "train", "kd"),
    "forward_kl": ("kl", "kl_div", "kld", "kl_divergence", "fkl", "fkld", "forward_kld"),
    "reverse_kl": ("rkl", "rkld", "reverse_kld", "kl_reverse"),
    "jsd": ("js", "js_div", "js_divergence", "jensen_shannon", "gjsd"),
    "tvd": ("tv", "total_variation", "total_variation_distance"),
    "skew_kl": ("skl", "skew_forward_kl", "sfkl"),
    "skew_reverse_kl": ("srkl",),
    "alpha_beta": ("ab", "ab_divergence", "alpha_beta_divergence"),
    "adaptive_kl": ("akl",),
    "mse": ("l2", "mse_loss", "logit_mse", "mean_squared_error"),
    "kl": ("kl_div", "kld", "kl_divergence"),
    "perplexity": ("ppl",),
    "cross_entropy": ("ce", "nll", "loss", "eval_loss"),
    "bf16": ("bfloat16",),
    "fp16": ("float16", "half"),
    "fp32": ("float32", "float", "full"),
    "bfloat16": ("bf16",),
    "float16": ("fp16", "half"),
    "float32": ("fp32", "float"),
    "adamw": ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_fused", "adam_w"),
    "adamw_8bit": ("adamw_bnb_8bit", "adamw8bit"),
    "cosine": ("cosine_with_warmup", "cosine_annealing", "cos"),
    "linear": ("linear_with_warmup",),
    "constant": ("constant_with_warmup", "none"),
    "nf4": ("int4", "4bit", "bnb_4bit", "bitsandbytes_4bit", "bitsandbytes"),
    "int8": ("8bit", "bnb_8bit", "bitsandbytes_8bit", "llm_int8"),
    "truncate": ("truncation", "cut"),
    "drop": ("skip", "filter", "discard"),
    "merged": ("merge", "full"),
    "adapter": ("lora",),
    "token_mean": ("token", "per_token"),
    "sequence_mean": ("sequence", "sample_mean"),
    "renormalise": ("renormalize", "renormalised"),
    "tail_bucket": ("tail", "bucket"),
    "sampled": ("sample", "samples", "draws", "random_sampling"),
    "read": ("ro", "read_only", "readonly"),
    "write_through": ("rw", "write", "read_write"),
    "only": ("offline",),
}
"""Value to the other names of it; the choices of a field decide between values of one name."""


def nearest_value(value: str, choices: Sequence[str]) -> str | None:
    """Returns the one of `choices` that other trainers call `value`, in lower case with underscores."""
    return next((choice for choice in choices if value in _VALUES.get(choice, ())), None)
