"""One run service for all end-to-end tests; it trains two runs at once, each with one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stillhouse.client.api import Trainer
from tests.support.processes import no_process_left
from tests.support.programs import start_trainer
from tests.support.runs import Service


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("service")
    with (
        no_process_left() as mark,
        start_trainer(
            root / "data",
            directory=root,
            options=["--cpu-slots", "2", "--stop-runs-on-exit", "--stop-grace-s", "5"],
            environment=mark,
        ) as program,
    ):
        yield Service(program=program, data_dir=root / "data")


@pytest.fixture(scope="session")
def trainer(service: Service) -> Iterator[Trainer]:
    with Trainer(service.target) as client:
        yield client
