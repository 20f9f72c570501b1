"""Requests to each rpc: every method of both services, found in the descriptors, with requests that it would answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from stillhouse.protos.stillhouse.v1 import run_pb2 as run
from stillhouse.protos.stillhouse.v1 import teacher_pb2 as teacher
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from stillhouse.protos.tensors.distributions import encode
from stillhouse.protos.tensors.layout import encode_differences
from tests.fuzz.messages import arbitrary, mutate, structure
from tests.fuzz.wire import damage, outline

SHARE_DAMAGED = 0.2
"""Share of the cases whose bytes are no message, or another one."""
SHARE_ARBITRARY = 0.2
"""Share of the cases that do not begin with a good request."""
MAX_STREAM = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """Names and values for hostile requests: there is more to break behind a good name than behind a bad one."""

    names: list[str] = field(default_factory=list)
    """Names of runs."""
    words: list[str] = field(default_factory=list)
    """Paths, adapters, datasets."""
    spec: run.RunSpec = field(default_factory=run.RunSpec)
    """Spec of a run that could be queued."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Files of an adapter that can be uploaded."""

    def any_words(self) -> Sequence[str]:
        return self.names + self.words


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Messages of one call."""

    method: MethodDescriptor
    payloads: tuple[bytes, ...]
    structure: int
    repeats: str
    """Seed that makes the same case again."""

    @property
    def path(self) -> str:
        return f"/{self.method.containing_service.full_name}/{self.method.name}"


def methods(service: Any) -> list[MethodDescriptor]:
    """Every rpc of a service."""
    return list(service.methods)


def case(method: MethodDescriptor, seed: str, known: Known) -> Case:
    """The case of an rpc that `seed` and what is known give."""
    rng = random.Random(seed)
    requests = _good(method, rng, known)
    words = known.any_words()
    if rng.random() < SHARE_ARBITRARY:
        kind = kind_of_input(method)
        count = rng.randrange(4) if method.client_streaming else 1
        requests = [arbitrary(kind, rng, words) for _ in range(count)]
    elif rng.random() < 0.75:
        for _ in range(rng.choice((1, 1, 2)) if requests else 0):
            mutate(rng.choice(requests), rng, words)
    if method.client_streaming:
        requests = _shuffled(requests, rng)
    payloads = [each.SerializeToString() for each in requests]
    shape = hash(tuple(structure(each) for each in requests))
    if payloads and rng.random() < SHARE_DAMAGED:
        at = rng.randrange(len(payloads))
        payloads[at] = damage(payloads[at], rng)
        shape = hash((at, outline(payloads[at])))
    return Case(method=method, payloads=tuple(payloads), structure=shape, repeats=seed)


def kind_of_input(method: MethodDescriptor) -> type[Message]:
    """The class of an rpc's requests."""
    return message_factory.GetMessageClass(method.input_type)


def _shuffled(requests: list[Any], rng: random.Random) -> list[Any]:
    """The stream as it is, or in another order, with repetitions or gaps."""
    match rng.randrange(6):
        case 0:
            rng.shuffle(requests)
        case 1:
            requests = requests[1:]
        case 2:
            requests = requests + requests
        case 3:
            requests = requests[: rng.randrange(len(requests) + 1)]
        case _:
            pass
    return requests[:MAX_STREAM]


def _good(method: MethodDescriptor, rng: random.Random, known: Known) -> list[Any]:
    """Requests that the service would answer."""
    return GOOD[method.name](rng, known)


def _ids(rng: random.Random, length: int) -> Tensor:
    return encode(np.array([rng.randrange(300) for _ in range(length)], np.int32))


def _config(rng: random.Random) -> teacher.DistributionConfig:
    return teacher.DistributionConfig(
        top_k=rng.choice((0, 1, 8)),
        pack_token_ids=rng.random() < 0.5,
        temperatures=[2.0][: rng.randrange(2)],
        num_sampled_tokens=rng.choice((0, 4)),
        sample_tail=rng.random() < 0.3,
        sample_temperature=rng.choice((0.0, 2.0)),
        sampled_logprobs=rng.random() < 0.3,
        stratified_samples=rng.random() < 0.3,
        sort_samples=rng.random() < 0.3,
        sampled_logprob_bits=rng.choice((0, 8)),
        entropy=rng.random() < 0.3,
        hidden_states=rng.random() < 0.3,
        logprob_dtype=rng.choice(
            (Tensor.DATA_TYPE_FLOAT16, Tensor.DATA_TYPE_FLOAT32, Tensor.DATA_TYPE_FALLING)
        ),
    )


