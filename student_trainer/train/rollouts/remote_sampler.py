"""Rollouts on a service that was started on the student's base, by the version of the student's adapter that a call names.

A name never changes its weights, and every text comes back with the fingerprint of the adapter that sampled it, so a text
cannot be taken for that of another version, however a crash falls between upload, load and sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray

from stillhouse.protos.errors import Reason, StillhouseError, from_status
from stillhouse.protos.stillhouse.v1.teacher_pb2 import (
    CAPABILITY_HOT_ADAPTERS,
    CAPABILITY_STRATIFIED_SAMPLES,
    DistributionConfig,
    GenerateRequest,
    GenerateResponse,
    GetTeacherInfoResponse,
    Prompt,
    SampleChunk,
    SamplingParams,
)
from stillhouse.protos.stillhouse.v1.teacher_pb2_grpc import TeacherServiceStub
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from stillhouse.protos.tensors.distributions import encode
from stillhouse.student_trainer.config.schema import RolloutConfig
from stillhouse.student_trainer.config.teacher import TeacherConfig
from stillhouse.student_trainer.train.rollouts.local_sampler import PART_TOKENS, SampledText
from stillhouse.student_trainer.train.rollouts.service_adapters import OnCancel, ServiceAdapters
from stillhouse.student_trainer.train.rollouts.written_text import PieceReader, WrittenText
from stillhouse.student_trainer.train.teacher.endpoints import Endpoint

log = structlog.get_logger()


OnPart = Callable[[int, SampledText], object]
"""Is told a text's place among its prompt's, and what there is of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutQuery:
    """A prompt to sample from, with one version of the student's adapter."""

    token_ids: NDArray[np.int32]
    """[P]."""
    seed: int
    max_new_tokens: int
    adapter: Path
    """Folder of its files."""
    version: int
    on_texts: Callable[[list[SampledText]], object] = lambda _: None
    """Told the texts once, in another thread, before they can be got."""
    on_part: OnPart | None = None
    """Told what there is of each text about every PART_TOKENS tokens, in another thread; of a text that is written again, again."""


