"""Asks a teacher to write, ahead of the student: prompts go out and whole samples with their distributions come in, on threads of their own.

Every prompt submitted is answered once, however often a call breaks. A sample's text depends on its seed, its prompt and
its index alone, so that asking again gives the same with an engine that computes alike. The caller bounds what is in flight.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field

import grpc
import numpy as np
import structlog
from numpy.typing import NDArray

from protos.errors import Reason, StillhouseError, from_rpc_error, from_status
from protos.stillhouse.v1.teacher_pb2 import (
    DistributionConfig,
    GenerateRequest,
    Prompt,
    SampleChunk,
    SamplingParams,
)
from protos.stillhouse.v1.tensor_pb2 import Tensor
from protos.tensor_codec import Distributions, decode, decode_distributions, encode
from student_trainer.config import RolloutConfig
from student_trainer.train.patience import POLL_S, Patience
from student_trainer.train.score_stream import MAX_FRUITLESS_BREAKS, SILENCE_S
from student_trainer.train.teacher_client import Teacher, backoff_s

log = structlog.get_logger()

NUM_CALLS = 2
"""Generate calls side by side: while one writes its last samples, the next has begun."""
CLOSE_S = 5.0
"""Time that the threads get to end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """One sample, whole."""

    token_ids: NDArray[np.int32]
    """[n]: the tokens behind the prompt, the end token included if it was written."""
    distributions: Distributions | None
    """Of its tokens, counted from the first token of the prompt; None if none were asked for."""
    finished: bool
    """Whether it ended by itself, and not at its limit."""


@dataclass(kw_only=True, slots=True)
class _Item:
    token_ids: NDArray[np.int32]
    seed: int
    max_new_tokens: int
    place: str
    parts: dict[int, list[SampleChunk]] = field(default_factory=dict)
    """Of each sample, as far as it has come."""
    samples: dict[int, Written] = field(default_factory=dict)


