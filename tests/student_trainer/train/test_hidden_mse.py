"""Hidden states in the objective: against a dense computation, with projections, over a resume, and where they are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.stillhouse.v1.teacher_pb2 import (
    CAPABILITY_HIDDEN_STATES,
    CAPABILITY_LAYER_STATES,
    GetTeacherInfoResponse,
)
from stillhouse.student_trainer.config.proto import from_proto
from stillhouse.student_trainer.config.schema import StudentConfig
from stillhouse.student_trainer.config.settled.layer_pairs import EVEN, LAST, even_pairs
from stillhouse.student_trainer.run_dir import EXIT_FAILED, MANIFEST, RunDir
from stillhouse.student_trainer.train.checkpointing.checkpoint import PROJECTIONS, facts_of
from stillhouse.student_trainer.train.data.corpus import load_corpus
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.setup.hidden_layers import RULE_FACT, kept_rule
from stillhouse.student_trainer.train.student.hidden_term import make_projections
from stillhouse.student_trainer.train.student.student import Student
from stillhouse.student_trainer.train.teacher.hidden_demands import require_layers
from tests.conftest import Models
from tests.student_trainer.config.specs import SMALLEST, changed
from tests.student_trainer.config.specs import spec_of as run_spec
from tests.student_trainer.train.runs import (
    assert_same_end,
    events,
    failure,
    finish,
    finish_here,
    make_run,
    metric,
    spec_of,
)
from tests.student_trainer.train.student.tiny_architectures import tiny_model
from tests.support.programs import Program

Run = Callable[..., RunDir]
HIDDEN = {"weight": 3.0}
WIDER = {
    "weight": 3.0,
    "layers": [{"teacher": 0, "student": 0}, {"teacher": 1, "student": 1}, {"teacher": 2, "student": 1}],
}


def pre_distillation(models: Models, data: Path, target: str, **loss: Any) -> dict[str, Any]:
    """The older system's warm start: 0.8 T² KL + 0.2 cross-entropy + hidden states, of a copy of one of two layers."""
    return spec_of(
        models.teacher,
        data,
        target,
        student={"model": str(models.teacher), "keep_layers": [1]},
        loss={
            "terms": [{"weight": 0.8}],
            "hard_weight": 0.2,
            "temperature": 2.0,
            "sparse_target": "tail_bucket",
            "hidden_mse": HIDDEN,
            **loss,
        },
    )


