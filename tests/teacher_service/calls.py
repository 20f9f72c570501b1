"""Short ways to call a teacher over gRPC, and a float32 reference of transformers for the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stillhouse.protos.errors import StillhouseError, from_rpc_error, from_status
from stillhouse.protos.rpc.channel import connect
from stillhouse.protos.stillhouse.v1 import teacher_pb2, teacher_pb2_grpc
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from stillhouse.protos.tensors.distributions import Distributions, decode, decode_distributions, encode

Answer = Distributions | StillhouseError
FLOAT32 = Tensor.DATA_TYPE_FLOAT32


class Teacher:
    """A client of one teacher."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._channel = connect(target)
        self.stub = teacher_pb2_grpc.TeacherServiceStub(self._channel)
        self.info = self.stub.GetTeacherInfo(teacher_pb2.GetTeacherInfoRequest())
        self.reused: dict[int, int] = {}
        """Tokens from the prefix cache by sequence_id, of the latest call."""

    def close(self) -> None:
        self._channel.close()

    def score(
        self,
        sequences: Mapping[int, teacher_pb2.ScoreSequence] | Sequence[teacher_pb2.ScoreSequence],
        **config: Any,
    ) -> dict[int, Answer]:
        """Responses by sequence_id, each checked to be complete."""
        if not isinstance(sequences, Mapping):
            sequences = dict(enumerate(sequences))
        for sequence_id, sequence in sequences.items():
            sequence.sequence_id = sequence_id
        requests = [teacher_pb2.ScoreRequest(config=distribution_config(**config))]
        requests += [teacher_pb2.ScoreRequest(sequence=sequence) for sequence in sequences.values()]
        return self.score_stream(iter(requests))

    def score_stream(self, requests: Iterator[teacher_pb2.ScoreRequest]) -> dict[int, Answer]:
        parts: dict[int, list[Distributions]] = {}
        answers: dict[int, Answer] = {}
        self.reused = {}
        try:
            for response in self.stub.Score(requests):
                assert response.ByteSize() <= 1024 * 1024
                for result in response.results:
                    assert result.sequence_id not in answers
                    if result.HasField("error"):
                        answers[result.sequence_id] = from_status(result.error)
                        assert result.last
                        continue
                    rows = decode_distributions(
                        result.distributions,
                        vocab_size=self.info.vocab_size,
                        max_rows=self.info.max_sequence_tokens,
                        max_top_k=self.info.max_top_k,
                    )
                    parts.setdefault(result.sequence_id, []).append(rows)
                    if result.HasField("reused_tokens"):
                        assert result.last
                        self.reused[result.sequence_id] = result.reused_tokens
                    if result.last:
                        answers[result.sequence_id] = Distributions.concat(parts.pop(result.sequence_id))
        except grpc.RpcError as error:
            raise from_rpc_error(error, target=self.target, service="teacher") from error
        assert not parts
        return answers

    def score_one(self, ids: Any, *, start: int = 0, adapter: str = "", **config: Any) -> Distributions:
        answer = self.score([sequence(ids, start=start, adapter=adapter)], **config)[0]
        if isinstance(answer, StillhouseError):
            raise answer
        return answer

    def load_adapter(self, name: str, path: Path | str) -> None:
        self.stub.LoadAdapter(teacher_pb2.LoadAdapterRequest(adapter=name, path=str(path)))

    def unload_adapter(self, name: str) -> None:
        self.stub.UnloadAdapter(teacher_pb2.UnloadAdapterRequest(adapter=name))

    def generate(
        self,
        prompts: Sequence[teacher_pb2.Prompt],
        *,
        num_samples: int = 1,
        config: Any = None,
        whole_samples: bool = False,
        part_tokens: int = 0,
        prompt_token_ids: bool = False,
        **sampling: Any,
    ) -> dict[tuple[int, int], Sample]:
        """Samples by (prompt, sample)."""
        request = teacher_pb2.GenerateRequest(
            prompts=prompts,
            num_samples=num_samples,
            sampling=teacher_pb2.SamplingParams(**sampling),
            distributions=config,
            whole_samples=whole_samples,
            part_tokens=part_tokens,
            prompt_token_ids=prompt_token_ids,
        )
        samples: dict[tuple[int, int], Sample] = {}
        try:
            for response in self.stub.Generate(request):
                assert response.ByteSize() <= 1024 * 1024
                for chunk in response.chunks:
                    sample = samples.setdefault((chunk.prompt_index, chunk.sample_index), Sample())
                    sample.add(chunk, self.info)
        except grpc.RpcError as error:
            raise from_rpc_error(error, target=self.target, service="teacher") from error
        assert all(sample.done for sample in samples.values())
        return samples


