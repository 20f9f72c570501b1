"""A client of the shared teacher, and an adapter that it has loaded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stillhouse.client.api import Teacher
from tests.conftest import Models
from tests.support.programs import Program


@pytest.fixture
def teacher(hf_teacher: Program) -> Iterator[Teacher]:
    with Teacher(hf_teacher.target) as teacher:
        yield teacher


@pytest.fixture(scope="module")
def adapted(hf_teacher: Program, models: Models) -> Iterator[str]:
    """Returns the name of a loaded adapter."""
    with Teacher(hf_teacher.target) as teacher:
        teacher.load_adapter("batch-test/a", str(models.adapter_a))
        yield "batch-test/a"
        teacher.unload_adapter("batch-test/a")
