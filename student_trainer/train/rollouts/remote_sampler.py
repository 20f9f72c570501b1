"""Texts of the student from a service that was started on its base: each version of its adapter travels there under a name of its own.

A name never changes its weights, and every text comes back with the fingerprint of the adapter that wrote it, so a text
cannot be taken for that of another version, however a crash falls between upload, load and sampling.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import structlog
from numpy.typing import NDArray

from stillhouse.protos.errors import Reason, StillhouseError, from_rpc_error, from_status
from stillhouse.protos.files.adapter import CONFIG, FILES
from stillhouse.protos.rpc.channel import connect
from stillhouse.protos.stillhouse.v1.teacher_pb2 import (
    CAPABILITY_HOT_ADAPTERS,
    DistributionConfig,
    GenerateRequest,
    GetTeacherInfoRequest,
    LoadAdapterRequest,
    Prompt,
    SampleChunk,
    SamplingParams,
    UnloadAdapterRequest,
    UploadAdapterRequest,
)
from stillhouse.protos.stillhouse.v1.teacher_pb2_grpc import TeacherServiceStub
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from stillhouse.protos.tensors.distributions import decode, decode_distributions, encode
from stillhouse.student_trainer.config.schema import RolloutConfig, TeacherConfig
from stillhouse.student_trainer.train.process import failpoints
from stillhouse.student_trainer.train.process.waiting import Patience
from stillhouse.student_trainer.train.rollouts.local_sampler import Text
from stillhouse.student_trainer.train.student.student import Student
from stillhouse.student_trainer.train.teacher.credentials import signature
from stillhouse.student_trainer.train.teacher.endpoints import INFO_TIMEOUT_S, backoff_s

log = structlog.get_logger()
Result = TypeVar("Result")

LOAD_TIMEOUT_S = 600.0
PIECE_BYTES = 512 * 1024
_SAVING = threading.Lock()
"""peft changes its settings while it saves them, and several services may be given the same weights at once."""


class RemoteSampler:
    """Writes texts with the student's adapter as it is, on another host or GPU."""

    def __init__(
        self,
        student: Student,
        service: TeacherConfig,
        *,
        field: str,
        run_name: str,
        tokenizer_fingerprint: str,
        vocab_size: int,
        num_likeliest: int,
        version: Callable[[], int],
        patience: Patience,
        clean: bool,
    ) -> None:
        """Reaches the service at the only target of `service` and checks it; `field` is its context in the run file.

        With `clean` it unloads what an attempt of this run that was killed has left there.

        Raises StillhouseError: TOKENIZER_MISMATCH, CAPABILITY, TOP_K_TOO_LARGE, TEACHER_UNREACHABLE.
        """
        self._student = student
        self._service = service
        self._target = service.targets[0]
        self._field = f"{field}.rollout_credential"
        self._run_name = run_name
        self._vocab_size = vocab_size
        self._num_likeliest = num_likeliest
        self._version = version
        self._patience = patience
        self._signature = signature(service, self._target, field=self._field)
        self._channel = connect(self._signature[0])
        self._stub = TeacherServiceStub(self._channel)
        self._loaded = ""
        self.info = self._ask(
            lambda: self._stub.GetTeacherInfo(GetTeacherInfoRequest(), timeout=INFO_TIMEOUT_S)
        )
        self._check(tokenizer_fingerprint)
        for each in self.info.adapters if clean else ():
            if each.name.startswith(f"{run_name}/"):
                self._unload(each.name)

    def close(self) -> None:
        """Gives the last adapter's place back, if the service answers, and closes the connection."""
        if self._loaded:
            self._unload(self._loaded)
        self._channel.close()

    def write(
        self,
        prompts: Sequence[NDArray[np.int32]],
        generation: RolloutConfig,
        *,
        max_sequence_tokens: int,
        seeds: Sequence[int],
    ) -> list[list[Text]]:
        """Up to `samples_per_prompt` texts for each prompt, waiting for the service as for a teacher.

        A text with a token that the run's teacher does not know is left out. Raises Stopped, or StillhouseError.
        """
        name, fingerprint = self._load_version()
        request = GenerateRequest(
            prompts=[
                Prompt(
                    token_ids=encode(prompt),
                    adapter=name,
                    sampling=SamplingParams(
                        seed=seed,
                        max_new_tokens=min(generation.max_new_tokens, max_sequence_tokens - len(prompt)),
                    ),
                )
                for prompt, seed in zip(prompts, seeds, strict=True)
            ],
            sampling=SamplingParams(temperature=generation.temperature, top_p=generation.top_p),
            num_samples=generation.samples_per_prompt,
            distributions=DistributionConfig(
                top_k=self._num_likeliest, logprob_dtype=Tensor.DATA_TYPE_FLOAT32, pack_token_ids=True
            ),
            whole_samples=True,
        )
        texts = self._ask(lambda: self._generate(request, fingerprint))
        for number, prompt in enumerate(prompts):
            missing = [each for each in range(generation.samples_per_prompt) if (number, each) not in texts]
            if missing:
                raise StillhouseError(
                    Reason.TENSOR_INVALID,
                    f"The service at {self._target} left out samples {missing} of a prompt of {len(prompt)} tokens.",
                )
        return [
            [
                texts[number, sample]
                for sample in range(generation.samples_per_prompt)
                if int(texts[number, sample].token_ids.max()) < self._vocab_size
            ]
            for number in range(len(prompts))
        ]

    def _renew(self) -> None:
        """Connects anew if token or certificate were replaced; while a file is being replaced, the former one is used."""
        try:
            found = signature(self._service, self._target, field=self._field)
        except StillhouseError as error:
            log.warning("the former credential is used", why=error.message)
            return
        if found != self._signature:
            self._channel.close()
            self._signature = found
            self._channel = connect(found[0])
            self._stub = TeacherServiceStub(self._channel)

    def _check(self, tokenizer_fingerprint: str) -> None:
        if self.info.tokenizer_fingerprint != tokenizer_fingerprint:
            raise StillhouseError(
                Reason.TOKENIZER_MISMATCH,
                f"The rollout service at {self._target} has another tokenizer than the student. Start it on the student's "
                "base: stillhouse-teacher --model <student.model> --max-adapters 2.",
            )
        if CAPABILITY_HOT_ADAPTERS not in self.info.capabilities:
            raise StillhouseError(
                Reason.CAPABILITY,
                f"The rollout service at {self._target} loads no adapters while it serves. Start it with --max-adapters 2.",
                metadata={"capability": "CAPABILITY_HOT_ADAPTERS"},
            )
        if self._num_likeliest > self.info.max_top_k:
            raise StillhouseError(
                Reason.TOP_K_TOO_LARGE,
                f"The rollout service at {self._target} gives at most {self.info.max_top_k} likeliest tokens; the loss "
                f"wants {self._num_likeliest}. Start it with --max-top-k {self._num_likeliest}.",
            )

    def _load_version(self) -> tuple[str, str]:
        """Name and fingerprint of the adapter as it is, loaded in the service; the one before is freed."""
        model: Any = self._student.model
        with tempfile.TemporaryDirectory(prefix="stillhouse-adapter-") as folder:
            with _SAVING:
                model.save_pretrained(folder)
            _in_order(Path(folder) / CONFIG)
            stored = self._ask(
                lambda: self._stub.UploadAdapter(_pieces(Path(folder)), timeout=LOAD_TIMEOUT_S)
            )
        name = f"{self._run_name}/{self._version()}-{stored.fingerprint[:12]}"
        before, self._loaded = self._loaded, name
        if before and before != name:
            self._unload(before)
        load = LoadAdapterRequest(adapter=name, path=stored.path)
        self._ask(lambda: self._stub.LoadAdapter(load, timeout=LOAD_TIMEOUT_S))
        failpoints.reach("rollouts.after_load")
        return name, stored.fingerprint

    def _unload(self, name: str) -> None:
        try:
            self._stub.UnloadAdapter(UnloadAdapterRequest(adapter=name), timeout=INFO_TIMEOUT_S)
        except grpc.RpcError as error:  # a service that was restarted has forgotten it
            log.warning("an adapter was not unloaded", adapter=name, why=str(error.code()))

    def _generate(self, request: GenerateRequest, fingerprint: str) -> dict[tuple[int, int], Text]:
        parts: dict[tuple[int, int], list[SampleChunk]] = {}
        for response in self._stub.Generate(request):
            for chunk in response.chunks:
                if chunk.HasField("error"):
                    raise from_status(chunk.error)
                if chunk.adapter_fingerprint != fingerprint:
                    raise StillhouseError(
                        Reason.TEACHER_CHANGED,
                        f"The service at {self._target} wrote with adapter {chunk.adapter_fingerprint[:12] or 'none'}; "
                        f"{fingerprint[:12]} was asked for.",
                    )
                parts.setdefault((chunk.prompt_index, chunk.sample_index), []).append(chunk)
        return {key: self._text(several) for key, several in parts.items()}

    def _text(self, parts: Sequence[SampleChunk]) -> Text:
        int32, float32 = (Tensor.DATA_TYPE_INT32,), (Tensor.DATA_TYPE_FLOAT32,)
        token_ids = np.concatenate(
            [decode(part.token_ids, field="token_ids", dtypes=int32, shape=(None,)) for part in parts]
        )
        if not all(part.HasField("sampling_logprobs") for part in parts) or not token_ids.size:
            raise StillhouseError(
                Reason.CAPABILITY,
                f"The rollout service at {self._target} ({self.info.engine}) does not say how likely its tokens were when it drew "
                "them. Use temperature 1 and top_p 1, or start it with --engine hf.",
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
            ).token_ids
            for part in parts
        ]
        likeliest = np.concatenate(rows)
        if not len(token_ids) == len(logprobs) == len(likeliest):
            raise StillhouseError(
                Reason.TENSOR_INVALID,
                f"The service at {self._target} sent a text whose parts differ in length.",
            )
        return Text(
            token_ids=token_ids.astype(np.int32),
            logprobs=logprobs.astype(np.float32),
            likeliest=np.where(likeliest < self._vocab_size, likeliest, -1).astype(np.int32),
            finished=parts[-1].finish_reason == SampleChunk.FINISH_REASON_STOP,
        )

    def _ask(self, call: Callable[[], Result]) -> Result:
        """The answer to a call, repeated while nobody answers, as long as the run is patient."""
        since, attempt = time.monotonic(), 0
        while True:
            try:
                self._renew()
                result = call()
            except grpc.RpcError as caught:
                error = from_rpc_error(caught, target=self._target, service="teacher")
            except StillhouseError as caught:
                error = caught
            else:
                self._patience.clear()
                return result
            # A token that is replaced while the run goes on is read again before the next try.
            if not error.retryable and not (error.reason is Reason.UNAUTHENTICATED and self._loaded):
                raise error
            self._patience.sleep(backoff_s(attempt, error), since, error.message)
            attempt += 1


def _in_order(settings: Path) -> None:
    """Writes an adapter's settings so that equal ones have equal bytes: peft holds sets, whose order is the process's own."""
    values = json.loads(settings.read_bytes())
    ordered = {
        name: sorted(value)
        if isinstance(value, list) and all(isinstance(each, str) for each in value)
        else value
        for name, value in values.items()
    }
    settings.write_text(json.dumps(ordered, sort_keys=True))


def _pieces(directory: Path) -> Iterator[UploadAdapterRequest]:
    for name in FILES:
        data = (directory / name).read_bytes()
        yield UploadAdapterRequest(file_name=name, sha256=hashlib.sha256(data).hexdigest())
        for first in range(0, len(data), PIECE_BYTES):
            yield UploadAdapterRequest(data=data[first : first + PIECE_BYTES])
