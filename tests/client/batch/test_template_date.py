"""The day that chat templates are told in a batch."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from stillhouse.client.api import BatchSettings, Sampling, Teacher, generate_file
from stillhouse.protos.cache.reader import CacheReader
from tests.client.batch.batches import command, write
from tests.support.programs import Program

FIXED = Sampling(seed=5, max_new_tokens=6)


@pytest.mark.parametrize("date", ["", "2024-07-26"])
def test_templates_are_told_one_day_in_the_whole_batch_and_its_cache_has_it(
    teacher: Teacher, tmp_path: Path, date: str
) -> None:
    source = write(tmp_path / "in.jsonl", {"messages": [{"role": "user", "content": "Hello"}]})
    settings = BatchSettings(sampling=FIXED, capture=tmp_path / "cache", date=date)
    generate_file(teacher, source, tmp_path / "out.jsonl", settings)
    header = json.loads((tmp_path / "out.jsonl.journal").read_text().splitlines()[0])
    begun = datetime.fromtimestamp(header["started_s"], UTC).date().isoformat()
    assert {meta.template_date for meta in CacheReader(tmp_path / "cache").metas} == {date or begun}
    assert header["settings"].get("date", "") == date


def test_a_day_that_is_none_is_refused_before_the_batch(hf_teacher: Program, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "Hello"})
    result = command(hf_teacher.target, "--in", source, "--out", tmp_path / "out.jsonl", "--date", "26 Jul")
    assert result.exit_code == 2
    assert "--date" in result.stderr
