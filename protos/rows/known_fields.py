"""Fields of rows that are known, and one rule for others; a field that changes what a row means is honoured or refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

from stillhouse.protos.rows.field_error import FieldError

ExtraFields = Literal["keep", "refuse"]
EXTRA_FIELDS: tuple[ExtraFields, ...] = ("keep", "refuse")

PROMPTS = ("prompt", "messages", "token_ids")
"""Inputs of a batch row, exactly one of which it has."""
STUDENT_PROMPT = "student_prompt"
"""Prompt that a student reads in the place of a batch row's own, which its teacher alone sees."""
CONTEXT = ("system", "tools", "chat_template_kwargs")
"""Fields that make a conversation of a prompt."""
SAMPLING = ("temperature", "top_p", "top_k", "max_new_tokens", "seed", "stop")
SYNONYMS = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "n": "num_samples"}
"""OpenAI's names of settings."""
SETTINGS = (*SAMPLING, "num_samples", "adapter", *SYNONYMS)
"""Settings of a batch row; in training data, records of how a row was made."""
TRAINING = (*PROMPTS, "completion", "text", *CONTEXT)
"""Content of a training row, and of the batch row that it was."""
LABELS = (
    *("id", "custom_id", "finish_reason", "completions", "usage", "error", "user", "metadata"),
    *("num_tokens", "mean_logprob"),
)
"""Fields about a row, which change nothing."""

NO_EFFECT_ON_SAMPLING: Mapping[str, tuple[Any, ...]] = {
    "stream": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True,),
    "modalities": (["text"],),
    "best_of": (1,),
    "echo": (False,),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "logprobs": (False,),
    "top_logprobs": (0,),
}
"""Settings of other services and the values at which they do nothing; null never does anything."""
NO_EFFECT_ON_TEXT: Mapping[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "suffix": ("",),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "documents": ([],),
    "image": (),
    "images": ([],),
    "audio": (),
    "audios": ([],),
    "video": (),
    "videos": ([],),
    "weight": (1,),
    STUDENT_PROMPT: (),
}
"""Fields that would change a row's text or its part in training, and the values at which they do not."""


def without_effect(*, has_tools: bool) -> Mapping[str, tuple[Any, ...]]:
    """Returns the fields that a batch refuses unless they have no effect: with tools, no choice between them is forced."""
    return {
        **NO_EFFECT_ON_SAMPLING,
        **NO_EFFECT_ON_TEXT,
        "tool_choice": ("auto",) if has_tools else ("none", "auto"),
        "parallel_tool_calls": (True,) if has_tools else (True, False),
    }


def check_fields(
    values: Mapping[str, Any],
    *,
    known: Collection[str],
    no_effect: Mapping[str, tuple[Any, ...]],
    extra: ExtraFields,
) -> None:
    """Raises FieldError for the first field that has an effect which is not supported, or, by the rule, is unknown."""
    for name, value in values.items():
        if value is None or name in known:
            continue
        if name in no_effect:
            if not has_no_effect(name, value, no_effect):
                raise FieldError(name, "is not supported, and would change what the row means. Remove it.")
        elif extra == "refuse":
            raise unknown(name)


def has_no_effect(name: str, value: Any, no_effect: Mapping[str, tuple[Any, ...]]) -> bool:
    """Returns True if a field has a value at which it does nothing."""
    return value is None or any(_same(value, each) for each in no_effect.get(name, ()))


def unknown(name: str) -> FieldError:
    """Returns the error of a field that no rule knows."""
    return FieldError(
        name,
        "is no field of a row. Remove it, or keep extra fields (`--extra-fields keep`, data.extra_fields).",
    )


def _same(value: Any, harmless: Any) -> bool:
    return bool(value == harmless) and isinstance(value, bool) == isinstance(harmless, bool)
