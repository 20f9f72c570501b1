"""Cache file format: lossless round trips, no loss of complete shards by a kill, detection of all damage."""

from __future__ import annotations

import gc
import hashlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillhouse.protos.cache.format import META, CacheMeta
from stillhouse.protos.cache.reader import CacheReader
from stillhouse.protos.cache.writer import CacheWriter
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.teacher_pb2 import DistributionConfig, GetTeacherInfoResponse
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from stillhouse.protos.tensors.distributions import Distributions

VOCAB_SIZE = 50
INFO = GetTeacherInfoResponse(
    model="teacher",
    model_fingerprint="f" * 64,
    tokenizer_fingerprint="a" * 64,
    tokenizer_size=48,
    vocab_size=VOCAB_SIZE,
)
EVERYTHING = CacheMeta.from_config(
    INFO,
    DistributionConfig(
        top_k=8,
        logprob_dtype=Tensor.DATA_TYPE_FLOAT32,
        temperatures=[2.0, 0.5],
        num_sampled_tokens=6,
        seed=3,
        sampled_logprobs=True,
        entropy=True,
    ),
)
PLAIN = CacheMeta.from_config(INFO, DistributionConfig(top_k=8))
COMPACT = CacheMeta.from_config(INFO, DistributionConfig(top_k=8, logprob_dtype=Tensor.DATA_TYPE_FALLING))


def sequence(number: int, length: int = 12) -> np.ndarray:
    return np.random.default_rng(number).integers(0, VOCAB_SIZE, length).astype(np.int32)


def answer(meta: CacheMeta, number: int = 0, start: int = 3, length: int = 12) -> Distributions:
    """Random distributions as received, with every column of `meta`."""
    wire = "float32" if meta.logprob_dtype == "float32" else "float16"
    rng = np.random.default_rng([1, number])
    logits = 2 * rng.normal(size=(length - start, VOCAB_SIZE))
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    token_ids = np.argsort(-logprobs, axis=1)[:, : meta.top_k]
    kept = np.take_along_axis(logprobs, token_ids, axis=1)
    rows = len(logits)
    return Distributions(
        start=start,
        token_ids=token_ids.astype(np.int32),
        logprobs=kept.astype(wire).astype(np.float32),
        target_logprobs=logprobs[:, 0].astype(np.float32),
        log_tail=np.log1p(-np.exp(kept).sum(axis=1)).astype(np.float32),
        log_partitions=rng.normal(size=(rows, len(meta.temperatures))).astype(np.float32)
        if meta.temperatures
        else None,
        sampled_token_ids=rng.integers(0, VOCAB_SIZE, (rows, 6)).astype(np.int32) if meta.sampling else None,
        sampled_logprobs=np.full((rows, 6), -1.5, np.float32) if meta.sampling else None,
        entropy=np.ones(rows, np.float32) if meta.entropy else None,
    )


def write(path: Path, meta: CacheMeta, count: int = 5, **options: Any) -> Path:
    """The single shard of a cache of `count` outputs."""
    with CacheWriter(path, **options) as writer:
        for number in range(count):
            assert writer.add(meta, sequence(number), answer(meta, number))
    return next(path.glob("*.parquet"))


def assert_equal(one: Distributions, other: Distributions, atol: float = 0) -> None:
    for field in fields(Distributions):
        left, right = getattr(one, field.name), getattr(other, field.name)
        assert (left is None) == (right is None), field.name
        if left is not None:
            np.testing.assert_allclose(left, right, rtol=0, atol=atol, err_msg=field.name)
            assert np.asarray(left).dtype == np.asarray(right).dtype


def refusal(path: Path, reason: Reason = Reason.CACHE_INVALID) -> str:
    """The error message of reading the complete cache."""

    def read() -> None:
        reader = CacheReader(path)
        for shard in reader.shards:
            reader.verify(shard)

    with pytest.raises(StillhouseError) as caught:
        read()
    assert caught.value.reason is reason
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("meta", [PLAIN, COMPACT, EVERYTHING], ids=["plain", "compact", "everything"])
def test_lossless_gives_back_every_bit(tmp_path: Path, meta: CacheMeta) -> None:
    write(tmp_path, meta)
    reader = CacheReader(tmp_path)
    assert (len(reader), reader.metas) == (5, [meta])
    for number in (4, 0, 2):
        found = reader.get(meta.key(sequence(number), 3), meta)
        assert found is not None
        assert_equal(found, answer(meta, number))
    assert reader.get(meta.key(sequence(99), 3), meta) is None
    assert reader.verify(reader.shards[0]) == 5
    assert reader.shards[0].num_tokens == 5 * 9


