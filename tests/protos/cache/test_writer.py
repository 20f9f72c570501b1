"""Writers of a cache: one at a time, each text once, shards that close by size and by age."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stillhouse.protos.cache.reader import CacheReader
from stillhouse.protos.cache.writer import CacheWriter
from stillhouse.protos.errors import Reason, StillhouseError
from tests.protos.cache.test_format import PLAIN, answer, assert_equal, sequence, write


def test_an_output_is_added_once_also_after_a_restart(tmp_path: Path) -> None:
    write(tmp_path, PLAIN)
    with CacheWriter(tmp_path) as writer:
        assert not writer.add(PLAIN, sequence(0), answer(PLAIN))
        assert writer.add(PLAIN, sequence(5), answer(PLAIN, 5))
        assert not writer.add(PLAIN, sequence(5), answer(PLAIN, 5))
        found = writer.get(PLAIN.key(sequence(5), 3), PLAIN)
        assert found is not None
        assert_equal(found, answer(PLAIN, 5))
    assert sorted(path.name[:6] for path in tmp_path.glob("*.parquet")) == ["000000", "000001"]
    assert len(CacheReader(tmp_path)) == 6


def test_texts_of_one_key_are_told_apart_by_the_students_prompt(tmp_path: Path) -> None:
    prompts = [*(np.array(each, np.int32) for each in ([1], [2], [1, 2])), None]
    for added in (True, False):
        with CacheWriter(tmp_path) as writer:
            for own in prompts:
                assert writer.add(PLAIN, sequence(0), answer(PLAIN), student_prompt_ids=own) is added
                assert not writer.add(PLAIN, sequence(0), answer(PLAIN), student_prompt_ids=own)
    reader = CacheReader(tmp_path)
    found = [
        None if text.student_prompt_ids is None else text.student_prompt_ids.tolist()
        for shard in reader.shards
        for text in reader.texts(shard)
    ]
    assert sorted(found, key=str) == [None, [1, 2], [1], [2]]
    assert reader.get(PLAIN.key(sequence(0), 3), PLAIN) is not None


def test_a_text_whose_students_prompt_is_damaged_is_added_again(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    own = {"student_prompt_ids": np.array([1, 2], np.int32)}
    with CacheWriter(tmp_path) as writer:
        writer.add(PLAIN, sequence(0), answer(PLAIN), **own)
    [path] = tmp_path.glob("*.parquet")
    group = pq.read_metadata(path).row_group(0)
    columns = [group.column(number) for number in range(group.num_columns)]
    [column] = [each for each in columns if each.path_in_schema.startswith("student_prompt_ids.")]
    damaged = bytearray(path.read_bytes())
    first = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
    damaged[first + column.total_compressed_size - 1] ^= 0xFF
    path.write_bytes(damaged)
    with CacheWriter(tmp_path) as writer:
        assert writer.add(PLAIN, sequence(0), answer(PLAIN), **own)
        assert not writer.add(PLAIN, sequence(0), answer(PLAIN), **own)


def test_shards_close_by_size_and_by_age(tmp_path: Path) -> None:
    for options in ({"shard_age_s": 0.0}, {"shard_bytes": 1}):
        path = tmp_path / next(iter(options))
        with CacheWriter(path, **options) as writer:
            for number in range(3):
                writer.add(PLAIN, sequence(number), answer(PLAIN, number))
            assert len(CacheReader(path)) == 3


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with CacheWriter(tmp_path), pytest.raises(StillhouseError) as caught:
        CacheWriter(tmp_path)
    assert caught.value.reason is Reason.CACHE_LOCKED
    CacheWriter(tmp_path).close()
