"""A model over two workers on a CPU, by the flag alone: the same distributions as with one; and each worker's cores."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Models
from tests.support.processes import no_process_left
from tests.support.programs import Program, start_teacher
from tests.teacher_service.calls import Teacher, distribution_config, prompt, random_ids, sequence

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed", allow_module_level=True)

from stillhouse.protos.errors import StillhouseError
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engines.vllm.parallelism import cores_of_workers, parallel_arguments


@pytest.mark.parametrize(
    ("cores", "workers", "binding"),
    [
        ([0, 1], 2, "0|1"),
        ([0, 1, 2, 3, 6], 2, "0,1|2,3"),
        ([4], 2, "4|4"),
        ([0, 1, 2], 4, "0|1|2|0"),
    ],
)
def test_workers_share_the_cores(cores: list[int], workers: int, binding: str) -> None:
    assert cores_of_workers(cores, workers) == binding


def test_sizes_reach_vllm_and_stages_are_refused_where_it_would_die() -> None:
    config = TeacherConfig(
        model="a/b", engine="vllm", tensor_parallel_size=4, pipeline_parallel_size=2, data_parallel_size=3
    )
    assert parallel_arguments(config, on_cpu=False) == {
        "tensor_parallel_size": 4,
        "pipeline_parallel_size": 2,
        "data_parallel_size": 3,
    }
    with pytest.raises(StillhouseError, match="--tensor-parallel-size instead"):
        parallel_arguments(config, on_cpu=True)


@pytest.mark.slow
def test_two_workers_score_like_one(models: Models, vllm_teacher: Program, tmp_path: Path) -> None:
    ids = [random_ids(length) for length in (2, 33, 200)]
    with (
        no_process_left() as mark,
        start_teacher(
            models.teacher,
            engine="vllm",
            directory=tmp_path,
            options=["--dtype", "float32", "--tensor-parallel-size", "2", "--kv-cache-gib", "0.25"],
            environment=mark,
        ) as program,
    ):
        one, two = Teacher(vllm_teacher.target), Teacher(program.target)
        assert one.info.model_fingerprint == two.info.model_fingerprint
        # The adapter's matrices are split too.
        for each in (one, two):
            each.load_adapter("parallel", models.adapter_a)
        for adapter in ("", "parallel"):
            sequences = [sequence(each, adapter=adapter) for each in ids]
            wanted, got = one.score(sequences, top_k=8), two.score(sequences, top_k=8)
            for number in wanted:
                assert np.abs(wanted[number].target_logprobs - got[number].target_logprobs).max() < 1e-4  # type: ignore[union-attr]
                assert np.abs(wanted[number].logprobs - got[number].logprobs).max() < 1e-4  # type: ignore[union-attr]
        prompts = [prompt(ids[1])]
        texts = [
            each.generate(prompts, config=distribution_config(8), temperature=0, max_new_tokens=8)[0, 0].ids
            for each in (one, two)
        ]
        assert texts[0] == texts[1]
        one.unload_adapter("parallel")
        one.close()
        two.close()
