"""vLLM plug-in: bounds prefix-cache hits of scored prompts, clears stale NaN from cache blocks, bounds prompt reading during
generation, and encodes rows that are still computed.

vLLM loads it in each of its processes (entry point `vllm.general_plugins`). It does nothing unless the variable below
is set, and then nothing to requests without Stillhouse's argument.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from stillhouse.teacher_service.engines.vllm.worker import linear_lora, lm_head_lora
from stillhouse.teacher_service.engines.vllm.worker.request_plan import score_start
from stillhouse.teacher_service.engines.vllm.worker.row_buffer import PendingArray

VARIABLE = "STILLHOUSE_VLLM_PLUGIN"
"""Set to its process id while a teacher starts its vLLM."""
BESIDE_WRITERS = 512
"""Prompt tokens read by a CPU step that also generates: it takes two to three times as long as one that only
generates some dozens."""
_LOOKUPS = ["self", "request"], ["self", "request", "max_cache_hit_length"]
"""Parameters of the prefix cache's look-up in vLLM 0.32 and 0.33."""
_log = logging.getLogger("vllm.stillhouse")


@contextmanager
def switched_on() -> Iterator[None]:
    """Within the context, processes that vLLM starts load the plug-in; this one, which computes nothing, does not."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(os.getpid())
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def register() -> None:
    """Entry point of vLLM, possibly called several times."""
    if os.environ.get(VARIABLE, "") in ("", str(os.getpid())):
        return
    for change, consequence in (
        # The teacher notices missing rows.
        (_cap_cache_hits, "the prefix cache is not used for scoring"),
        (_clear_new_blocks, "a sequence with NaN can spoil later ones"),
        (_read_less_beside_writers, "long prompts delay generation"),
        (encode_pending_rows, "steps that generate wait for the rows of their tokens"),
        (linear_lora.install, "adapters are copied for each row"),
        (lm_head_lora.install, "models whose output layer takes adapters cannot be scored together with any"),
    ):
        try:
            change()
        except (ImportError, AttributeError, TypeError) as error:
            _log.warning("stillhouse: vLLM's code has changed, so %s: %s", consequence, error)


def _cap_cache_hits() -> None:
    """Wraps `KVCacheManager.get_computed_blocks`.

    vLLM computes at least the last token of a prompt, for its logits. A request that scores from `start` needs them
    from the token before `start` on, so the manager sees a prompt that ends there. Otherwise a prompt whose length is
    a multiple of the block size would come from the cache together with a requested row.
    """
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    original = KVCacheManager.get_computed_blocks
    if getattr(original, "stillhouse", False):
        return
    if list(inspect.signature(original).parameters) not in _LOOKUPS:
        raise TypeError(f"KVCacheManager.get_computed_blocks{inspect.signature(original)}")

    def get_computed_blocks(self: Any, request: Any, max_cache_hit_length: int | None = None) -> Any:
        params = request.sampling_params
        start = None if params is None else score_start(params.extra_args)
        bound = max_cache_hit_length
        if start is not None:
            request, bound = _Until(request, start), None if bound is None else min(bound, start - 1)
        return original(self, request, *(() if bound is None else (bound,)))

    get_computed_blocks.stillhouse = True  # type: ignore[attr-defined]
    KVCacheManager.get_computed_blocks = get_computed_blocks


def _clear_new_blocks() -> None:
    """Makes the CPU worker clear cache blocks before use, as it does for models that need it.

    Its attention multiplies the contents beyond the end of a sequence by 0. NaN of another sequence would stay NaN.
    """
    from vllm.platforms import current_platform
    from vllm.v1.kv_cache_interface import KVCacheConfig

    if not current_platform.is_cpu():
        return
    if not isinstance(inspect.getattr_static(KVCacheConfig, "needs_kv_cache_zeroing"), property):
        raise TypeError("KVCacheConfig.needs_kv_cache_zeroing")
    KVCacheConfig.needs_kv_cache_zeroing = property(lambda self: True)  # noqa: ARG005


def _read_less_beside_writers() -> None:
    """Wraps `Scheduler.schedule` on a CPU: a step that generates reads at most BESIDE_WRITERS prompt tokens.

    A step generates one token per sample and takes as long as all its tokens take. Steps without generation keep
    vLLM's size.
    """
    from vllm.platforms import current_platform
    from vllm.v1.core.sched.scheduler import Scheduler

    if not current_platform.is_cpu():
        return
    original = Scheduler.schedule
    if getattr(original, "stillhouse", False):
        return
    if list(inspect.signature(original).parameters)[:1] != ["self"]:
        raise TypeError(f"Scheduler.schedule{inspect.signature(original)}")

    def schedule(self: Any, *arguments: Any, **named: Any) -> Any:
        whole = self.max_num_scheduled_tokens
        num_generating = sum(1 for request in self.running if request.num_output_tokens)
        if num_generating:
            self.max_num_scheduled_tokens = min(whole, num_generating + BESIDE_WRITERS)
        try:
            return original(self, *arguments, **named)
        finally:
            self.max_num_scheduled_tokens = whole

    schedule.stillhouse = True  # type: ignore[attr-defined]
    Scheduler.schedule = schedule


def encode_pending_rows() -> None:
    """Wraps `MsgpackEncoder.enc_hook`: `PendingArray`s are waited for where a message is encoded, in a thread of its own.

    An array whose computation failed is sent without rows, which the front end refuses; the engine raises the error in a later step.
    """
    from vllm.v1.serial_utils import MsgpackEncoder

    original = MsgpackEncoder.enc_hook
    if encodes_pending_rows():
        return
    if list(inspect.signature(original).parameters) != ["self", "obj"]:
        raise TypeError(f"MsgpackEncoder.enc_hook{inspect.signature(original)}")

    def enc_hook(self: Any, obj: Any) -> Any:
        if isinstance(obj, PendingArray):
            try:
                obj = obj.array()
            except Exception as error:
                _log.exception("stillhouse: rows of generated tokens were not computed", exc_info=error)
                obj = np.empty((0, 0), np.float32)
        return original(self, obj)

    enc_hook.stillhouse = True  # type: ignore[attr-defined]
    MsgpackEncoder.enc_hook = enc_hook


def encodes_pending_rows() -> bool:
    """True in a process whose messages may hold a `PendingArray`."""
    from vllm.v1.serial_utils import MsgpackEncoder

    return getattr(MsgpackEncoder.enc_hook, "stillhouse", False)


class _Until:
    """View of a request that ends before position `end`."""

    def __init__(self, request: Any, end: int) -> None:
        self._request = request
        self.num_tokens = min(end, request.num_tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)