class RemoteSampler(Endpoint):
    """Samples with the student's adapter on another host or GPU: one replica of a SamplerPool."""

    def __init__(
        self,
        service: TeacherConfig,
        *,
        field: str,
        run_name: str,
        tokenizer_fingerprint: str,
        vocab_size: int,
        num_likeliest: int,
        num_draws: int = 0,
        end_ids: Sequence[int],
        clean: bool,
    ) -> None:
        """The service is the only target of `service`; `field` is its context in the run file; `end_ids` end a text.

        A service that cannot draw from a tail gives texts without draws.

        With `clean` the first probe unloads what a killed attempt of this run has left there. A probe raises
        TOKENIZER_MISMATCH, CAPABILITY, TOP_K_TOO_LARGE, or why the service does not answer.
        """
        super().__init__(service.targets[0], service, self._check_base, field=f"{field}.rollout_credential")
        self._adapters = ServiceAdapters(self.target, run_name)
        self._tokenizer_fingerprint = tokenizer_fingerprint
        self._vocab_size = vocab_size
        self._num_likeliest = num_likeliest
        self._num_draws = num_draws
        self._end_ids = list(end_ids)
        self._clean = clean
        self.info = GetTeacherInfoResponse()
        """Info of the service at its last probe."""

    def close(self) -> None:
        """Frees the adapters' slots, if the service answers, and closes the connection."""
        self._adapters.unload_unused(self.stub)
        super().close()

    def sample(
        self,
        prompts: Sequence[RolloutQuery],
        generation: RolloutConfig,
        on_cancel: OnCancel,
    ) -> Generator[tuple[int, list[SampledText]]]:
        """Yields the place of each prompt and its up to `samples_per_prompt` texts, once all of these are written.

        Texts that hold a token unknown to the teacher are left out. All prompts have the same adapter. `on_cancel` gets the
        function that cancels the call under way. Raises StillhouseError.
        """
        with self.errors():
            stub = self.stub()
            use = self._adapters.use(stub, prompts[0].adapter, prompts[0].version, on_cancel)
            with use as (name, fingerprint):
                stream = stub.Generate(self._request(prompts, generation, name))
                on_cancel(stream.cancel)
                try:
                    self._adapters.unload_unused(lambda: stub)  # while the service writes
                    yield from self._texts(stream, prompts, generation.samples_per_prompt, fingerprint)
                finally:
                    stream.cancel()

    def _request(
        self, prompts: Sequence[RolloutQuery], generation: RolloutConfig, adapter: str
    ) -> GenerateRequest:
        draws = self._present_draws
        return GenerateRequest(
            prompts=[
                Prompt(
                    token_ids=encode(prompt.token_ids),
                    adapter=adapter,
                    sampling=SamplingParams(seed=prompt.seed, max_new_tokens=prompt.max_new_tokens),
                )
                for prompt in prompts
            ],
            sampling=SamplingParams(temperature=generation.temperature, top_p=generation.top_p),
            num_samples=generation.samples_per_prompt,
            distributions=DistributionConfig(
                top_k=self._num_likeliest,
                logprob_dtype=Tensor.DATA_TYPE_FLOAT32,
                pack_token_ids=True,
                num_sampled_tokens=draws,
                sample_tail=draws > 0,
                stratified_samples=draws > 0,
                sort_samples=draws > 0,
                sampled_logprobs=draws > 0,
            ),
            whole_samples=True,
            part_tokens=PART_TOKENS if any(prompt.on_part is not None for prompt in prompts) else 0,
        )

    @property
    def _present_draws(self) -> int:
        """Draws that the service gives of each position."""
        return self._num_draws if CAPABILITY_STRATIFIED_SAMPLES in self.info.capabilities else 0

    def _check_base(self, _: Endpoint, stub: TeacherServiceStub, info: GetTeacherInfoResponse) -> None:
        """Checks a service at each probe; unloads at the first one what a killed attempt of this run left there."""
        if info.tokenizer_fingerprint != self._tokenizer_fingerprint:
            raise StillhouseError(
                Reason.TOKENIZER_MISMATCH,
                f"The rollout service at {self.target} has another tokenizer than the student. Start it on the student's "
                "base: stillhouse-teacher --model <student.model> --max-adapters 2.",
            )
        if CAPABILITY_HOT_ADAPTERS not in info.capabilities:
            raise StillhouseError(
                Reason.CAPABILITY,
                f"The rollout service at {self.target} loads no adapters while it serves. Start it with --max-adapters 2.",
                metadata={"capability": "CAPABILITY_HOT_ADAPTERS"},
            )
        if self._num_likeliest > info.max_top_k:
            raise StillhouseError(
                Reason.TOP_K_TOO_LARGE,
                f"The rollout service at {self.target} gives at most {info.max_top_k} likeliest tokens; the loss "
                f"wants {self._num_likeliest}. Start it with --max-top-k {self._num_likeliest}.",
            )
        self.info = info
        if self._present_draws < self._num_draws:
            log.warning(
                "texts come without draws from the student's tail, which its loss then takes as one",
                target=self.target,
                engine=info.engine,
            )
        if self._clean:
            self._clean = False
            self._adapters.unload_leftovers(stub, info)

    def _texts(
        self,
        stream: Iterable[GenerateResponse],
        prompts: Sequence[RolloutQuery],
        num_samples: int,
        fingerprint: str,
    ) -> Iterator[tuple[int, list[SampledText]]]:
        reader = PieceReader(
            target=self.target,
            info=self.info,
            vocab_size=self._vocab_size,
            num_likeliest=self._num_likeliest,
            end_ids=self._end_ids,
        )
        written: dict[tuple[int, int], WrittenText] = {}
        texts: dict[int, dict[int, SampledText]] = {number: {} for number in range(len(prompts))}
        for response in stream:
            for chunk in response.chunks:
                if chunk.HasField("error"):
                    raise from_status(chunk.error)
                if chunk.adapter_fingerprint != fingerprint:
                    raise StillhouseError(
                        Reason.TEACHER_CHANGED,
                        f"The service at {self.target} wrote with adapter {chunk.adapter_fingerprint[:12] or 'none'}; "
                        f"{fingerprint[:12]} was asked for.",
                    )
                key = number, sample = chunk.prompt_index, chunk.sample_index
                if not 0 <= sample < num_samples or number not in texts or sample in texts[number]:
                    raise StillhouseError(
                        Reason.TENSOR_INVALID,
                        f"The service at {self.target} sent a part of sample {sample} of prompt {number}, which was not asked for "
                        "or had ended.",
                    )
                if key not in written:
                    written[key] = WrittenText(
                        reader,
                        prompts[number].seed,
                        sample,
                        num_draws=self._present_draws,
                        max_new_tokens=prompts[number].max_new_tokens,
                    )
                written[key].add(chunk)
                if chunk.finish_reason == SampleChunk.FINISH_REASON_UNSPECIFIED:
                    self._tell(prompts[number].on_part, sample, written[key])
                    continue
                texts[number][sample] = written.pop(key).text()
                if len(texts[number]) == num_samples:
                    found = texts.pop(number)
                    yield number, [found[each] for each in sorted(found) if self._is_known(found[each])]
        for number, found in texts.items():
            missing = [each for each in range(num_samples) if each not in found]
            raise StillhouseError(
                Reason.TENSOR_INVALID,
                f"The service at {self.target} left out samples {missing} of a prompt of {len(prompts[number].token_ids)} tokens.",
            )

    def _tell(self, on_part: OnPart | None, sample: int, written: WrittenText) -> None:
        if on_part is not None and written.has_part and self._is_known(text := written.text()):
            on_part(sample, text)

    def _is_known(self, text: SampledText) -> bool:
        """True if the teacher knows every token of a text."""
        return int(text.token_ids.max()) < self._vocab_size
