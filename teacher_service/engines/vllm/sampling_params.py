"""What vLLM is asked for one sequence or one sample: the public options of its sampling parameters."""

from __future__ import annotations

from typing import Any

import numpy as np

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.engine import (
    DistributionOptions,
    EngineInfo,
    Float32Array,
    GenerateInput,
    Int32Array,
)
from stillhouse.teacher_service.engines.vllm.errors import engine_dead
from stillhouse.teacher_service.engines.vllm.worker.request_plan import KEEP_ARRAYS, STREAM_INTERVAL_TOKENS

TEMPERATURES = (0.01, 2.0)
"""Lowest and highest temperature, besides 0, that vLLM samples at."""
# Ids that pad the output layer are kept out of samples by a bias, of which vLLM takes so many at a request.
_MAX_BIASED_IDS = 1024
_BIAS = -1e9


class SamplingParamsBuilder:
    """Makes requests for one model."""

    def __init__(self, info: EngineInfo) -> None:
        self._info = info
        padding = range(info.tokenizer_size, info.vocab_size)
        self._bias = dict.fromkeys(padding, _BIAS) if 0 < len(padding) <= _MAX_BIASED_IDS else None

    def columns(self, options: DistributionOptions) -> int:
        """Candidates of a row: no more than there are tokens."""
        return min(options.top_k, self._info.vocab_size)

    def prompt_params(self, top_k: int, forced: int | None) -> Any:
        """Parameters that report every position of a prompt, and write one token.

        `forced` is the token to write, whose row is then reported too; with None it is of no account.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=top_k,
            logprobs=None if forced is None else top_k,
            # Raw logprobs are taken before the choice is narrowed to one token.
            allowed_token_ids=None if forced is None else [forced],
            detokenize=False,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            ignore_eos=True,
            skip_clone=True,
        )

    def sample_params(self, item: GenerateInput) -> Any:
        """Parameters that write one sample. Raises `StillhouseError` (INVALID_REQUEST) for a temperature beyond vLLM's."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        low, high = TEMPERATURES
        if item.temperature != 0 and not low <= item.temperature <= high:
            raise StillhouseError(
                Reason.INVALID_REQUEST,
                f"temperature is {item.temperature:g}; the vllm engine samples at 0 (greedily) and from {low:g} to "
                f"{high:g}. Choose one of these, or use a teacher started with --engine hf.",
            )
        return SamplingParams(
            **self._sampling_fields(item),
            max_tokens=min(item.max_new_tokens, self._info.max_sequence_tokens - len(item.token_ids)),
            # The token alone is always asked for: it shows whether the model's numbers are numbers.
            logprobs=0 if item.options is None else self.columns(item.options),
            logit_bias=self._bias,
            stop_token_ids=list(self._info.eos_token_ids),
            ignore_eos=True,  # the ids above are all that end a sample
            detokenize=False,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY if item.whole else RequestOutputKind.DELTA,
            stream_interval=STREAM_INTERVAL_TOKENS,
        )

    def keep_arrays(self, params: Any) -> Any:
        """The same parameters for a request whose rows the front end leaves alone."""
        params.extra_args = {**(params.extra_args or {}), **KEEP_ARRAYS}
        return params

    def planned_prompt_params(self, argument: dict[str, Any], *, reuse: bool) -> Any:
        """Parameters of a prompt whose rows the worker's extension makes, from `ScorePlan.to_extra_args`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            extra_args=argument,
            skip_reading_prefix_cache=not reuse,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            ignore_eos=True,
            skip_clone=True,
        )

    def planned_sample_params(self, item: GenerateInput, argument: dict[str, Any]) -> Any:
        """Parameters of a sample whose tokens the worker's extension draws, from `SamplingPlan.to_extra_args`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=min(item.max_new_tokens, self._info.max_sequence_tokens - len(item.token_ids)),
            temperature=0.0,  # vLLM's own sampler has nothing to do
            logprobs=0,
            extra_args=argument,
            stop_token_ids=list(self._info.eos_token_ids),
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY if item.whole else RequestOutputKind.DELTA,
            stream_interval=STREAM_INTERVAL_TOKENS,
            skip_clone=True,
        )

    def _sampling_fields(self, item: GenerateInput) -> dict[str, Any]:
        """How tokens are drawn, by vLLM or, with a seed on a CPU, by `vllm_seeds`."""
        from vllm.platforms import current_platform

        if item.temperature == 0:
            return {"temperature": 0.0}
        if item.seed is not None and current_platform.is_cpu():
            from stillhouse.teacher_service.engines.vllm.worker.seeded_logits_processor import (
                sampling_argument,
            )

            return {
                "temperature": 0.0,
                "extra_args": sampling_argument(item, num_valid=self._info.tokenizer_size),
            }
        return {
            "temperature": item.temperature,
            "top_p": item.top_p,
            "top_k": item.top_k if self._truncates(item.top_k) else 0,
            # vLLM takes -1 for "no seed"; without the sign every seed is one.
            "seed": None if item.seed is None else item.seed & (2**63 - 1),
        }

    def sampling_logprobs(
        self, item: GenerateInput, num_tokens: int, rows: Distributions | None
    ) -> Float32Array:
        """[n], or empty where vLLM does not tell: see `VllmEngine`."""
        if item.temperature == 0:
            return np.zeros(num_tokens, dtype=np.float32)
        if rows is None or not self._samples_raw(item):
            return np.zeros(0, dtype=np.float32)
        return rows.target_logprobs

    def require_known(self, token_ids: Int32Array) -> None:
        """Raises `StillhouseError` (TOKEN_OUT_OF_RANGE) for ids that only padding beyond what can be biased lets through."""
        if len(token_ids) and int(token_ids.max()) >= self._info.tokenizer_size:
            raise StillhouseError(
                Reason.TOKEN_OUT_OF_RANGE,
                f"The model wrote the id {int(token_ids.max())}, and its tokenizer knows {self._info.tokenizer_size}. "
                "Ask again with another seed.",
            )

    def _samples_raw(self, item: GenerateInput) -> bool:
        return (
            item.temperature == 1
            and item.top_p == 1
            and not self._truncates(item.top_k)
            and self._bias is None
        )

    def _truncates(self, top_k: int) -> bool:
        return 0 < top_k < self._info.vocab_size


def require_whole(reason: str | None) -> None:
    """Raises `StillhouseError` for an output that was cut off because vLLM goes away."""
    if reason not in {None, "stop", "length"}:
        raise engine_dead()