def test_compact_is_smaller_near_and_sums_to_one(tmp_path: Path) -> None:
    exact, small = (
        write(tmp_path / codec, EVERYTHING, 200, codec=codec) for codec in ("lossless", "compact")
    )
    assert small.stat().st_size < 0.7 * exact.stat().st_size
    found = CacheReader(small).get(EVERYTHING.key(sequence(7), 3), EVERYTHING)
    assert found is not None
    there = answer(EVERYTHING, 7)
    np.testing.assert_array_equal(found.token_ids, there.token_ids)
    np.testing.assert_array_equal(found.sampled_token_ids, there.sampled_token_ids)
    np.testing.assert_allclose(found.logprobs, there.logprobs, atol=0.02, rtol=0.02)
    sums = np.exp(found.logprobs).sum(1) + np.exp(found.log_tail)
    np.testing.assert_allclose(sums, 1, atol=1e-5)


def test_queries_are_kept_with_their_ids_and_are_part_of_the_key(tmp_path: Path) -> None:
    told = replace(answer(PLAIN), query_logprobs=np.full((9, 2), -1.5, np.float32))
    ids = np.arange(18, dtype=np.int32).reshape(9, 2)
    with CacheWriter(tmp_path) as writer:
        assert writer.add(PLAIN, sequence(0), told, ids)
        assert writer.add(PLAIN, sequence(0), answer(PLAIN))
    reader = CacheReader(tmp_path)
    found = reader.get(PLAIN.key(sequence(0), 3, ids), PLAIN)
    assert found is not None
    assert_equal(found, told)
    stored = [row for shard in reader.shards for row in reader.rows(shard) if row.query_token_ids is not None]
    np.testing.assert_array_equal(stored[0].query_token_ids, ids)


def test_the_key_covers_all_that_determines_an_output() -> None:
    others = [
        replace(PLAIN, teacher_fingerprint="0"),
        replace(PLAIN, adapter_fingerprint="1"),
        replace(PLAIN, top_k=9),
        replace(PLAIN, logprob_dtype="float32"),
        COMPACT,
        replace(PLAIN, sampling={"num_sampled_tokens": 4}),
        replace(PLAIN, sampling={"num_sampled_tokens": 4, "seed": "1"}),
    ]
    keys = [meta.key(sequence(0), 3) for meta in (PLAIN, *others)]
    keys += [PLAIN.key(sequence(0), 4), PLAIN.key(sequence(0)[:-1], 3), PLAIN.key(sequence(1), 3)]
    assert len(set(keys)) == len(keys)
    named = replace(PLAIN, model="elsewhere", adapter="renamed", temperatures=(2.0,), entropy=True)
    assert named.key(sequence(0), 3) == PLAIN.key(sequence(0), 3)


def test_an_output_with_more_columns_serves_requests_for_fewer(tmp_path: Path) -> None:
    write(tmp_path, EVERYTHING)
    reader = CacheReader(tmp_path)
    key = EVERYTHING.key(sequence(0), 3)
    less = reader.get(key, replace(EVERYTHING, temperatures=(0.5,), entropy=False))
    assert less is not None
    assert less.entropy is None
    whole = answer(EVERYTHING).log_partitions
    assert less.log_partitions is not None
    assert whole is not None
    np.testing.assert_array_equal(less.log_partitions, whole[:, 1:])
    assert reader.get(key, replace(EVERYTHING, temperatures=(3.0,))) is None


