"""docs/reference/metrics.md: Prometheus metrics of both services and the metrics of a run, found in the code."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from scripts.reference.markdown import NOTE, table
from stillhouse.protos.telemetry.metrics import MetricSample
from stillhouse.student_trainer.config.fields import Choices, fields_of
from stillhouse.student_trainer.config.schema import LossTermConfig
from stillhouse.student_trainer.runs import metrics as trainer
from stillhouse.teacher_service import metrics as teacher

ROOT = Path(__file__).resolve().parents[2]
SHARED = ("protos/telemetry/metrics.py", "protos/telemetry/gpu_memory.py")
KEY = re.compile(r"(train|eval|teacher|cache|device|data)/[a-z_]+")
_DIVERGENCES = ", ".join(
    f"`train/{name}`" for name in fields_of(LossTermConfig)["divergence"].rule(Choices) or ()
)
RUN_METRICS = {
    "train/loss": "Objective of the step: the weighted sum of its terms, times T² at a temperature T, and of the cross-entropy.",
    "train/DIVERGENCE": f"Each divergence in nats per token, by its name ({_DIVERGENCES}): without its weight, and without the "
    "factor T² (with temperature_mode conditional as in the objective); train/alm_DIVERGENCE between chunks.",
    "train/cross_entropy": "Cross-entropy against the text, in nats per token.",
    "train/hidden_mse": "Mean squared error between hidden states of student and teacher, without its weight.",
    "train/policy_gradient": "The policy gradient's term.",
    "train/teacher_mass": "Mass of the teacher's top-k.",
    "train/tail_clamped": "Share of positions where the student's tail was below the floor of its probability.",
    "train/aligned": "Share of tokens that lie in chunks of both tokenizers.",
    "train/chunk_gap": "Mean absolute difference of both sides' log-probabilities of a chunk.",
    "train/importance_weight": "Mean importance weight of the sampled tokens before its cap.",
    "train/importance_truncated": "Share of tokens whose importance weight was capped.",
    "train/importance_dropped": "Share of tokens whose importance weight was not finite.",
    "train/mismatch_kl": "Estimate of KL(sampling policy || student), in nats per token.",
    "train/rollout_logprob": "Mean log-probability of the sampled tokens when they were sampled.",
    "train/rollout_teacher_logprob": "Mean log-probability that the teacher gives them.",
    "train/rollout_staleness": "Mean age of the step's rollouts, in updates.",
    "train/rollout_overlap": "Share of the student's top-k that is in the teacher's.",
    "train/rollout_teacher_mass": "Teacher's mass on the student's top-k.",
    "train/learning_rate": "Learning rate of the step.",
    "train/padding": "Tokens that the step's forward passes compute, padding included, over the tokens of its rows.",
    "train/grad_norm": "Norm of the gradient before clipping.",
    "train/epoch": "Epochs trained so far.",
    "train/trained_tokens": "Completion tokens trained on so far.",
    "train/tokens_per_second": "Completion tokens of the step per second of its time.",
    "train/step_time_s": "Seconds of the step, with the wait for its data.",
    "train/teacher_wait_s": "Seconds of the step that the student waited for a teacher.",
    "train/rollouts_dropped": "Rollouts dropped so far: stale, without targets, or with tokens unknown to the teacher.",
    "train/rollout_time_s": "Seconds that the step's rollouts took, or that the student waited for services to write them.",
    "train/rollout_services": "Services that write the step's rollouts.",
    "train/rollout_idle": "Share of the time since the step before in which a rollout service had nothing of the run to write.",
    "train/rollout_tokens": "Mean length of the step's rollouts, in tokens.",
    "train/rollout_finished": "Share of the step's rollouts that ended by themselves.",
    "train/rollout_tail_clamped": "Share of positions whose tail mass was rounded up to 0.",
    "train/teacher_text_tokens": "Mean length of the step's teacher texts, in tokens.",
    "train/teacher_text_finished": "Share of the step's teacher texts that ended by themselves.",
    "train/teacher_texts_dropped": "Teacher texts of the step with tokens unknown to the student.",
    "eval/kl": "KL(teacher || student) on the teacher's top-k and the tail, in nats per token: a lower bound.",
    "eval/agreement": "Share of tokens where teacher and student have the same likeliest token.",
    "eval/alm": "The cross-tokenizer terms, as a mean over chunks.",
    "eval/cross_entropy": "Cross-entropy against the text, in nats per token; of a classifier against the label.",
    "eval/f1": "Mean over classes of the F1 score of a classifier.",
    "eval/teacher_accuracy": "The teacher's eval/accuracy on the same rows.",
    "eval/teacher_f1": "The teacher's eval/f1.",
    "eval/teacher_ece": "The teacher's eval/ece.",
    "eval/rows": "Held-out rows of a classifier's evaluation.",
    "eval/perplexity": "Exponential of eval/cross_entropy.",
    "eval/acceptance": "Share of the student's tokens that speculative decoding with the teacher keeps, 1 - TVD: an upper bound.",
    "eval/overlap": "Share of the teacher's top-k that is in the student's.",
    "eval/ece": "Expected calibration error of the likeliest token, choice or class.",
    "eval/bleu": "BLEU of written text against the rows' completions, 0 to 100, by sacrebleu.",
    "eval/chrf": "chrF likewise.",
    "eval/rouge_1": "ROUGE-1 of written text, mean F-measure of the rows, 0 to 1, by rouge-score.",
    "eval/rouge_2": "ROUGE-2 likewise.",
    "eval/rouge_l": "ROUGE-L likewise.",
    "eval/accuracy": "Share of right answers by evaluation.match; of a classifier, of labels that are its likeliest class.",
    "eval/SET/METRIC": "The same of the set of this name in evaluation.sets.",
    "eval/tokens": "Held-out tokens of the evaluation.",
    "teacher/sequences_asked": "Sequences sent to teachers so far, counted for each teacher; a text that is scored in parts counts once.",
    "teacher/outstanding": "Sequences and prompts that teachers have not answered.",
    "teacher/outstanding_tokens": "Tokens of these; with several services also of each, as teacher/SERVICE/outstanding_tokens.",
    "teacher/asked_again": "Sequences and prompts that a broken service left unanswered; also of each service.",
    "teacher/breaks": "Streams and calls to teachers that broke.",
    "teacher/SERVICE/answered": "Sequences that this service answered.",
    "data/prepared_rows": "Rows that were encoded so far, before the first step.",
    "data/rows": "Rows of the dataset that is encoded, where that is known.",
    "data/rows_per_second": "Rows encoded per second.",
    "data/left_s": "Seconds until all rows of the dataset are encoded, at that rate.",
    "cache/found": "Targets found in a cache.",
    "cache/missed": "Targets missing in a cache, which a teacher computed.",
    "cache/sequences": "Sequences that a cache build has stored.",
    "cache/tokens_per_second": "Tokens that a cache build stores per second.",
    "cache/bytes": "Bytes of the cache.",
    "cache/bytes_per_token": "Bytes of the cache per token.",
    "device/memory_bytes": "Memory that the training process holds on its device.",
    "device/memory_peak_bytes": "Peak of its tensors' memory there.",
}
"""Meanings of a run's metrics; a name in the code without a line here fails the check, and a line without a name too."""


