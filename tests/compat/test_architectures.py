"""Each architecture of transformers is loaded, scored, trained, resumed and exported with the right numbers, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compat.architectures import ARCHITECTURES, REPRESENTATIVES, make_architecture
from tests.compat.conftest import RESULTS
from tests.compat.corpus import Corpus
from tests.compat.walk import STAGES, Walk
from tests.conftest import Models

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus.make(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in REPRESENTATIVES else [pytest.mark.slow])
        for name in ARCHITECTURES
    ],
)
def test_every_stage_has_the_numbers_of_transformers_or_is_refused_by_name(
    models: Models, corpus: Corpus, tmp_path: Path, request: pytest.FixtureRequest, name: str
) -> None:
    results = {"architecture": name}
    request.node.user_properties.append((RESULTS, results))
    walk = Walk(
        model=make_architecture(name, tmp_path / "model", corpus.tokenizer),
        folder=tmp_path,
        corpus=corpus,
        models=models,
        results=results,
    )
    walk.all_stages()
    refused = {stage: results[stage] for stage in STAGES if results.get(stage, "-") not in ("ok", "-")}
    assert refused == {}
