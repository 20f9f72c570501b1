"""The task form's flat camelCase names are read as fields of a run, with their own lines in errors."""

from __future__ import annotations

import pytest
from google.protobuf.json_format import MessageToDict

from stillhouse.client.runfile.load import parse_run
from stillhouse.protos.errors import StillhouseError

FORM = """{
  "taskName": "first",
  "studentModel": "models/student",
  "teachers": [{"targets": ["h:1"]}],
  "datasetId": "datasets/x",
  "epochs": 10, "batchSize": 16, "gradAccumSteps": 4, "learningRate": 0.0001,
  "optimizer": "adamw", "lrScheduler": "cosine", "weightDecay": 0.01, "maxGradNorm": 1.0,
  "gpuDevices": [0, 1], "autoSaveCheckpoint": true, "checkpointInterval": 5,
  "loraRank": 16, "targetModules": ["q_proj", "v_proj"], "layers": "all", "biasTrain": "none",
  "temperature": 3.0, "hardLabelWeight": 0.3, "softLabelWeight": 0.7, "lossType": "kl_div"
}"""


def test_the_form_reads_as_a_run() -> None:
    spec = parse_run(FORM.encode(), "form.json").spec
    assert MessageToDict(spec, preserving_proto_field_name=True) == {
        "display_name": "first",
        "student": {
            "model": "models/student",
            "lora": {"rank": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none"},
        },
        "teachers": [{"targets": ["h:1"]}],
        "data": {"train": [{"path": "datasets/x"}]},
        "optimizer": {
            **{"micro_batch_size": 16, "grad_accum_steps": 4, "epochs": 10.0, "learning_rate": 0.0001},
            **{"name": "adamw", "lr_scheduler": "cosine", "weight_decay": 0.01, "max_grad_norm": 1.0},
        },
        "resources": {"gpus": [0, 1]},
        "checkpoint": {"every_epochs": 5.0},
        "loss": {
            "temperature": 3.0,
            "hard_weight": 0.3,
            "terms": [{"divergence": "forward_kl", "weight": 0.7}],
        },
    }


def test_alpha_is_the_share_of_the_soft_labels() -> None:
    loss = parse_run(b"alpha: 0.7\nstudentModel: m", "f.yaml").spec.loss
    assert (loss.terms[0].weight, round(loss.hard_weight, 12)) == (0.7, 0.3)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("student: {model: m}\nlearningRate: fast\n", "f.yaml:2:15: optimizer.learningRate|learning_rate"),
        ("studentModel: m\nalpha: 3\n", "f.yaml:2:1: alpha"),
        ("student: {model: m}\nautoSaveCheckpoint: false\n", "f.yaml:2:1: autoSaveCheckpoint"),
        ("optimizer: {epochs: 1}\nepochs: 2\nbatchSize: 1\n", "f.yaml:2:1: optimizer.epochs: is given twice"),
        ("optimizer: 3\nbatchSize: 2\n", "f.yaml:1"),
    ],
)
def test_a_wrong_value_is_shown_where_it_stands(text: str, problem: str) -> None:
    with pytest.raises(StillhouseError) as raised:
        parse_run(text.encode(), "f.yaml")
    first, _, second = problem.partition("|")
    assert first in raised.value.message or (second and second in raised.value.message), raised.value.message


def test_a_run_of_its_own_names_is_untouched() -> None:
    spec = parse_run(b"optimizer: {name: adamw, learningRate: 0.5}\nstudent: {model: m}", "f.yaml").spec
    assert (spec.optimizer.name, spec.optimizer.learning_rate) == ("adamw", 0.5)