def _conversation(rng: random.Random) -> teacher.Conversation:
    """A question, or one with reasoning, a call and its answer, which templates without tools refuse."""
    messages = [teacher.Message(role="user", content="Count.")]
    if rng.random() < 0.5:
        return teacher.Conversation(messages=messages)
    arguments = rng.choice(
        ('{"to": 3}', "", "{", "[1]", '{"a": NaN}', '"{}"', '{"a": "\\ud800"}', "[" * 5000)
    )
    messages += [
        teacher.Message(
            role="assistant",
            no_content=rng.random() < 0.5,
            reasoning_content=rng.choice(("", "three")),
            tool_calls=[teacher.ToolCall(id="1", name="count", arguments=arguments)],
        ),
        teacher.Message(role="tool", content="3", tool_call_id="1", name="count"),
    ]
    tools = rng.choice(
        ("", "[]", '[{"type": "function", "function": {"name": "count"}}]', "{}", "[" * 5000, "[1e999]")
    )
    options = rng.choice(("", "", "{}", '{"x": 1}', '{"messages": []}', '{"tools": 1}', "[]", "{"))
    return teacher.Conversation(messages=messages, tools=tools, chat_template_kwargs=options)


def _generate(rng: random.Random, known: Known) -> list[Any]:
    prompts = [
        teacher.Prompt(token_ids=_ids(rng, rng.randrange(1, 20))),
        teacher.Prompt(text="Ada has 3 apples", adapter=rng.choice(["", *known.words])),
        teacher.Prompt(
            conversation=_conversation(rng),
            sampling=teacher.SamplingParams(top_p=0.9, top_k=5, seed=1, stop=["."]),
            sample_indices=[0, 3],
        ),
    ]
    return [
        teacher.GenerateRequest(
            prompts=rng.sample(prompts, rng.randrange(1, 4)),
            sampling=teacher.SamplingParams(temperature=1, max_new_tokens=rng.randrange(1, 4)),
            num_samples=rng.randrange(3),
            distributions=_config(rng) if rng.random() < 0.5 else None,
            whole_samples=rng.random() < 0.5,
            part_tokens=rng.choice((0, 1, 2, -1)),
            prompt_token_ids=rng.random() < 0.5,
        )
    ]


def _score(rng: random.Random, known: Known) -> list[Any]:
    requests: list[Any] = [teacher.ScoreRequest(config=_config(rng))]
    for number in range(rng.randrange(1, 5)):
        length = rng.randrange(2, 24)
        start = rng.randrange(1, length)
        query = np.array([[rng.randrange(-1, 300), 5]] * (length - start), np.int32)
        sequence = teacher.ScoreSequence(
            sequence_id=number,
            token_ids=_ids(rng, length),
            start=start,
            adapter=rng.choice(["", "", *known.words]),
            query_token_ids=rng.choice((encode, encode_differences))(query) if rng.random() < 0.4 else None,
        )
        requests.append(teacher.ScoreRequest(sequence=sequence))
    return requests


def _upload_adapter(rng: random.Random, known: Known) -> list[Any]:
    requests = []
    for name, good in known.files.items():
        data = damage(good, rng) if rng.random() < 0.3 else good  # a hostile file by a good name
        half = len(data) // 2
        requests += [
            teacher.UploadAdapterRequest(file_name=name, data=data[:half]),
            teacher.UploadAdapterRequest(data=data[half:]),
        ]
    return requests


def _name(rng: random.Random, known: Known) -> str:
    return rng.choice(known.names or ["runs/aaaaaaaaaaaa"])


def _word(rng: random.Random, known: Known) -> str:
    return rng.choice(known.words[:1] * 4 + known.words or [""])


def _create(rng: random.Random, known: Known) -> list[Any]:
    request = run.CreateRunRequest(spec=known.spec, validate_only=rng.random() < 0.7)
    if rng.random() < 0.3:
        digits = "".join(rng.choice("0123456789abcdef") for _ in range(12))
        request.request_id = f"123e4567-e89b-42d3-a456-{digits}"
    return [request]


def _upload_dataset(rng: random.Random, known: Known) -> list[Any]:
    rows = b'{"prompt": "a", "completion": "b"}\n' * rng.randrange(1, 4)
    return [
        run.UploadDatasetRequest(
            file_name="rows.jsonl",
            data=rows,
            dataset_id=rng.choice(("", "sums", "a" * 65)),
            num_rows=rng.randrange(-1, 4),
            num_tokens=rng.randrange(2),
        ),
        run.UploadDatasetRequest(data=rows),
    ]


