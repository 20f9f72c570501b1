"""Runs of classifiers against a served encoder teacher: what they learn, cache, resume, export, and refuse."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.distillation.teacher_proxy import TeacherProxy
from stillhouse.protos.evaluation.report import PLACE
from stillhouse.protos.stillhouse.v1.teacher_pb2 import ScoreRequest, ScoreResponse
from stillhouse.student_trainer.run_dir import EXIT_FAILED, RunDir
from stillhouse.student_trainer.train.checkpointing.checkpoint import PROJECTIONS
from tests.student_trainer.train.classification.conftest import NAMES, Encoders, class_spec, made_rows
from tests.student_trainer.train.runs import (
    assert_same_end,
    failure,
    finish,
    finish_here,
    make_run,
    metric,
)
from tests.support.programs import Program

pytestmark = pytest.mark.model

Run = Callable[..., RunDir]


def dense(
    directory: Path, rows: list[dict[str, Any]], keep: Sequence[int] = ()
) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """Logits [B, C] in float64, in the order of NAMES, and the states [T, H] after each layer, each row by itself."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(directory).double().eval()
    layers = model.bert.encoder.layer
    if keep:
        model.bert.encoder.layer = layers = torch.nn.ModuleList([layers[each] for each in keep])
    states: list[list[torch.Tensor]] = []
    for each in layers:
        each.register_forward_hook(
            lambda _, __, output: states[-1].append(output[0] if output.ndim == 3 else output)
        )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    order = [model.config.label2id[name] for name in NAMES]
    found = []
    with torch.no_grad():
        for row in rows:
            states.append([])
            encoded = tokenizer(row["text"], row.get("text_pair"), return_tensors="pt")
            types = torch.tensor([encoded.encodings[0].type_ids])
            found.append(model(input_ids=encoded["input_ids"], token_type_ids=types).logits[0, order])
    return torch.stack(found), states


def test_a_student_that_is_its_teacher_has_loss_zero(
    run: Run, encoders: Encoders, class_teacher: Program
) -> None:
    run_dir = run(
        class_spec(
            encoders.teacher,
            encoders.rows,
            class_teacher.target,
            optimizer={"learning_rate": 1e-12},
            loss={"hidden_mse": {"weight": 1.0}},
        )
    )
    assert max(metric(run_dir, "train/hidden_mse").values()) < 1e-9
    assert max(map(abs, metric(run_dir, "train/loss").values())) < 1e-5
    assert abs(metric(run_dir, "eval/kl")[0]) < 1e-5
    assert metric(run_dir, "eval/agreement")[0] == 1
    assert metric(run_dir, "eval/accuracy")[0] == metric(run_dir, "eval/teacher_accuracy")[0]


@pytest.mark.parametrize("is_copy", [False, True])
def test_the_served_loss_is_that_of_a_local_teacher(
    run: Run, encoders: Encoders, class_teacher: Program, *, is_copy: bool
) -> None:
    """Padded batches, pairs of texts, classes in another order than the teacher's, a narrower student or a cut copy."""
    rows, keep = made_rows(64), [0] if is_copy else []
    model = encoders.teacher if is_copy else encoders.student
    pairs = [(1, 1), (2, 1)]
    run_dir = run(
        class_spec(
            encoders.student,
            encoders.rows,
            class_teacher.target,
            student={"model": str(model), "keep_layers": keep},
            data={"eval_fraction": 0.0},
            optimizer={"learning_rate": 1e-12, "batch_size": 64, "epochs": 1.0},
            loss={
                "temperature": 2.0,
                "hard_weight": 0.2,
                "terms": [{"weight": 0.8}],
                "hidden_mse": {
                    "weight": 0.5,
                    "layers": [{"teacher": one, "student": other} for one, other in pairs],
                },
            },
        )
    )
    (teacher, theirs), (student, ours) = dense(encoders.teacher, rows), dense(model, rows, keep)
    log_p, log_q = (teacher / 2).log_softmax(-1), (student / 2).log_softmax(-1)
    soft = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    labels = torch.tensor([NAMES.index(each["label"]) for each in rows])
    hard = torch.nn.functional.cross_entropy(student, labels).item()
    matrices = {}
    if not is_copy:
        matrices = load_file(run_dir.checkpoint_path(max(run_dir.checkpoints())) / PROJECTIONS)
    hidden = 0.0
    for one, other in pairs:
        matrix = matrices[f"student_{other}_teacher_{one}"].double().T if matrices else torch.eye(32).double()
        hidden += sum(
            (mine[other - 1] @ matrix - wanted[one - 1]).square().mean().item()
            for mine, wanted in zip(ours, theirs, strict=True)
        ) / (len(rows) * len(pairs))
    assert metric(run_dir, "train/hidden_mse")[1] == pytest.approx(hidden, rel=1e-5)
    assert metric(run_dir, "train/loss")[1] == pytest.approx(
        0.8 * 4 * soft + 0.2 * hard + 0.5 * hidden, abs=1e-5
    )
    assert metric(run_dir, "train/forward_kl")[1] == pytest.approx(soft, abs=1e-5)
    assert metric(run_dir, "train/cross_entropy")[1] == pytest.approx(hard, abs=1e-5)