def test_after_a_kill_complete_shards_remain_and_partial_ones_are_removed(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom stillhouse.protos.cache.writer import CacheWriter\n"
        "from tests.protos.cache.test_format import PLAIN, answer, sequence\n"
        "writer = CacheWriter(Path(sys.argv[1]))\n"
        "for number in range(6):\n"
        "    writer.add(PLAIN, sequence(number), answer(PLAIN, number))\n"
        "    if number == 3: writer.flush()\n"
        "print('written', flush=True)\ntime.sleep(600)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"written\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert len(list(tmp_path.glob(".writing-*"))) == 1
    assert len(CacheReader(tmp_path)) == 4
    with CacheWriter(tmp_path) as writer:
        assert not list(tmp_path.glob(".writing-*"))
        assert [writer.has(PLAIN.key(sequence(number), 3), PLAIN) for number in (3, 4)] == [True, False]


@pytest.mark.parametrize("limit_bytes", [4096, 20_000, 40_000])
def test_a_shard_that_could_not_be_written_whole_never_gets_a_name(tmp_path: Path, limit_bytes: int) -> None:
    whole = write(tmp_path, PLAIN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = CacheWriter(tmp_path)

    def fill() -> None:
        for number in range(5, 2000):
            writer.add(EVERYTHING, sequence(number), answer(EVERYTHING, number))

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            fill()
        writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [each.name for each in tmp_path.iterdir() if each.name != ".lock"] == [whole.name]
    assert len(CacheReader(tmp_path)) == 5
    gc.collect()


def test_hugging_face_datasets_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    write(tmp_path / "cache", EVERYTHING)
    write(tmp_path / "half", PLAIN)
    for name, meta in (("cache", EVERYTHING), ("half", PLAIN)):
        files = str(tmp_path / name / "*.parquet")
        rows = datasets.load_dataset(
            "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "hf")
        ).with_format("numpy")
        row = next(each for each in rows if each["key"] == meta.key(sequence(2), 3))
        np.testing.assert_array_equal(row["token_ids"], sequence(2))
        there = answer(meta, 2)
        np.testing.assert_array_equal(row["top_token_ids"].reshape(9, -1), there.token_ids)
        np.testing.assert_array_equal(row["logprobs"].reshape(9, -1).astype(np.float32), there.logprobs)


def _flipped(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 4
    shard.write_bytes(data)


def _cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-200])


def _rewritten(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    """A file with other content and a matching SHA-256 in its name, so that only its content shows the damage."""

    def spoil(shard: Path) -> None:
        pq.write_table(change(pq.read_table(shard)), shard)
        digest = hashlib.sha256(shard.read_bytes()).hexdigest()
        shard.rename(shard.with_name(f"000000-{digest}.parquet"))

    return spoil


def _column(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def put(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index(name)
        column = table.column(name).combine_chunks()
        values = pa.array(change(column.values.to_numpy(zero_copy_only=False).copy()))
        spoilt = pa.ListArray.from_arrays(column.offsets, values, type=table.schema.field(name).type)
        return table.set_column(at, table.schema.field(at), spoilt)

    return _rewritten(put)


def _set(index: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values[index] = value
        return values

    return change


def _about(change: Callable[[bytes], bytes | None]) -> Callable[[Path], None]:
    def put(table: pa.Table) -> pa.Table:
        said = change(table.schema.metadata[META])
        return table.replace_schema_metadata({META: said} if said is not None else None)

    return _rewritten(put)


def _shorter(table: pa.Table) -> pa.Table:
    starts = pa.array([4] * table.num_rows, pa.int32())
    return table.set_column(1, table.schema.field(1), starts)


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte of a number": (_flipped, "SHA-256"),
    "a cut file": (_cut, "arquet"),
    "an empty file": (lambda shard: shard.write_bytes(b""), "0 bytes"),
    "text": (lambda shard: shard.write_text("x" * 4000), "magic bytes"),
    "no description": (_about(lambda said: None), "did not write it"),
    "a later format": (_about(lambda said: said.replace(b'"format": 1', b'"format": 9')), "format '9'"),
    "a description of nothing": (_about(lambda said: b"[1, 2]"), "not a JSON object"),
    "a negative top_k": (_about(lambda said: said.replace(b'"top_k": 8', b'"top_k": -8')), "top_k"),
    "another teacher's name": (_about(lambda said: said.replace(b"ffff", b"eeee")), "its key"),
    "a column too few": (_rewritten(lambda table: table.drop_columns("log_tail")), "no column log_tail"),
    "numbers of another type": (
        _rewritten(lambda table: table.set_column(1, "start", table.column("start").cast(pa.int64()))),
        "is int64",
    ),
    "another start": (_rewritten(_shorter), "positions"),
    "an id out of range": (_column("top_token_ids", _set(5, VOCAB_SIZE)), "vocabulary of 50"),
    "an id twice": (_column("top_token_ids", lambda ids: ids * 0), "twice"),
    "NaN": (_column("logprobs", _set(3, np.nan)), "logprobs hold nan"),
    "a probability of 2": (_column("log_tail", _set(0, 0.69)), "at most 0"),
    "probabilities that sum to 2": (_column("log_tail", _set(0, 0.0)), "sum to"),
    "other tokens": (_column("token_ids", _set(0, 49)), "its key"),
}


@pytest.mark.parametrize("name", SPOILT)
@pytest.mark.faults(row=11)
def test_a_damaged_file_is_one_error_sentence(tmp_path: Path, name: str) -> None:
    spoil, told = SPOILT[name]
    spoil(write(tmp_path, PLAIN))
    assert told in refusal(tmp_path)
    assert "Delete the file" in refusal(tmp_path)


@pytest.mark.faults(row=11)
def test_a_flipped_byte_is_detected_without_the_file_name(tmp_path: Path) -> None:
    shard = write(tmp_path, PLAIN, 200)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    reader = CacheReader(tmp_path)
    keys = [PLAIN.key(sequence(number), 3) for number in range(200)]
    with pytest.raises(StillhouseError, match="CRC"):
        [reader.get(key, PLAIN) for key in keys]


@pytest.mark.faults(row=11)
def test_broken_shards_are_skipped_if_a_teacher_can_be_queried_again(tmp_path: Path) -> None:
    _cut(write(tmp_path, PLAIN))
    with CacheWriter(tmp_path) as writer:
        assert [broken.path.name[:6] for broken in writer.reader.broken] == ["000000"]
        assert writer.add(PLAIN, sequence(0), answer(PLAIN))
    assert len(CacheReader(tmp_path, ignore_broken=True)) == 1


def test_a_missing_cache_is_one_error_sentence(tmp_path: Path) -> None:
    assert "no cache at" in refusal(tmp_path / "nowhere", Reason.CACHE_NOT_FOUND)


def test_an_output_that_cannot_be_stored_is_a_value_error(tmp_path: Path) -> None:
    with CacheWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="output covers"):
            writer.add(PLAIN, sequence(0, 11), answer(PLAIN))
        with pytest.raises(ValueError, match="other columns"):
            writer.add(EVERYTHING, sequence(0), answer(PLAIN))
