"""The engine on vLLM's own server: conformance over gRPC against transformers, adapters, both endpoints, and a run."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse.client.api import Trainer
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engine import DistributionOptions, GenerateInput, ScoreInput
from stillhouse.teacher_service.engines.openai.engine import OpenAiEngine
from stillhouse.teacher_service.engines.openai.vllm_server import COMPLETIONS, VllmServer
from tests.conftest import Models
from tests.support.processes import no_process_left
from tests.support.programs import Program, start_program
from tests.support.runs import curve, small_spec, stillhouse, write_run_file
from tests.support.vllm_server import NAME, vllm_server
from tests.teacher_service.calls import (
    Teacher,
    assert_agrees,
    distribution_config,
    prompt,
    random_ids,
    reference_logprobs,
    refusal,
    sequence,
)
from tests.teacher_service.engines import test_contract as contract
from tests.teacher_service.engines import test_generation as generation

pytestmark = pytest.mark.model

KEY = "sk-of-the-upstream-server"
MAX_LOGPROBS = 256

# The claims of every engine, on the teacher of this module.
test_scores_are_those_of_a_float32_forward = contract.test_scores_are_those_of_a_float32_forward
test_top_k_goes_from_none_to_256 = contract.test_top_k_goes_from_none_to_256
test_each_bad_sequence_gets_its_own_error = (
    contract.test_each_bad_sequence_gets_its_own_error_and_the_others_are_scored
)
test_optional_parts_are_right_or_refused_by_name = contract.test_optional_parts_are_right_or_refused_by_name
test_query_logprobs_are_right_or_refused_by_name = contract.test_query_logprobs_are_right_or_refused_by_name
test_concurrent_streams_get_their_own_responses = contract.test_concurrent_streams_get_their_own_responses
test_cancelled_calls_leave_the_teacher_free = contract.test_cancelled_calls_leave_the_teacher_free
test_generation_reports_the_distributions_of_scoring_the_completion = (
    generation.test_generation_reports_the_distributions_of_scoring_the_completion
)
test_greedy_generation_takes_the_argmax = generation.test_greedy_generation_takes_the_argmax
test_a_seed_fixes_each_sample_in_any_batch = generation.test_a_seed_fixes_each_sample_in_any_batch
test_unstreamed_samples_equal_streamed_ones = generation.test_unstreamed_samples_equal_streamed_ones
test_a_stop_string_ends_a_sample_and_is_not_part_of_it = (
    generation.test_a_stop_string_ends_a_sample_and_is_not_part_of_it
)
test_a_sample_ends_at_the_models_length = generation.test_a_sample_ends_at_the_models_length


@pytest.fixture(scope="module")
def upstream(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of vLLM's server."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    with vllm_server(
        models.teacher,
        directory=tmp_path_factory.mktemp("vllm-server"),
        key=KEY,
        adapters={"style": models.adapter_a},
        max_logprobs=MAX_LOGPROBS,
    ) as url:
        yield url


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("key") / "key"
    file.write_text(KEY)
    file.chmod(0o600)
    return file


@pytest.fixture(scope="module")
def program(
    upstream: str, key_file: Path, models: Models, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Program]:
    """A `stillhouse-teacher` on it."""
    options = {"--upstream": upstream, "--tokenizer": models.teacher, "--upstream-key-file": key_file}
    with (
        no_process_left() as mark,
        start_program(
            "teacher",
            [
                "stillhouse.teacher_service",
                *(str(part) for pair in options.items() for part in pair),
                *("--listen", "127.0.0.1:0", "--log-level", "debug"),
            ],
            directory=tmp_path_factory.mktemp("upstream-teacher"),
            environment=mark,
        ) as started,
    ):
        yield started
        assert KEY not in started.log(1 << 24)


@pytest.fixture(scope="module")
def teacher(program: Program) -> Iterator[Teacher]:
    client = Teacher(program.target)
    yield client
    client.close()


@asynccontextmanager
async def engine_on(url: str, models: Models, key_file: Path, **fields: Any) -> AsyncIterator[OpenAiEngine]:
    config = TeacherConfig(
        engine="openai", upstream=url, tokenizer=str(models.teacher), upstream_key_file=key_file, **fields
    )
    engine = await OpenAiEngine.load(config)
    try:
        yield engine
    finally:
        await engine.close()


def test_it_describes_what_the_server_has(teacher: Teacher) -> None:
    info = teacher.info
    assert info.model == NAME
    assert (info.tokenizer_size, info.vocab_size) == (384, 392)
    assert (info.max_sequence_tokens, info.max_top_k, info.max_query_tokens) == (512, MAX_LOGPROBS, 0)
    assert info.engine.startswith("openai (vllm 0.")
    assert list(info.eos_token_ids) == [0]
    assert list(info.capabilities) == [teacher_pb2.CAPABILITY_COMPACT_LOGPROBS]
    assert [each.name for each in info.adapters] == ["style"]
    shown = stillhouse("--teacher", teacher.target, "teacher", "info").stdout
    assert info.engine in shown
    assert "compact_logprobs" in shown


def test_the_servers_adapters_are_adapters(teacher: Teacher, models: Models) -> None:
    ids = random_ids(24, seed=8)
    reference = reference_logprobs(models.teacher, ids, models.adapter_a)
    assert_agrees(teacher.score_one(ids, adapter="style"), ids, reference, top_k=20)
    sample = teacher.generate(
        [prompt(ids, adapter="style")], config=distribution_config(), seed=1, max_new_tokens=8
    )[0, 0]
    whole = np.concatenate([ids, np.array(sample.ids, np.int32)])
    reference = reference_logprobs(models.teacher, whole, models.adapter_a)
    assert_agrees(sample.distributions, whole, reference, top_k=20)
    assert sample.adapter_fingerprint == teacher.info.adapters[0].fingerprint
    load = teacher_pb2.LoadAdapterRequest(adapter="b/1", path=str(models.adapter_b))
    error = refusal(teacher, lambda: teacher.stub.LoadAdapter(load))
    assert error.reason is Reason.CAPABILITY
    assert "Load it there" in error.message
    unknown = teacher.score([sequence(ids, adapter="nobody")])[0]
    assert isinstance(unknown, StillhouseError)
    assert unknown.reason is Reason.ADAPTER_NOT_FOUND


async def test_limits_are_found_and_completions_serve_where_the_token_endpoint_is_missing(
    upstream: str, models: Models, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = random_ids(30)
    monkeypatch.setattr("stillhouse.teacher_service.engines.openai.vllm_server.TOKENS", "/v1/absent")
    async with engine_on(upstream, models, key_file, max_top_k=24) as engine:
        item = ScoreInput(token_ids=ids, start=3, options=DistributionOptions(top_k=24))
        assert isinstance(engine._dialect, VllmServer)
        assert engine._dialect.score_request(item, 24).path == COMPLETIONS
        assert_agrees(await engine.score(item), ids, reference_logprobs(models.teacher, ids), top_k=24)
        assert engine.info.max_top_k == 24
        sample = GenerateInput(
            token_ids=ids, temperature=0.5, max_new_tokens=5, options=DistributionOptions(top_k=3)
        )
        chunks = [chunk async for chunk in engine.generate(sample)]
        whole = np.concatenate([ids, *(chunk.token_ids for chunk in chunks)])
        rows = chunks[0].distributions
        assert rows is not None
        assert_agrees(rows, whole[: 30 + rows.num_rows], reference_logprobs(models.teacher, whole), top_k=3)
        hot = GenerateInput(token_ids=ids, temperature=100.0, max_new_tokens=2)
        with pytest.raises(StillhouseError, match="answers 400") as caught:
            await anext(aiter(engine.generate(hot)))
        assert caught.value.reason is Reason.INVALID_REQUEST


async def test_a_wrong_key_is_refused_without_showing_it(
    upstream: str, models: Models, tmp_path: Path
) -> None:
    file = tmp_path / "key"
    file.write_text("sk-wrong-one")
    file.chmod(0o600)
    with pytest.raises(StillhouseError, match="refuses the API key") as caught:
        async with engine_on(upstream, models, file):
            pass
    assert caught.value.reason is Reason.INVALID_CONFIG
    assert "sk-wrong" not in caught.value.message


def test_a_run_is_distilled_from_it(
    program: Program,
    trainer_service: Callable[..., Program],
    models: Models,
    dataset_file: Path,
    tmp_path: Path,
) -> None:
    service = trainer_service()
    spec = small_spec(student=models.student, train=dataset_file, teacher=program.target, steps=6)
    file = write_run_file(tmp_path / "run.yaml", spec)
    watched = stillhouse("--trainer", service.target, "run", "create", str(file), "--watch", "--json")
    assert "COMPLETED" in watched.stdout
    assert len([json.loads(line) for line in watched.stdout.splitlines()]) > 6
    with Trainer(service.target) as client:
        evaluations = curve(client.run("latest"), "eval/kl")
    assert evaluations[6] < evaluations[0]
    checked = stillhouse("--teacher", program.target, "doctor", expect=None)
    assert "responds in" in checked.stdout
