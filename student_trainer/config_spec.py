"""A run's spec as its configuration, with every default set and everything checked, and back."""

from __future__ import annotations

from protos.stillhouse.v1.run_pb2 import RunSpec
from student_trainer.config import RunConfig
from student_trainer.config_checks import check
from student_trainer.config_defaults import fill
from student_trainer.config_proto import read, write


def from_proto(spec: RunSpec) -> RunConfig:
    """The configuration that `spec` asks for, with every default set.

    Reading an effective spec gives the same configuration again.

    Raises:
        StillhouseError: INVALID_SPEC with every violation at once, each with the field's path.
    """
    config = fill(read(RunConfig, spec), spec)
    check(config)
    return config


def to_proto(config: RunConfig) -> RunSpec:
    """The spec with every default of `config` set: a run's effective_spec."""
    spec = RunSpec()
    write(config, spec)
    return spec
