"""Model card of an exported student: base, teachers, data, loss, evaluation and licence, in the hub's format.

Paths of the host and texts that teachers alone saw stay out of it: a card is published.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from stillhouse.student_trainer.config.schema import CLASSIFICATION, ContextConfig, LossConfig, RunConfig
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.train.data.readers import resolve
from stillhouse.student_trainer.train.student.saving import LOADING

CARD = "README.md"
"""File of the card in an export."""
_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
_EVALUATION = "eval/"
_UNKNOWN = "unknown: the base and the teachers decide; name it before you publish, with `stillhouse run push --license`"


def write_cards(directory: Path, config: RunConfig, run_dir: RunDir, *, is_adapter: bool) -> None:
    """Writes the card of an export; a card that PEFT put beside the adapter below it is replaced too."""
    card = make_card(config, run_dir, is_adapter=is_adapter)
    (directory / CARD).write_text(card, encoding="utf-8")
    for other in directory.glob(f"*/{CARD}"):
        other.write_text(make_card(config, run_dir, is_adapter=True), encoding="utf-8")


def make_card(config: RunConfig, run_dir: RunDir, *, is_adapter: bool) -> str:
    """Returns the card of a run's student, with the hub's metadata at its top."""
    history = _evaluations(run_dir)
    name = config.display_name or f"student of run {run_dir.path.name}"
    base = _base_card(config.student.model, run_dir.path.resolve().parent.parent)
    task = "text-classification" if config.task == CLASSIFICATION else "text-generation"
    has_own_base = is_adapter and bool(config.student.keep_layers or config.student.from_config)
    # An adapter of a base that was cut fits no model of a hub.
    base_model = None if has_own_base else base.get("base_model") or _hub_id(config.student.model)
    last = {metric: values[-1] for metric, values in history.items()}
    data = ModelCardData(
        base_model=base_model,
        base_model_relation=None if has_own_base else "adapter" if is_adapter else "finetune",
        library_name="peft" if is_adapter else "transformers",
        license=base.get("license"),
        license_name=base.get("license_name"),
        license_link=base.get("license_link"),
        pipeline_tag=task,
        tags=["stillhouse", "knowledge-distillation"],
        datasets=[each.path for each in config.data.train if _hub_id(each.path)] or None,
        model_name=name,
        eval_results=[_result(task, metric, value) for metric, (_, value) in last.items()] or None,
    )
    body = "\n".join(_body(name, config, run_dir, history, license_text=base.get("license") or _UNKNOWN))
    if has_own_base:
        body += f"\n\n## Loading\n\nThe base is the model in `base/`; no other model fits.\n\n{LOADING}"
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def _result(task: str, metric: str, value: float) -> EvalResult:
    return EvalResult(
        task_type=task,
        dataset_type="held-out",
        dataset_name="held-out rows of the run",
        metric_type=metric,
        metric_value=value,
    )


def _body(
    name: str,
    config: RunConfig,
    run_dir: RunDir,
    history: Mapping[str, list[tuple[int, float]]],
    *,
    license_text: str,
) -> Iterator[str]:
    student, optimizer = config.student, config.optimizer
    yield f"# {name}\n"
    yield "A student distilled with Stillhouse.\n"
    yield "| | |\n|---|---|"
    yield f"| Base | {_named(student.model)}{_base_note(config)} |"
    yield f"| Teachers | {'; '.join(_teachers(config, run_dir)) or 'none'} |"
    yield f"| Data | {', '.join(_named(each.path) for each in config.data.train)} |"
    yield f"| Completions | {', '.join(map(_source, config.contexts))} |"
    losses = dict.fromkeys(_loss_text(config.loss_of(each)) for each in config.contexts)
    yield f"| Loss | {'; '.join(losses)} |"
    trained = run_dir.trained()
    steps = f"{trained.step} steps of " if trained else ""
    yield (
        f"| Optimizer | {optimizer.name}, {steps}{optimizer.rows_per_update} rows, learning rate "
        f"{optimizer.learning_rate:g}, seed {optimizer.seed} |"
    )
    yield f"| Licence | {license_text} |"
    if history:
        yield "\n## Evaluation\n\nMeans over the tokens of held-out rows.\n"
        yield "| | before | after |\n|---|---|---|"
        for metric, values in history.items():
            yield f"| {metric} | {values[0][1]:.4g} | {values[-1][1]:.4g} (step {values[-1][0]}) |"


def _base_note(config: RunConfig) -> str:
    student = config.student
    notes = []
    if student.keep_layers:
        notes.append(f"layers {', '.join(map(str, student.keep_layers))}")
    if student.from_config:
        notes.append("its configuration alone, with new weights")
    if student.lora is not None:
        notes.append(f"LoRA of rank {student.lora.rank}")
    return f" ({'; '.join(notes)})" if notes else ""


def _teachers(config: RunConfig, run_dir: RunDir) -> Iterator[str]:
    """Yields the teachers by the models that they reported."""
    try:
        told = json.loads(run_dir.teacher_path.read_bytes())
    except (OSError, ValueError):
        told = {}
    identities = {"": told} if "model" in told else told
    for name, each in identities.items():
        config_of = next((teacher for teacher in config.teachers if teacher.name == name), None)
        adapter = f" with adapter {each['adapter']}" if each.get("adapter") else ""
        prompt = ", behind a prompt of its own" if config_of is not None and config_of.prompt else ""
        yield f"{name + ': ' if name else ''}{_named(str(each.get('model', '')))}{adapter}{prompt}"


def _source(context: ContextConfig) -> str:
    if context.dataset is not None:
        return "those of the data"
    return "written by the teachers" if context.teacher is not None else "written by the student (on-policy)"


def _loss_text(loss: LossConfig) -> str:
    terms = [f"{term.weight:g} x {term.divergence}" for term in loss.terms if term.weight]
    if loss.hard_weight:
        terms.append(f"{loss.hard_weight:g} x cross-entropy")
    top_k = f", top-{loss.top_k} ({loss.sparse_target})" if loss.top_k and loss.asks_teacher else ""
    return f"{' + '.join(terms)}{top_k}, temperature {loss.temperature:g}"


def _evaluations(run_dir: RunDir) -> dict[str, list[tuple[int, float]]]:
    """Values by metric, without its prefix, each with its step; of a step that was repeated the last."""
    found: dict[str, dict[int, float]] = {}
    lines, offset = run_dir.read_lines("metrics.jsonl", 0)
    while lines:
        for line in lines:
            for name, value in line["values"].items():
                if name.startswith(_EVALUATION) and isinstance(value, int | float):
                    found.setdefault(name.removeprefix(_EVALUATION), {})[int(line["step"])] = float(value)
        lines, offset = run_dir.read_lines("metrics.jsonl", offset)
    return {name: sorted(values.items()) for name, values in sorted(found.items())}


def _base_card(model: str, data_dir: Path) -> Mapping[str, Any]:
    """Metadata of the base's own card where its files are at hand; a card is a stranger's file, and may be anything."""
    path = resolve(model, data_dir) / CARD
    if not path.is_file() and _hub_id(model):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model, CARD)
        path = Path(cached) if isinstance(cached, str) else path
    try:
        data = ModelCard.load(path).data.to_dict() if path.is_file() else {}
    except Exception:  # a broken card of the base must not end a run after its last step
        return {}
    names = ("license", "license_name", "license_link")
    found: dict[str, Any] = {name: data[name] for name in names if isinstance(data.get(name), str)}
    base = data.get("base_model")
    if path.parent.is_dir() and not _hub_id(model) and isinstance(base, str) and _HUB_ID.fullmatch(base):
        found["base_model"] = base
    return found


def _hub_id(name: str) -> str | None:
    """The name if it is a hub id, and not a path of this host."""
    return (
        name
        if _HUB_ID.fullmatch(name) and not Path(name).expanduser().exists() and not _is_held(name)
        else None
    )


def _is_held(name: str) -> bool:
    return name.startswith(("runs/", "datasets/", "caches/"))


def _named(path: str) -> str:
    """A model or dataset without the directories of its host, as a cell of a table."""
    name = path if _hub_id(path) else Path(path).name
    return name.replace("|", r"\|") or "unnamed"
