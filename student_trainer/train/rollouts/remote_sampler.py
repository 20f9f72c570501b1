"""Rollouts on a service that was started on the student's base: each adapter version is uploaded under a name of its own.

A name never changes its weights, and every text comes back with the fingerprint of the adapter that sampled it, so a text
cannot be taken for that of another version, however a crash falls between upload, load and sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import structlog
from numpy.typing import NDArray

from stillhouse.protos.errors import Reason, StillhouseError, from_rpc_error, from_status
from stillhouse.protos.files.adapter import upload_requests
from stillhouse.protos.rpc.channel import is_loopback
from stillhouse.protos.stillhouse.v1.teacher_pb2 import (
    CAPABILITY_HOT_ADAPTERS,
    CAPABILITY_STRATIFIED_SAMPLES,
    DistributionConfig,
    GenerateRequest,
    GenerateResponse,
    GetTeacherInfoResponse,
    LoadAdapterRequest,
    Prompt,
    SampleChunk,
    SamplingParams,
    UnloadAdapterRequest,
)
from stillhouse.protos.stillhouse.v1.teacher_pb2_grpc import TeacherServiceStub
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from stillhouse.protos.tensors.distributions import Distributions, decode, decode_distributions, encode
from stillhouse.student_trainer.config.schema import RolloutConfig
from stillhouse.student_trainer.config.teacher import TeacherConfig
from stillhouse.student_trainer.train.process import failpoints
from stillhouse.student_trainer.train.rollouts.adapter_files import content_digest
from stillhouse.student_trainer.train.rollouts.local_sampler import SampledText
from stillhouse.student_trainer.train.teacher.endpoints import INFO_TIMEOUT_S, Endpoint

log = structlog.get_logger()

LOAD_TIMEOUT_S = 600.0
_UNREADABLE = frozenset({Reason.PATH_NOT_ALLOWED, Reason.ADAPTER_INVALID})
"""Reasons of a service that cannot, or may not, read a path of this machine."""


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
        self._run_name = run_name
        self._tokenizer_fingerprint = tokenizer_fingerprint
        self._vocab_size = vocab_size
        self._num_likeliest = num_likeliest
        self._num_draws = num_draws
        self._end_ids = list(end_ids)
        self._clean = clean
        self._loaded: list[str] = []
        self._reads_our_files = is_loopback(self.target)
        self.info = GetTeacherInfoResponse()
        """Info of the service at its last probe."""

    def close(self) -> None:
        """Frees the adapters' slots, if the service answers, and closes the connection."""
        if self._loaded:
            self._unload_all(self.stub())
        super().close()

    def sample(
        self,
        prompts: Sequence[RolloutQuery],
        generation: RolloutConfig,
        on_cancel: Callable[[Callable[[], object]], None],
    ) -> list[list[SampledText]]:
        """Returns up to `samples_per_prompt` texts for each prompt, without those that hold a token unknown to the teacher.

        All prompts have the same adapter. `on_cancel` gets the function that cancels the call. Raises StillhouseError.
        """
        with self.errors():
            stub = self.stub()
            name, fingerprint = self._load(stub, prompts[0])
            request = GenerateRequest(
                prompts=[
                    Prompt(
                        token_ids=encode(prompt.token_ids),
                        adapter=name,
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
                    num_sampled_tokens=self._present_draws,
                    sample_tail=self._present_draws > 0,
                    stratified_samples=self._present_draws > 0,
                    sort_samples=self._present_draws > 0,
                    sampled_logprobs=self._present_draws > 0,
                ),
                whole_samples=True,
            )
            stream = stub.Generate(request)
            on_cancel(stream.cancel)
            self._unload_all(stub, but=name)  # while the service writes
            texts = self._texts(stream, fingerprint)
        for number, prompt in enumerate(prompts):
            missing = [each for each in range(generation.samples_per_prompt) if (number, each) not in texts]
            if missing:
                raise StillhouseError(
                    Reason.TENSOR_INVALID,
                    f"The service at {self.target} left out samples {missing} of a prompt of {len(prompt.token_ids)} tokens.",
                )
        return [
            [
                texts[number, sample]
                for sample in range(generation.samples_per_prompt)
                if int(texts[number, sample].token_ids.max()) < self._vocab_size
            ]
            for number in range(len(prompts))
        ]

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
            for each in info.adapters:
                if each.name.startswith(f"{self._run_name}/"):
                    self._unload(stub, each.name)

    def _load(self, stub: TeacherServiceStub, query: RolloutQuery) -> tuple[str, str]:
        """Loads an adapter in the service; returns its name and fingerprint.

        A service on this machine reads the files where they are, unless it may not; any other one gets them sent.
        """
        if self._reads_our_files:
            name = f"{self._run_name}/{query.version}-{content_digest(query.adapter)[:12]}"
            try:
                return name, self._load_path(stub, name, str(query.adapter))
            except grpc.RpcError as error:
                said = from_rpc_error(error, target=self.target, service="teacher")
                if said.reason not in _UNREADABLE:
                    raise
                self._reads_our_files = False
                log.info("adapters are sent to the rollout service", target=self.target, why=said.message)
        stored = stub.UploadAdapter(upload_requests(query.adapter), timeout=LOAD_TIMEOUT_S)
        name = f"{self._run_name}/{query.version}-{stored.fingerprint[:12]}"
        self._load_path(stub, name, stored.path)
        return name, stored.fingerprint

    def _load_path(self, stub: TeacherServiceStub, name: str, path: str) -> str:
        """Loads the files at `path` of the service; returns their fingerprint. The adapter before stays until texts are begun."""
        request = LoadAdapterRequest(adapter=name, path=path)
        try:
            loaded = stub.LoadAdapter(request, timeout=LOAD_TIMEOUT_S)
        except grpc.RpcError as error:
            said = from_rpc_error(error, target=self.target, service="teacher")
            if said.reason is not Reason.ADAPTER_SLOTS or not self._loaded:
                raise
            self._unload_all(stub)  # a service with one slot
            loaded = stub.LoadAdapter(request, timeout=LOAD_TIMEOUT_S)
        if name not in self._loaded:
            self._loaded.append(name)
        failpoints.reach("rollouts.after_load")
        return str(loaded.adapter.fingerprint)

    def _unload_all(self, stub: TeacherServiceStub, *, but: str = "") -> None:
        """Frees the slots of all adapters loaded here, but one."""
        for each in [name for name in self._loaded if name != but]:
            self._unload(stub, each)
            self._loaded.remove(each)

    def _unload(self, stub: TeacherServiceStub, name: str) -> None:
        try:
            stub.UnloadAdapter(UnloadAdapterRequest(adapter=name), timeout=INFO_TIMEOUT_S)
        except grpc.RpcError as error:  # a service that was restarted has forgotten it
            log.warning("an adapter was not unloaded", adapter=name, why=str(error.code()))

    def _texts(
        self, stream: Iterable[GenerateResponse], fingerprint: str
    ) -> dict[tuple[int, int], SampledText]:
        parts: dict[tuple[int, int], list[SampleChunk]] = {}
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
                parts.setdefault((chunk.prompt_index, chunk.sample_index), []).append(chunk)
        return {key: self._text(several) for key, several in parts.items()}

    def _text(self, parts: Sequence[SampleChunk]) -> SampledText:
        int32, float32 = (Tensor.DATA_TYPE_INT32,), (Tensor.DATA_TYPE_FLOAT32,)
        token_ids = np.concatenate(
            [decode(part.token_ids, field="token_ids", dtypes=int32, shape=(None,)) for part in parts]
        )
        if not all(part.HasField("sampling_logprobs") for part in parts) or not token_ids.size:
            raise StillhouseError(
                Reason.CAPABILITY,
                f"The rollout service at {self.target} ({self.info.engine}) gives no log-probabilities of the "
                "tokens that it sampled. Use temperature 1 and top_p 1, or start it with --engine hf.",
                metadata={"capability": "sampling_logprobs"},
            )
        logprobs = np.concatenate(
            [
                decode(part.sampling_logprobs, field="sampling_logprobs", dtypes=float32, shape=(None,))
                for part in parts
            ]
        )
        rows = [
            decode_distributions(
                part.distributions,
                vocab_size=self.info.vocab_size,
                max_rows=len(token_ids),
                max_top_k=self._num_likeliest,
            )
            for part in parts
        ]
        likeliest = np.concatenate([each.token_ids for each in rows])
        if not len(token_ids) == len(logprobs) == len(likeliest):
            raise StillhouseError(
                Reason.TENSOR_INVALID,
                f"The service at {self.target} sent a text whose parts differ in length.",
            )
        # The service knows the base's end tokens alone, and the data may have others.
        ends = np.flatnonzero(np.isin(token_ids, self._end_ids))
        length = int(ends[0]) + 1 if ends.size else len(token_ids)
        draws, draw_logprobs = (
            np.concatenate(each)[:length] for each in zip(*map(self._draws_of, rows), strict=True)
        )
        return SampledText(
            token_ids=token_ids[:length].astype(np.int32),
            logprobs=logprobs[:length].astype(np.float32),
            likeliest=self._known(likeliest[:length]),
            draws=draws,
            draw_logprobs=draw_logprobs,
            finished=bool(ends.size) or parts[-1].finish_reason == SampleChunk.FINISH_REASON_STOP,
        )

    def _draws_of(self, row: Distributions) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Draws of some positions, and their log-probabilities in the tail that they are from; -1 and 0 where it is empty."""
        if row.sampled_token_ids is None or row.sampled_logprobs is None:
            empty = np.zeros((row.num_rows, 0))
            return empty.astype(np.int32), empty.astype(np.float32)
        has_tail = np.isfinite(row.log_tail)[:, None]
        log_tail = np.where(has_tail, row.log_tail[:, None], 0.0)
        logprobs = np.where(has_tail, row.sampled_logprobs - log_tail, 0.0)
        return self._known(np.where(has_tail, row.sampled_token_ids, -1)), logprobs.astype(np.float32)

    def _known(self, token_ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """Ids, with -1 in the place of those that the teacher does not know."""
        return np.where(token_ids < self._vocab_size, token_ids, -1).astype(np.int32)