def dense_states(directory: Path, token_ids: Any, keep: Sequence[int] = ()) -> list[torch.Tensor]:
    """[T, H] in float64 before the first layer and after each, the last behind the final norm, as it reaches the output layer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory).double().eval()
    if keep:
        model.model.layers = torch.nn.ModuleList([model.model.layers[each] for each in keep])
        model.config.num_hidden_layers = len(keep)
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = number
    inputs: list[torch.Tensor] = []
    for each in model.model.layers:
        each.register_forward_pre_hook(lambda _, given: inputs.append(given[0][0]))
    with torch.no_grad():
        last = model.model(torch.tensor([token_ids.tolist()]), use_cache=False).last_hidden_state[0]
    return [*inputs, last]


@pytest.mark.model
@pytest.mark.parametrize(
    ("narrow", "hidden", "pairs"),
    [
        (False, HIDDEN, [(2, 1)]),
        (False, {**HIDDEN, "normalise": True, "layers": [{"teacher": 1, "student": 0}]}, [(1, 0)]),
        (True, WIDER, [(0, 0), (1, 1), (2, 1)]),
    ],
)
def test_the_term_is_that_of_a_dense_computation(  # noqa: PLR0917 (fixtures and parameters)
    run: Run,
    models: Models,
    hf_teacher: Program,
    tmp_path: Path,
    narrow: bool,
    hidden: Mapping[str, Any],
    pairs: Sequence[tuple[int, int]],
) -> None:
    """Rows of unequal lengths, padded or packed, whose prompts do not count."""
    data = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": text[:20], "completion": text[20 : 30 + 20 * number]}
        for number, text in enumerate(models.texts[:4])
    ]
    data.write_text("".join(json.dumps(each) + "\n" for each in rows))
    spec = pre_distillation(models, data, hf_teacher.target, hidden_mse=hidden)
    if narrow:
        spec["student"] = {"model": str(models.student)}
    spec["data"] |= {"eval_fraction": 0.0, "packing": "normalise" in hidden}
    spec["optimizer"]["learning_rate"] = 1e-12
    run_dir = run(spec)
    projections = run_dir.checkpoint_path(max(run_dir.checkpoints())) / PROJECTIONS
    matrices = load_file(projections) if projections.is_file() else {}
    assert len(matrices) == (len(pairs) if narrow else 0)
    assert not (run_dir.final_path / PROJECTIONS).exists()

    from transformers import AutoTokenizer

    config = from_proto(run_dir.spec())
    tokenizer = AutoTokenizer.from_pretrained(models.teacher)
    examples = load_corpus(config.data, config.evaluation, tokenizer, tmp_path).train
    assert len({len(each.token_ids) for each in examples}) > 1
    total = count = 0.0
    for each in examples:
        theirs = dense_states(models.teacher, each.token_ids)
        ours = dense_states(Path(config.student.model), each.token_ids, config.student.keep_layers)
        before = torch.from_numpy(each.mask).nonzero()[:, 0] - 1
        count += len(before)
        for at_teacher, at_student in pairs:
            one, other = ours[at_student][before], theirs[at_teacher][before]
            if narrow:
                one = one @ matrices[f"student_{at_student}_teacher_{at_teacher}"].double().T
            if hidden.get("normalise"):
                one, other = (functional.layer_norm(state, state.shape[-1:]) for state in (one, other))
            total += (one - other).square().mean(-1).sum().item() / len(pairs)
    assert metric(run_dir, "train/hidden_mse")[1] == pytest.approx(total / count, rel=1e-5)
    parts = {
        name: metric(run_dir, f"train/{name}")[1] for name in ("forward_kl", "cross_entropy", "hidden_mse")
    }
    loss = 0.8 * 4 * parts["forward_kl"] + 0.2 * parts["cross_entropy"] + 3 * parts["hidden_mse"]
    assert metric(run_dir, "train/loss")[1] == pytest.approx(loss, rel=1e-5)


@pytest.mark.model
def test_a_copy_of_layers_comes_nearer_and_the_teacher_itself_is_at_0(
    run: Run, models: Models, dataset_file: Path, hf_teacher: Program
) -> None:
    hidden = metric(run(pre_distillation(models, dataset_file, hf_teacher.target)), "train/hidden_mse")
    assert hidden[max(hidden)] < 0.9 * hidden[1]
    spec = pre_distillation(models, dataset_file, hf_teacher.target)
    spec["student"] = {"model": str(models.teacher), "gradient_checkpointing": True, "lora": {"rank": 2}}
    spec["optimizer"]["learning_rate"] = 1e-12
    assert max(metric(run(spec), "train/hidden_mse").values()) < 1e-9


@pytest.mark.model
def test_projections_learn_and_resume_to_the_same_bits(
    run: Run, models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path
) -> None:
    spec = spec_of(
        models.student,
        dataset_file,
        hf_teacher.target,
        loss={"terms": [{"weight": 0}], "hidden_mse": {**WIDER, "normalise": True}},
        checkpoint={"every_steps": 2},
    )
    spec["optimizer"] |= {"learning_rate": 1e-2, "epochs": 2.0}
    whole = run(spec)
    hidden = metric(whole, "train/hidden_mse")
    assert hidden[max(hidden)] < 0.9 * hidden[1]
    broken = make_run(tmp_path, "broken", spec)
    stops = iter([False] * 6 + [True] * 100)
    assert finish_here(broken, stopped=lambda: next(stops)) == 0
    assert 0 < max(broken.checkpoints()) < max(whole.checkpoints())
    assert finish_here(broken, attempt=2) == 0
    assert_same_end(broken, whole)
    ends = [
        load_file(each.checkpoint_path(max(each.checkpoints())) / PROJECTIONS) for each in (whole, broken)
    ]
    assert all(torch.equal(matrix, ends[1][name]) for name, matrix in ends[0].items())


def as_written_before(run_dir: RunDir) -> None:
    """Makes a run that names no layers and whose checkpoints do not tell them, as those of earlier versions."""
    effective = run_dir.effective_spec()
    effective.loss.hidden_mse.ClearField("layers")
    run_dir.write_effective_spec(effective)
    for step in run_dir.checkpoints():
        path = run_dir.checkpoint_path(step) / MANIFEST
        path.write_text(
            json.dumps({key: each for key, each in json.loads(path.read_bytes()).items() if key != RULE_FACT})
        )


@pytest.mark.model
@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_compared_the_last_layers_keeps_its_objective(
    models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path, num_processes: int
) -> None:
    """Earlier versions compared the last states alone, and said so nowhere."""

    def begun(name: str, hidden: Mapping[str, Any]) -> RunDir:
        spec = pre_distillation(models, dataset_file, hf_teacher.target, hidden_mse=hidden)
        spec["student"] = {"model": str(models.teacher), "lora": {"rank": 2}}
        spec["optimizer"] |= {"max_steps": 4}
        spec["data"] |= {"eval_fraction": 0}
        spec["checkpoint"] = {"every_steps": 2}
        run_dir = make_run(tmp_path, name, spec)
        assert finish_here(run_dir, stopped=lambda: bool(run_dir.checkpoints())) == 0
        assert max(run_dir.checkpoints()) < 4
        return run_dir

    expected = begun("expected", {**HIDDEN, "layers": [{"teacher": 2, "student": 2}]})
    old = begun("old", {**HIDDEN, "layers": [{"teacher": 2, "student": 2}]})
    as_written_before(old)
    assert finish_here(expected, attempt=2) == 0
    if num_processes == 1:
        assert finish_here(old, attempt=2) == 0, failure(old)
        assert metric(old, "train/loss") == metric(expected, "train/loss")
    else:
        effective = old.effective_spec()
        effective.resources.num_processes = num_processes
        old.write_effective_spec(effective)
        assert finish(old, attempt=2) == 0, old.log_path(2).read_text()[-3000:]
        assert metric(old, "train/loss") == pytest.approx(metric(expected, "train/loss"), rel=1e-4)
    settled = old.effective_spec().loss.hidden_mse
    assert [(each.teacher, each.student) for each in settled.layers] == [(2, 2)]
    assert settled.layers_reason.startswith("the last layers alone")
    assert facts_of(old, 4)[RULE_FACT] == LAST


@pytest.mark.model
def test_layers_are_settled_once_and_kept_with_the_run(
    run: Run, models: Models, dataset_file: Path, hf_teacher: Program
) -> None:
    spec = pre_distillation(models, dataset_file, hf_teacher.target)
    spec["student"] = {"model": str(models.teacher)}
    spec["optimizer"]["max_steps"] = 1
    run_dir = run(spec)
    settled = run_dir.effective_spec().loss.hidden_mse
    assert [(each.teacher, each.student) for each in settled.layers] == [(1, 1), (2, 2)]
    assert settled.layers_reason == "spread evenly over 2 layers of the teacher and 2 of the student"
    (event,) = (each for each in events(run_dir, "settled") if "layers" in each)
    assert event["layers"]["loss"]["layers"][0] == {"teacher": 1, "student": 1}
    assert kept_rule(run_dir) == facts_of(run_dir, 1)[RULE_FACT] == EVEN
    assert from_proto(run_dir.effective_spec()).loss.hidden_mse is not None
    as_written_before(run_dir)
    assert kept_rule(run_dir) == LAST
    (run_dir.checkpoint_path(1) / PROJECTIONS).touch()
    assert kept_rule(run_dir) == EVEN


@pytest.mark.model
def test_a_layer_that_the_teacher_lacks_is_refused(
    run: Run, models: Models, dataset_file: Path, hf_teacher: Program
) -> None:
    hidden = {"layers": [{"teacher": 3, "student": 1}]}
    spec = spec_of(models.student, dataset_file, hf_teacher.target, loss={"hidden_mse": hidden})
    told = failure(run(spec, code=EXIT_FAILED))
    assert (
        "loss.hidden_mse.layers[0].teacher: is 3; the teacher has 2 layers, so give a number in [0, 2]"
        in told
    )


@pytest.mark.parametrize(
    ("teacher", "student", "pairs"),
    [
        (12, 6, [(2, 1), (4, 2), (6, 3), (8, 4), (10, 5), (12, 6)]),
        (12, 5, [(2, 1), (5, 2), (7, 3), (10, 4), (12, 5)]),
        (2, 4, [(1, 2), (2, 4)]),
        (3, 1, [(3, 1)]),
        (128, 128, [(each, each) for each in range(2, 129, 2)]),
    ],
)
def test_pairs_spread_evenly(teacher: int, student: int, pairs: Sequence[tuple[int, int]]) -> None:
    assert [(each.teacher, each.student) for each in even_pairs(teacher, student)] == pairs


@pytest.mark.parametrize(
    ("capabilities", "layers", "words"),
    [
        (
            [],
            (),
            "loss.hidden_mse needs hidden states, which the engine of the teacher at here (vllm) does not give",
        ),
        (
            [CAPABILITY_HIDDEN_STATES],
            (12, 24),
            "compare the last states alone by layers: [{teacher: 24, student: S}]",
        ),
        (
            [CAPABILITY_LAYER_STATES],
            tuple(range(1, 25)),
            "a row has 1000 tokens, whose states after 24 layers of 4096",
        ),
    ],
)
def test_states_that_a_teacher_does_not_give_are_refused(
    capabilities: list[Any], layers: tuple[int, ...], words: str
) -> None:
    longest = Example(token_ids=np.zeros(1000, np.int32), mask=np.ones(1000, np.bool_), place="a row")
    info = GetTeacherInfoResponse(engine="vllm", num_layers=24, hidden_size=4096, capabilities=capabilities)
    with pytest.raises(StillhouseError) as error:
        require_layers(info, "here", layers, longest)
    assert words in error.value.message
    info.capabilities[:] = [CAPABILITY_HIDDEN_STATES]
    require_layers(info, "here", (24,), longest)
    info.num_layers = 0
    with pytest.raises(
        StillhouseError, match=r"the teacher at here \(vllm\), of an earlier version, does not"
    ):
        require_layers(info, "here", (), longest)


def test_projections_begin_with_values_of_their_own_from_any_seed() -> None:
    layers = [{"teacher": 0, "student": 1}, {"teacher": 256, "student": 0}]
    spec = run_spec({**SMALLEST, "loss": {"hidden_mse": {"layers": layers}}})
    spec.optimizer.seed = 2**62
    student = Student(tiny_model("llama"), SimpleNamespace(eos_token_id=None), StudentConfig(model="student"))
    one, other = make_projections(from_proto(spec), student, 64).values()
    assert one.shape == other.shape == (64, 32)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"cache": {"path": "caches/x"}}, "which no cache stores for their size: leave out the cache"),
        ({"contexts": [{"student": {}}]}, "not generated text"),
        (
            {"teachers": [{"name": name, "targets": ["127.0.0.1:7401"]} for name in ("a", "b")]},
            "several are mixed",
        ),
        ({"loss": {"hidden_mse": {"layers": [{"teacher": 1}]}}}, "layers[0].student"),
        ({"loss": {"hidden_mse": {"layers": [{"teacher": 0, "student": 0}] * 2}}}, "names a pair twice"),
    ],
)
def test_what_has_no_hidden_states_is_refused_at_create(others: dict[str, Any], words: str) -> None:
    with pytest.raises(StillhouseError, match=r"loss\.hidden_mse") as error:
        from_proto(run_spec({**SMALLEST, "loss": {"hidden_mse": HIDDEN}, **others}))
    assert words in str(error.value)
    assert from_proto(changed("loss.hidden_mse", HIDDEN)).loss.compares_hidden
