"""A student on the CPU in float32, and the steps of one."""

from __future__ import annotations

from pathlib import Path

import torch

from stillhouse.student_trainer.config.schema import RunConfig, StudentConfig
from stillhouse.student_trainer.train.optim import make_optimizer
from stillhouse.student_trainer.train.rollouts.local_sampler import LocalSampler
from stillhouse.student_trainer.train.step import Stepper
from stillhouse.student_trainer.train.student.device import make_accelerator
from stillhouse.student_trainer.train.student.student import Student, load_tokenizer

CPU = torch.device("cpu")


def load_student(config: StudentConfig, data_dir: Path) -> Student:
    """The student of a configuration, with its own tokenizer."""
    tokenizer = load_tokenizer(config, data_dir)
    return Student.load(config, tokenizer, data_dir=data_dir, device=CPU, precision="fp32", seed=0)


def make_stepper(config: RunConfig, student: Student, *, total_steps: int) -> Stepper:
    """Steps of a student."""
    return Stepper(
        student,
        make_optimizer(student.trainable_parameters(), config.optimizer),
        make_accelerator(config.optimizer),
        config,
        total_steps=total_steps,
        vocab_size=len(student.tokenizer),
    )


def make_sampler(folder: Path, *, num_likeliest: int, num_draws: int = 0) -> LocalSampler:
    """The sampler of a fresh student of the model in `folder`."""
    student = load_student(StudentConfig(model=str(folder)), folder)
    return LocalSampler(
        student,
        device=CPU,
        autocast=torch.no_grad,
        vocab_size=len(student.tokenizer),
        num_likeliest=num_likeliest,
        num_draws=num_draws,
    )