def page() -> str:
    """The page."""
    _compare()
    shared = [row for path in SHARED for row in _readings(ROOT / path)]
    of_teacher = [(name, "counter", text) for name, text in (teacher.COUNTERS | teacher.BUSY).items()]
    of_teacher += [(name, "gauge", text) for name, text in teacher.GAUGES.items()]
    of_run = [(name, "gauge", f"{text} Label: run.") for name, text in trainer.RUN_READINGS.values()]
    pages = {
        "Both services": shared,
        "Teacher": of_teacher,
        "Run service": [*_readings(Path(trainer.__file__)), *of_run],
    }
    parts = [
        f"{NOTE}\n# Metrics\n\n## Prometheus\n\nEach service shows a page at `--metrics-port`, by default 100 above its own port. "
        "Counters end in `_total` there.\n"
    ]
    for title, rows in pages.items():
        named = [(f"`stillhouse_{name}`", kind, text) for name, kind, text in rows]
        parts.append(f"\n### {title}\n\n{table(('Metric', 'Type', 'Meaning'), named)}")
    parts.append(
        "\n## Metrics of a run\n\n`stillhouse run metrics`, `run plot`, WatchRun and QueryMetrics name them so. `eval/kl` of single tokens of a few rows is "
        "in the artifacts `evaluations/examples/STEP.json` ([Evaluation](../guides/evaluation.md#examples)). A teacher's rates by client are no "
        "metrics, since they would have a label for each; GetTeacherInfo tells them with `load`.\n\n"
        + table(("Metric", "Meaning"), [(f"`{name}`", text) for name, text in RUN_METRICS.items()])
    )
    return "".join(parts)


def _readings(path: Path) -> Iterator[tuple[str, str, str]]:
    """Name, type and help of every metric that the module at `path` makes from plain strings."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        if node.func.id in ("Counter", "Histogram"):
            full, about = (ast.literal_eval(each) for each in node.args[:2])
            yield full.removeprefix("stillhouse_"), node.func.id.lower(), about
        elif node.func.id == MetricSample.__name__:
            plain = {each.arg: each.value for each in node.keywords}
            name, text, kind = (plain.get(key) for key in ("name", "help", "kind"))
            if isinstance(name, ast.Constant) and isinstance(text, ast.Constant):
                labels = plain.get("labels")
                keys = labels.keys if isinstance(labels, ast.Dict) else []
                of = ", ".join(str(key.value) for key in keys if isinstance(key, ast.Constant))
                yield (
                    str(name.value),
                    str(kind.value) if isinstance(kind, ast.Constant) else "gauge",
                    " ".join([str(text.value), *([f"Label: {of}."] if of else [])]),
                )


def _compare() -> None:
    """Raises SystemExit if RUN_METRICS has not just the names in the code of the training process."""
    strings = {
        node.value
        for room in ("student_trainer/train", "protos/evaluation")
        for path in sorted((ROOT / room).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    lacking = sorted(each for each in strings if KEY.fullmatch(each) and each not in RUN_METRICS)
    ends = {each.rpartition("/")[2] for each in strings}
    gone = [
        name
        for name in RUN_METRICS
        if name.rpartition("/")[2] not in ends and not name.endswith(("DIVERGENCE", "SET/METRIC"))
    ]
    if lacking or gone:
        raise SystemExit(
            f"scripts/reference/metrics.py: without a meaning are {lacking}, and no code names {gone}."
        )
