"""Exports the trained student to final/ in Hugging Face layout, with its tokenizer, once it is known to compute the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
import torch

from stillhouse.protos.errors import Reason, StillhouseError, first_line
from stillhouse.protos.files.adapter import base_beside
from stillhouse.protos.files.atomic import sync_directory, sync_tree
from stillhouse.protos.files.disk_errors import is_broken, is_full
from stillhouse.student_trainer.config.checks import invalid_field
from stillhouse.student_trainer.config.schema import StudentConfig
from stillhouse.student_trainer.run_dir import Attempt, RunDir
from stillhouse.student_trainer.train.process import failpoints
from stillhouse.student_trainer.train.student.comparison import Probe
from stillhouse.student_trainer.train.student.loading import merge_adapter
from stillhouse.student_trainer.train.student.saving import save_adapter, save_model, try_saving
from stillhouse.student_trainer.train.student.student import Student

log = structlog.get_logger()

ADAPTER_FOLDER = "adapter"
"""Folder of the adapter beside a merged model."""


def export(student: Student, attempt: Attempt, *, describe: Callable[[Path], None] = lambda _: None) -> Path:
    """Writes final/: the complete model, or the adapter alone (output "adapter"), or the merged model with the adapter
    under adapter/ ("both"); each is loaded again and compared with the student before anything is removed.
    `describe` adds files about the model to the directory.

    Merging changes the student in place: it cannot be trained afterwards. Raises StillhouseError: EXPORT_FAILED if that
    fails, RUN_STATE if another attempt owns the run.
    """
    target = attempt.run_dir.final_path
    temporary = target.with_name(".final.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        try:
            _write(student, temporary, target)
            describe(temporary)
        except (OSError, MemoryError, torch.OutOfMemoryError, StillhouseError):
            raise
        except Exception as error:  # transformers and peft raise whatever their formats raise
            if is_full(error) or is_broken(error):
                raise
            raise _failed(attempt.run_dir, f"cannot be written ({first_line(error)})") from error
        sync_tree(temporary)
        failpoints.reach("export.before_rename")
        attempt.check_fence()
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(target.parent)
    return target


def try_export(student: Student, run_dir: RunDir) -> None:
    """Writes and reads all of an export but the weights. Raises StillhouseError(INVALID_SPEC) for what cannot be exported."""
    temporary = run_dir.path / ".export.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        try_saving(student.model, student.tokenizer, temporary)
    except OSError:
        raise
    except Exception as error:  # as above
        raise invalid_field(
            "student.model",
            f"{student.config.model} could not be exported after training ({first_line(error)}). Correct its files.",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(student: Student, directory: Path, target: Path) -> None:
    model, config = student.model, student.config
    probe = Probe.of(student.model, len(student.tokenizer))
    if not config.trains_adapter:
        save_model(model, directory)
        _check(probe, student.load_saved(directory), "final/")
    elif config.output == "adapter":
        save_adapter(model, config, directory, student.tokenizer, target)
        _check(probe, _load_adapter(student, directory), "the adapter in final/")
    else:
        adapter = directory / ADAPTER_FOLDER
        save_adapter(model, config, adapter, student.tokenizer, target / ADAPTER_FOLDER)
        if config.output == "both":
            _check(probe, _load_adapter(student, adapter), "the adapter in final/adapter/")
        save_model(merge_adapter(model, config, student.data_dir, adapter), directory)
        _check(probe, student.load_saved(directory), "the merged model in final/")
        if config.output == "merged":
            shutil.rmtree(adapter)
    student.tokenizer.save_pretrained(directory)


def _load_adapter(student: Student, directory: Path) -> Any:
    """Loads an exported adapter on its base, as another run would."""
    config: StudentConfig = replace(student.config, lora=None, adapter=str(directory.resolve()))
    base = base_beside(directory)
    if base is not None:
        config = replace(config, model=str(base.resolve()), keep_layers=(), from_config=False)
    weight = student.model.get_input_embeddings().weight  # type: ignore[operator]  # of transformers' models
    return student.load_again(config, weight.dtype, weight.device)


def _check(probe: Probe, exported: Any, named: str) -> None:
    difference = probe.difference(exported)
    log.info("export compared with the trained student", what=named, difference=difference)
    if not difference <= probe.tolerance(exported):
        raise StillhouseError(
            Reason.EXPORT_FAILED,
            f"Loaded again, {named} differs from the trained student by {difference:.2g} of the spread of its logits; "
            f"rounding explains {probe.tolerance(exported):g}. Nothing was removed: the checkpoint has the trained weights, "
            "and `stillhouse run pull` fetches it. Report this with the name of the model.",
        )


def _failed(run_dir: RunDir, problem: str) -> StillhouseError:
    steps = run_dir.checkpoints()
    kept = f"checkpoints/{steps[-1]}" if steps else "the last checkpoint"
    return StillhouseError(
        Reason.EXPORT_FAILED,
        f"The trained student {problem}. Its weights are in {kept}; correct that, and `stillhouse run resume` exports again "
        "without training.",
    )
