"""Exports the trained student to final/ in Hugging Face layout, with its tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from stillhouse.protos.files.atomic import sync_directory, sync_tree
from stillhouse.student_trainer.run_dir import Attempt
from stillhouse.student_trainer.train.process import failpoints
from stillhouse.student_trainer.train.student.loading import merge_adapter
from stillhouse.student_trainer.train.student.student import Student

ADAPTER_FOLDER = "adapter"
"""Folder of the adapter beside a merged model."""


def export(student: Student, attempt: Attempt) -> Path:
    """Writes final/: the complete model, or the adapter alone (output "adapter"), or the merged model with the adapter
    under adapter/ ("both").

    Merging changes the student in place: it cannot be trained afterwards. Raises StillhouseError(RUN_STATE) if another
    attempt owns the run.
    """
    target = attempt.run_dir.final_path
    temporary = target.with_name(".final.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(student, temporary)
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


def _write(student: Student, directory: Path) -> None:
    model: Any = student.model
    config = student.config
    if not config.trains_adapter or config.output == "adapter":
        model.save_pretrained(directory)
    else:
        adapter = directory / ADAPTER_FOLDER
        model.save_pretrained(adapter)
        merge_adapter(model, config, student.data_dir, adapter).save_pretrained(directory)
        if config.output == "merged":
            shutil.rmtree(adapter)
    student.tokenizer.save_pretrained(directory)