class TextStream:
    """A teacher's texts to prompts, by the ids that the caller gives them."""

    def __init__(
        self, teacher: Teacher, generation: RolloutConfig, distributions: DistributionConfig | None
    ) -> None:
        """Starts the threads; `teacher` has been reached once."""
        self._teacher = teacher
        self._generation = generation
        self._distributions = distributions
        self._changed = threading.Condition()
        self._waiting: deque[int] = deque()
        self._items: dict[int, _Item] = {}
        self._answers: dict[int, list[Written] | StillhouseError] = {}
        self._failure: BaseException | None = None
        self._broken_since: float | None = None
        self._why_broken = ""
        self._last_answer = time.monotonic()
        self._calls: set[grpc.Call] = set()
        self._closed = False
        self.num_asked = 0
        """Texts asked for, repetitions included."""
        self._threads = [
            threading.Thread(target=self._run, name=f"text-stream-{number}", daemon=True)
            for number in range(NUM_CALLS)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self, prompt_id: int, token_ids: NDArray[np.int32], *, seed: int, max_new_tokens: int, place: str
    ) -> None:
        """Ask for `samples_per_prompt` texts behind a prompt; `place` is named in errors."""
        item = _Item(token_ids=token_ids, seed=seed, max_new_tokens=max_new_tokens, place=place)
        with self._changed:
            if not self._items:
                self._last_answer = time.monotonic()
            self._items[prompt_id] = item
            self._waiting.append(prompt_id)
            self._changed.notify_all()

    def take(self, prompt_id: int, patience: Patience) -> list[Written]:
        """The samples of a submitted prompt, by index, waiting for them.

        Raises:
            Stopped: the run shall stop.
            StillhouseError: what the teacher says of this prompt, with its file and row; or why there is no teacher.
        """
        while True:
            with self._changed:
                if prompt_id not in self._answers and self._failure is None:
                    self._changed.wait(POLL_S)
                answer = self._answers.pop(prompt_id, None)
                failure, since, why = self._failure, self._silent_since(), self._why_broken
            if isinstance(answer, StillhouseError):
                raise answer
            if answer is not None:
                patience.clear()
                return answer
            if failure is not None:
                raise failure
            patience.check(since, why)

    def close(self) -> None:
        """Ends calls and threads; what is unanswered is dropped."""
        with self._changed:
            self._closed = True
            for call in self._calls:
                call.cancel()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(CLOSE_S)

    def _silent_since(self) -> float | None:
        if self._broken_since is not None:
            return self._broken_since
        return self._last_answer if time.monotonic() - self._last_answer > SILENCE_S else None

    def _run(self) -> None:
        """A thread: one call after the other until closed. What it cannot mend, the next `take` raises."""
        attempt = 0
        try:
            while (batch := self._next_batch()) is not None:
                answered_before = self._last_answer
                try:
                    self._call(batch)
                except StillhouseError as error:
                    if self._closed:
                        return
                    attempt = 0 if self._last_answer != answered_before else attempt + 1
                    broken = error.retryable or error.reason in (Reason.INTERNAL, Reason.CANCELLED)
                    if not broken or (not error.retryable and attempt >= MAX_FRUITLESS_BREAKS):
                        raise
                    self._pause(attempt, error)
                finally:
                    self._put_back(batch)
        except BaseException as error:
            log.warning("the calls to the teacher ended", error=str(error))
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _next_batch(self) -> list[int] | None:
        """Everything that waits, up to what one call takes; None once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            count = min(len(self._waiting), self._teacher.info.max_prompts or len(self._waiting))
            return [self._waiting.popleft() for _ in range(count)]

    def _put_back(self, batch: list[int]) -> None:
        """Prompts without all of their samples are asked for again, from the start of each missing sample."""
        with self._changed:
            left = [prompt_id for prompt_id in batch if prompt_id in self._items]
            for prompt_id in left:
                self._items[prompt_id].parts.clear()
            self._waiting.extendleft(reversed(left))

    def _pause(self, attempt: int, error: StillhouseError) -> None:
        with self._changed:
            if self._broken_since is None:
                self._broken_since = time.monotonic()
                log.warning("a call to the teacher broke", why=error.message)
            self._why_broken = error.message
            self._changed.wait_for(lambda: self._closed, backoff_s(attempt, error))

    def _call(self, batch: list[int]) -> None:
        """One call; returns when all of it is answered. Raises StillhouseError if it breaks."""
        target = self._teacher.config.targets[0]
        stub = self._teacher.reach()
        call = stub.Generate(self._request(batch))
        with self._changed:
            self._calls.add(call)
            self.num_asked += len(batch) * self._generation.samples_per_prompt
            self._broken_since = None
        try:
            if self._closed:
                return
            for response in call:
                for chunk in response.chunks:
                    self._accept(batch, chunk)
        except grpc.RpcError as error:
            raise from_rpc_error(error, target=target, service="teacher") from error
        finally:
            call.cancel()
            with self._changed:
                self._calls.discard(call)
        if any(prompt_id in self._items for prompt_id in batch) and not self._closed:
            raise StillhouseError(
                Reason.TEACHER_UNREACHABLE,
                f"The teacher at {target} ended a call early; it may be restarting.",
            )

    def _request(self, batch: list[int]) -> GenerateRequest:
        items = [self._items[prompt_id] for prompt_id in batch]
        size = self._generation.samples_per_prompt
        return GenerateRequest(
            prompts=[
                Prompt(
                    token_ids=encode(item.token_ids),
                    adapter=self._teacher.config.adapter,
                    sampling=SamplingParams(max_new_tokens=item.max_new_tokens, seed=item.seed),
                    sample_indices=[each for each in range(size) if each not in item.samples],
                )
                for item in items
            ],
            sampling=SamplingParams(temperature=self._generation.temperature, top_p=self._generation.top_p),
            num_samples=size,
            distributions=self._distributions,
            whole_samples=True,
        )

    def _accept(self, batch: list[int], chunk: SampleChunk) -> None:
        """Takes in a part of a sample. Raises StillhouseError for an answer that asks to come again later."""
        if not 0 <= chunk.prompt_index < len(batch):
            raise StillhouseError(
                Reason.TENSOR_INVALID,
                f"The teacher answered prompt {chunk.prompt_index} of {len(batch)}. Bring both sides to one version.",
            )
        prompt_id = batch[chunk.prompt_index]
        item = self._items.get(prompt_id)
        if item is None:
            return
        if chunk.HasField("error"):
            error = from_status(chunk.error)
            if error.retryable:
                raise error
            answer = StillhouseError(
                error.reason,
                f"{item.place}: {error.message}",
                metadata={**error.metadata, "place": item.place},
            )
            self._finish(prompt_id, answer)
            return
        parts = item.parts.setdefault(chunk.sample_index, [])
        parts.append(chunk)
        if chunk.finish_reason == SampleChunk.FINISH_REASON_UNSPECIFIED:
            return
        item.samples[chunk.sample_index] = self._whole(item, parts)
        del item.parts[chunk.sample_index]
        if len(item.samples) == self._generation.samples_per_prompt:
            self._finish(prompt_id, [item.samples[index] for index in sorted(item.samples)])

    def _finish(self, prompt_id: int, answer: list[Written] | StillhouseError) -> None:
        with self._changed:
            del self._items[prompt_id]
            self._answers[prompt_id] = answer
            self._last_answer = time.monotonic()
            self._changed.notify_all()

    def _whole(self, item: _Item, parts: list[SampleChunk]) -> Written:
        ids = [
            decode(part.token_ids, field="token_ids", dtypes=(Tensor.DATA_TYPE_INT32,), shape=(None,))
            for part in parts
            if part.HasField("token_ids")
        ]
        token_ids = np.concatenate(ids).astype(np.int32) if ids else np.zeros(0, np.int32)
        outside = token_ids.size and not (
            token_ids.min() >= 0 and token_ids.max() < self._teacher.info.vocab_size
        )
        if outside or len(token_ids) > item.max_new_tokens:
            raise _invalid(item, f"{len(token_ids)} tokens, at most {item.max_new_tokens} were asked for")
        rows = None
        if self._distributions is not None and token_ids.size:
            rows = Distributions.concat(
                [
                    decode_distributions(
                        part.distributions,
                        vocab_size=self._teacher.info.vocab_size,
                        max_rows=item.max_new_tokens,
                        max_top_k=self._distributions.top_k,
                    )
                    for part in parts
                    if part.HasField("distributions")
                ]
            )
            if (rows.start, rows.num_rows) != (len(item.token_ids), len(token_ids)):
                raise _invalid(item, f"{rows.num_rows} distributions of {len(token_ids)} tokens")
        finished = parts[-1].finish_reason == SampleChunk.FINISH_REASON_STOP
        return Written(token_ids=token_ids, distributions=rows, finished=finished)


def _invalid(item: _Item, what: str) -> StillhouseError:
    return StillhouseError(
        Reason.TENSOR_INVALID,
        f"The teacher sent {what} behind the prompt of {item.place}. Bring both sides to the same version of Stillhouse.",
    )