def test_a_cache_serves_the_same_losses_without_the_teacher(
    run: Run, encoders: Encoders, class_teacher: Program, tmp_path: Path
) -> None:
    """A cache that a run has filled, and one that was built; sets of their own rows have their own metrics."""
    lines = encoders.rows.read_text().splitlines(keepends=True)
    for name, part in (("first", lines[:40]), ("short", lines[:8])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    sets = [{"name": each, "path": str(tmp_path / f"{each}.jsonl")} for each in ("first", "short")]
    spec = class_spec(encoders.student, encoders.rows, class_teacher.target, evaluation={"sets": sets})
    spec["data"]["eval"] = [{"path": str(tmp_path / "first.jsonl")}]
    online = run({**spec, "cache": {"path": "caches/classes"}})
    run({**spec, "task": "classification_cache", "cache": {"path": "caches/built"}})
    del spec["teachers"]
    for path in ("caches/classes", "caches/built"):
        offline = run({**spec, "cache": {"path": path, "mode": "only"}})
        assert_same_end(offline, online)
        assert metric(offline, "eval/kl") == metric(online, "eval/kl")
    for name in ("accuracy", "f1", "ece", "kl", "agreement", "teacher_accuracy", "rows"):
        # Other passes, so other paddings and roundings.
        assert metric(online, f"eval/first/{name}") == pytest.approx(metric(online, f"eval/{name}"), abs=1e-6)
    assert metric(online, "eval/short/rows")[0] == 8
    assert metric(online, "eval/short/kl") != metric(online, "eval/kl")


class _Unchanged:
    def request(self, request: ScoreRequest) -> None:
        """Lets it pass."""

    def response(self, response: ScoreResponse) -> ScoreResponse:
        return response


def test_a_service_that_is_lost_changes_no_bit(run: Run, encoders: Encoders, class_teacher: Program) -> None:
    spec = class_spec(encoders.student, encoders.rows, class_teacher.target, optimizer={"batch_size": 4})
    whole = run(spec)
    lost = TeacherProxy(class_teacher.target, _Unchanged)
    spec["teachers"] = [{"targets": [lost.target, class_teacher.target]}]
    steps = iter(range(1000))

    def end_it() -> bool:
        if next(steps) == 8:
            lost.__exit__()
        return False

    with lost:
        found = run(spec, stopped=end_it)
    assert_same_end(found, whole)
    assert max(metric(found, "teacher/service0/answered").values()) > 0
    assert max(metric(found, "teacher/breaks").values()) > 0


def test_a_killed_run_resumes_to_the_same_bits(
    run: Run, encoders: Encoders, class_teacher: Program, tmp_path: Path
) -> None:
    spec = class_spec(encoders.headless, encoders.rows, class_teacher.target, checkpoint={"every_steps": 2})
    whole = run(spec)
    broken = make_run(tmp_path, "broken", spec)
    stops = iter([False] * 6 + [True] * 100)
    assert finish_here(broken, stopped=lambda: next(stops)) == 0
    assert 0 < max(broken.checkpoints()) < 6
    assert finish_here(broken, attempt=2) == 0
    assert_same_end(broken, whole)


@pytest.mark.slow
def test_several_processes_report_what_one_does(
    run: Run, encoders: Encoders, class_teacher: Program, tmp_path: Path
) -> None:
    spec = class_spec(encoders.student, encoders.rows, class_teacher.target)
    alone = run(spec)
    shared = make_run(tmp_path, "shared", {**spec, "resources": {"num_processes": 2}})
    assert finish(shared) == 0, shared.log_path(1).read_text()[-3000:]
    reports = [json.loads((each.path / PLACE).read_bytes())["sets"][0] for each in (alone, shared)]
    assert reports[0]["rows"] == reports[1]["rows"]
    for name, told in reports[0]["metrics"].items():
        assert reports[1]["metrics"][name]["change"] == pytest.approx(told["change"], abs=1e-4), name


def test_an_encoder_without_a_head_learns_the_teachers_classes_and_loads(
    run: Run, encoders: Encoders, class_teacher: Program
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run_dir = run(
        class_spec(
            encoders.headless,
            encoders.rows,
            class_teacher.target,
            optimizer={"epochs": 20.0},
            loss={"terms": [{"divergence": "jsd"}]},
        )
    )
    kl = metric(run_dir, "eval/kl")
    last = max(kl)
    assert kl[last] < kl[0] / 2
    (held_out,) = json.loads((run_dir.path / PLACE).read_bytes())["sets"]
    assert held_out["rows"] == metric(run_dir, "eval/rows")[last]
    for name in ("accuracy", "f1", "ece", "cross_entropy", "kl", "agreement"):
        told = held_out["metrics"][name]
        values = metric(run_dir, f"eval/{name}")
        assert [told[each]["value"] for each in ("before", "after")] == [values[0], values[last]]
        assert told["change"]["low"] <= told["change"]["value"] <= told["change"]["high"]
        if name in ("accuracy", "f1", "ece"):
            assert told["teacher"]["value"] == metric(run_dir, f"eval/teacher_{name}")[last]
    assert held_out["metrics"]["kl"]["change"]["high"] < 0, "surely nearer to the teacher"
    model = AutoModelForSequenceClassification.from_pretrained(run_dir.final_path)
    assert model.config.id2label == dict(enumerate(NAMES))
    encoded = AutoTokenizer.from_pretrained(run_dir.final_path)("the tea was fine", return_tensors="pt")
    assert model(**encoded).logits.shape == (1, 3)


def test_an_adapter_trains_its_head_and_merges(run: Run, encoders: Encoders, class_teacher: Program) -> None:
    from peft import AutoPeftModelForSequenceClassification
    from safetensors.numpy import load_file
    from transformers import AutoModelForSequenceClassification

    run_dir = run(
        class_spec(
            encoders.headless,
            encoders.rows,
            class_teacher.target,
            student={"model": str(encoders.headless), "lora": {"rank": 4}},
        )
    )
    names = set(load_file(run_dir.final_path / "adapter" / "adapter_model.safetensors"))
    assert any(".classifier." in name for name in names)
    assert any(".lora_A." in name for name in names)
    merged = AutoModelForSequenceClassification.from_pretrained(run_dir.final_path)
    adapted = AutoPeftModelForSequenceClassification.from_pretrained(
        run_dir.final_path / "adapter", num_labels=3
    )
    ids = torch.tensor([[2, 9, 11, 3]])
    with torch.no_grad():
        np.testing.assert_allclose(
            merged.eval()(ids).logits, adapted.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-5
        )


def test_labels_alone_train_a_cut_copy_without_a_teacher(run: Run, encoders: Encoders) -> None:
    run_dir = run(
        class_spec(
            encoders.headless,
            encoders.rows,
            None,
            student={"model": str(encoders.headless), "keep_layers": [1]},
            data={"classes": list(NAMES)},
            optimizer={"epochs": 20.0},
            loss={"terms": [{"weight": 0.0}], "hard_weight": 1.0},
        )
    )
    losses = metric(run_dir, "train/cross_entropy")
    assert losses[max(losses)] < losses[1] / 2
    config = json.loads((run_dir.final_path / "config.json").read_bytes())
    assert config["num_hidden_layers"] == 1


def test_rows_without_labels_are_distilled(
    run: Run, encoders: Encoders, class_teacher: Program, tmp_path: Path
) -> None:
    rows = tmp_path / "unlabelled.jsonl"
    rows.write_text("".join(json.dumps({"text": each["text"]}) + "\n" for each in made_rows(32)))
    run_dir = run(class_spec(encoders.student, rows, class_teacher.target))
    assert not metric(run_dir, "train/cross_entropy")
    assert not metric(run_dir, "eval/accuracy")
    assert metric(run_dir, "eval/agreement")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "fine", "label": "shrug"}, 'bad.jsonl, row 2, field label: is "shrug", which is no class'),
        (
            {"text": "fine", "label": 7},
            "row 2, field label: is the number 7, and student and teachers number",
        ),
        ({"text": "fine", "label": True}, "row 2, field label: is true"),
        ({"text": "fine"}, "row 2, field label: is missing, unlike that of row 1"),
        ({"text": " ", "label": "praise"}, "row 2, field text: is empty"),
        ({"label": "praise"}, "row 2, field text: is"),
        ({"text": "fine", "text_pair": 3, "label": "praise"}, "row 2, field text_pair: is the number 3"),
    ],
)
def test_bad_rows_end_the_run_with_file_and_row(  # noqa: PLR0917 (fixtures and parameters)
    run: Run, encoders: Encoders, class_teacher: Program, tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    rows = tmp_path / "bad.jsonl"
    rows.write_text(json.dumps({"text": "the tea", "label": "praise"}) + "\n" + json.dumps(row) + "\n")
    run_dir = run(class_spec(encoders.student, rows, class_teacher.target), code=EXIT_FAILED)
    assert words in failure(run_dir)


def test_a_classifier_and_a_language_model_are_not_taken_for_each_other(
    run: Run, encoders: Encoders, class_teacher: Program, models: Any, dataset_file: Path
) -> None:
    from tests.student_trainer.train.runs import spec_of

    run_dir = run(spec_of(models.student, dataset_file, class_teacher.target), code=EXIT_FAILED)
    assert "is a classifier, and this run needs a language model" in failure(run_dir) or (
        "differs from that of the teacher" in failure(run_dir)
    )