@dataclass
class Sample:
    """Collected chunks of one sample."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: int = 0
    prompt_tokens: int = 0
    sampling_logprobs: list[float] = field(default_factory=list)
    rows: list[Distributions] = field(default_factory=list)
    num_chunks: int = 0
    prompt_ids: list[int] = field(default_factory=list)
    adapter_fingerprint: str = ""
    error: StillhouseError | None = None

    @property
    def done(self) -> bool:
        return self.finish != 0 or self.error is not None

    @property
    def distributions(self) -> Distributions:
        return Distributions.concat(self.rows)

    def add(self, chunk: teacher_pb2.SampleChunk, info: teacher_pb2.GetTeacherInfoResponse) -> None:
        assert not self.done, "a chunk came after the last"
        assert (chunk.prompt_tokens > 0) == (self.prompt_tokens == 0) or chunk.HasField("error")
        self.prompt_tokens += chunk.prompt_tokens
        self.num_chunks += 1
        self.text += chunk.text
        self.finish = chunk.finish_reason
        self.adapter_fingerprint = chunk.adapter_fingerprint
        if chunk.HasField("token_ids"):
            ids = decode(chunk.token_ids, field="token_ids", dtypes=(Tensor.DATA_TYPE_INT32,), shape=(None,))
            self.ids += ids.tolist()
        if chunk.HasField("sampling_logprobs"):
            logprobs = decode(
                chunk.sampling_logprobs, field="sampling_logprobs", dtypes=(FLOAT32,), shape=(len(ids),)
            )
            self.sampling_logprobs += logprobs.tolist()
        if chunk.HasField("distributions") and len(ids):
            self.rows.append(
                decode_distributions(
                    chunk.distributions,
                    vocab_size=info.vocab_size,
                    max_rows=info.max_sequence_tokens,
                    max_top_k=info.max_top_k,
                )
            )
        if chunk.HasField("prompt_token_ids"):
            ids = decode(
                chunk.prompt_token_ids, field="prompt", dtypes=(Tensor.DATA_TYPE_INT32,), shape=(None,)
            )
            self.prompt_ids += ids.tolist()
        if chunk.HasField("error"):
            self.error = from_status(chunk.error)


def distribution_config(top_k: int = 20, **fields: Any) -> teacher_pb2.DistributionConfig:
    """Config with float32 on the wire, unless `fields` say otherwise."""
    fields.setdefault("logprob_dtype", FLOAT32)
    return teacher_pb2.DistributionConfig(top_k=top_k, **fields)


def sequence(
    ids: Any, *, start: int = 0, adapter: str = "", query: Any = None, timeout_ms: int = 0
) -> teacher_pb2.ScoreSequence:
    return teacher_pb2.ScoreSequence(
        token_ids=encode(np.asarray(ids, np.int32)),
        start=start,
        adapter=adapter,
        timeout_ms=timeout_ms,
        query_token_ids=None if query is None else encode(np.asarray(query, np.int32)),
    )


def prompt(ids: Any, **fields: Any) -> teacher_pb2.Prompt:
    return teacher_pb2.Prompt(token_ids=encode(np.asarray(ids, np.int32)), **fields)


def random_ids(length: int, seed: int = 0, vocab_size: int = 300) -> NDArray[np.int32]:
    return np.random.default_rng([seed, length]).integers(0, vocab_size, length).astype(np.int32)


def reference_logprobs(model_dir: Path, ids: Any, adapter_dir: Path | None = None) -> NDArray[np.float64]:
    """[T, V]: row i is the distribution of a float32 forward after ids[: i + 1]."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if adapter_dir is not None:
        model = PeftModel.from_pretrained(model, adapter_dir)
    with torch.inference_mode():
        logits = model.eval()(torch.tensor(np.asarray(ids)[None].astype(np.int64))).logits[0]
    logprobs: NDArray[np.float64] = logits.double().log_softmax(-1).numpy()
    return logprobs


def assert_agrees(
    answer: Distributions, ids: Any, logprobs_TV: NDArray[np.float64], *, top_k: int, tolerance: float = 1e-4
) -> None:
    """Checks a response against the reference: sets up to ties, values, target, tail."""
    ids = np.asarray(ids)
    wanted = logprobs_TV[answer.start - 1 : len(ids) - 1]
    assert answer.num_rows == len(ids) - answer.start
    assert answer.token_ids.shape == (answer.num_rows, min(top_k, wanted.shape[1]))
    of_answer = np.take_along_axis(wanted, answer.token_ids.astype(np.int64), axis=1)
    assert np.abs(of_answer - answer.logprobs).max(initial=0) < tolerance
    best = -np.sort(-wanted, axis=1)[:, : answer.token_ids.shape[1]]
    # The k-th best values agree, so that the sets differ at most in ties.
    assert np.abs(best - of_answer).max(initial=0) < tolerance
    target = np.take_along_axis(wanted, ids[answer.start :, None].astype(np.int64), axis=1)[:, 0]
    assert np.abs(target - answer.target_logprobs).max() < tolerance
    tail = 1 - np.exp(of_answer).sum(axis=1)
    assert np.abs(np.exp(answer.log_tail) - tail).max() < tolerance


def refusal(teacher: Teacher, call: Callable[[], object]) -> StillhouseError:
    """Error raised by a call."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return from_rpc_error(caught.value, target=teacher.target, service="teacher")