def _dataset(rng: random.Random) -> str:
    return rng.choice(("datasets/sums", f"datasets/sums@{rng.randrange(1, 9)}", "datasets/" + "0" * 64))


def _inspect_rows(rng: random.Random, known: Known) -> list[Any]:
    spec = run.RunSpec()
    spec.CopyFrom(known.spec)
    spec.student.model = "/none"  # one that gets further starts a process for seconds
    texts = ('{"text": "a"}', "{", "[]", '{"messages": 1}')
    rows = [run.InspectedRow(number=1, json=rng.choice(texts), in_full=True)]
    return [run.InspectRowsRequest(spec=spec, rows=rows)]


def _inspect_dataset(rng: random.Random, known: Known) -> list[Any]:
    spec = run.RunSpec()
    spec.CopyFrom(known.spec)
    spec.student.model = "/none"  # as above
    dataset = run.DatasetSpec(path=rng.choice((_dataset(rng), _word(rng, known))), format="auto")
    request = run.InspectDatasetRequest(dataset=dataset, spec=spec)
    for name in ("first_row", "num_rows", "sample_rows", "max_rows"):
        setattr(request, name, rng.choice((-1, 0, 1, 10**6)))
    return [request]


GOOD: Mapping[str, Callable[[random.Random, Known], list[Any]]] = {
    "GetTeacherInfo": lambda rng, _known: [teacher.GetTeacherInfoRequest(load=rng.random() < 0.5)],
    "GetTokenizer": lambda _rng, _known: [teacher.GetTokenizerRequest()],
    "Generate": _generate,
    "Score": _score,
    "UploadAdapter": _upload_adapter,
    "LoadAdapter": lambda rng, known: [
        teacher.LoadAdapterRequest(adapter=f"a{rng.randrange(6)}", path=_word(rng, known))
    ],
    "UnloadAdapter": lambda rng, _known: [teacher.UnloadAdapterRequest(adapter=f"a{rng.randrange(6)}")],
    "CreateRun": _create,
    "GetRun": lambda rng, known: [run.GetRunRequest(name=_name(rng, known))],
    "ListRuns": lambda rng, known: [
        run.ListRunsRequest(
            page_size=rng.randrange(4),
            page_token=rng.choice(("", "3-")),
            states=[run.Run.STATE_PENDING],
            labels=[_word(rng, known)],
            text=_word(rng, known),
        )
    ],
    "WatchRun": lambda rng, known: [
        run.WatchRunRequest(name=_name(rng, known), after_sequence=rng.randrange(9))
    ],
    "StopRun": lambda rng, known: [run.StopRunRequest(name=_name(rng, known))],
    "ResumeRun": lambda rng, known: [
        run.ResumeRunRequest(
            name=_name(rng, known),
            changes=run.RunSpec(checkpoint=run.CheckpointSpec(keep=rng.randrange(1, 4)))
            if rng.random() < 0.5
            else None,
        )
    ],
    "DeleteRun": lambda rng, known: [run.DeleteRunRequest(name=_name(rng, known))],
    "AttachResult": lambda rng, known: [
        run.AttachResultRequest(name=_name(rng, known), file_name="results.json", data=b'{"acc": 1}')
    ],
    "QueryMetrics": lambda rng, known: [
        run.QueryMetricsRequest(name=_name(rng, known), keys=["train/loss"], end_step=5, max_points=3)
    ],
    "UploadDataset": _upload_dataset,
    "InspectRows": _inspect_rows,
    "InspectDataset": _inspect_dataset,
    "InspectStudent": lambda rng, known: [
        run.InspectStudentRequest(model=_word(rng, known), revision=rng.choice(("", "main")))
    ],
    "ListDatasets": lambda rng, _known: [
        run.ListDatasetsRequest(
            page_size=rng.randrange(4),
            page_token=rng.choice(("", "3-", "3-sums")),
            dataset_id=rng.choice(("", "sums")),
        )
    ],
    "GetDataset": lambda rng, _known: [run.GetDatasetRequest(name=_dataset(rng))],
    "DeleteDataset": lambda rng, _known: [run.DeleteDatasetRequest(name=_dataset(rng))],
    "ListArtifacts": lambda rng, known: [run.ListArtifactsRequest(name=_name(rng, known))],
    "DownloadArtifact": lambda rng, known: [
        run.DownloadArtifactRequest(name=_name(rng, known), path=_word(rng, known), start_offset=1)
    ],
    "StreamLogs": lambda rng, known: [
        run.StreamLogsRequest(name=_name(rng, known), start_offset=-5, follow=rng.random() < 0.2)
    ],
}
"""By the rpc's name; one without a line here fails the suite."""
