"""Bytes a token, reconstruction KL, and tokens a second on one core, of the forms in which distributions and queried ids travel.

Kinds of rows: made-up shapes from flat to sharp, and those of --model at temperatures 1 and 0.5. Rates are of complete
messages, with every check of a receiver, and of the two arrays of ids and log-probabilities alone, in CPU time of one thread:
the median and the best of many short runs over the rows of all kinds. KL is over the kept tokens, in nats, and counts a sum that is not the exact one.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.stillhouse.v1.teacher_pb2 import ScoreSequence
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor, TokenDistributions
from stillhouse.protos.tensors.distributions import (
    Distributions,
    decode,
    decode_distributions,
    encode_distributions,
    packed_bits,
)
from stillhouse.protos.tensors.layout import encode, encode_differences
from tests.support.model_rows import SHAPES, made_up, of_model

VOCAB_SIZES = (32_000, 151_936)
ROWS_OF_MESSAGE = 1024
NUM_DRAWS = 12
FORMS: dict[str, tuple[Tensor.DataType.ValueType, bool]] = {
    "int32 and float16": (Tensor.DATA_TYPE_FLOAT16, False),
    "packed and float16": (Tensor.DATA_TYPE_FLOAT16, True),
    "compact": (Tensor.DATA_TYPE_FALLING, True),
}
"""Type of the logprobs, and whether ids are packed."""
NUM_LIKELIEST, NUM_QUERIED = 16, 512
QUERY_FORMS: dict[str, Callable[[NDArray[np.int32]], Tensor]] = {
    "int32, all columns": encode,
    "differences": encode_differences,
}
TODAY = "packed and float16"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """Tokens a second of CPU time, in one thread."""

    median: float
    best: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FormResult:
    """One form at one size."""

    form: str
    vocab_size: int
    top_k: int
    bytes_per_token: float
    bytes_of_today: float
    """Its share of the bytes of the run file's default form."""
    encode: Rate
    decode: Rate
    decode_arrays: Rate


@dataclass(frozen=True, kw_only=True, slots=True)
class QueryResult:
    """Ids that a teacher is queried for, and its answers, in one form."""

    form: str
    vocab_size: int
    ids_per_token: float
    bytes_per_token: float
    """Of queries and answers."""
    bytes_asked: float
    """Of the queries alone."""
    us_per_token: float
    """Median CPU time of both ends: a query written, sent through protobuf and read, and its answer."""


@click.command()
@click.option("--model", type=click.Path(path_type=Path, exists=True), help="Folder of train_teacher.")
@click.option("--top-k", default=64, show_default=True)
@click.option("--runs", default=60, show_default=True, help="Short runs of each measurement.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the results here as well.")
def main(*, model: Path | None, top_k: int, runs: int, json_file: Path | None) -> None:
    """Compares the forms of distributions on the wire."""
    kinds = {shape: made_up(shape, num_rows=256, top_k=top_k) for shape in SHAPES}
    if model is not None:
        for temperature in (1.0, 0.5):
            rows = of_model(model, num_rows=2048, top_k=top_k, temperature=temperature)
            kinds[f"{model.name}, temperature {temperature:g}"] = rows
    losses = {
        kind: {form: _divergence(rows, form) for form in ("packed and float16", "compact")}
        for kind, rows in kinds.items()
    }
    print(
        f"{'KL of the codec, top-' + str(top_k):36}{'float16':>12}{'compact':>12}{'its p99':>12}{'its max':>12}"
    )
    for kind, found in losses.items():
        half, compact = found["packed and float16"], found["compact"]
        print(
            f"{kind:36}{half.mean():12.1e}{compact.mean():12.1e}{np.quantile(compact, 0.99):12.1e}{compact.max():12.1e}"
        )
    every = np.concatenate(list(kinds.values()))
    rows = every[np.random.default_rng(0).permutation(len(every))[:ROWS_OF_MESSAGE]]
    results = [_measure(rows, form, size, runs) for size in VOCAB_SIZES for form in FORMS]
    columns = (
        "vocabulary",
        "bytes/token",
        "of today",
        "encode/s",
        "(best)",
        "decode/s",
        "(best)",
        "arrays/s",
        "(best)",
    )
    print(f"\n{'form':20}" + "".join(f"{each:>12}" for each in columns))
    for each in results:
        rates = [
            rate for of in (each.encode, each.decode, each.decode_arrays) for rate in (of.median, of.best)
        ]
        print(
            f"{each.form:20}{each.vocab_size:12,}{each.bytes_per_token:12.1f}{each.bytes_of_today:12.2f}"
            + "".join(f"{rate:12,.0f}" for rate in rates)
        )
    draws = {size: _draw_bytes(size) for size in VOCAB_SIZES}
    for size, num_bytes in draws.items():
        print(f"{NUM_DRAWS} draws of {size:,} ids: {num_bytes:.1f} bytes/token")
    queries = [_measure_queries(size, name, runs) for size in VOCAB_SIZES for name in QUERY_FORMS]
    print(
        f"\n{'queried ids':20}{'vocabulary':>12}{'ids':>8}{'bytes/token':>12}{'of that up':>12}{'us/token':>12}"
    )
    for asked in queries:
        print(
            f"{asked.form:20}{asked.vocab_size:12,}{asked.ids_per_token:8.0f}{asked.bytes_per_token:12.0f}"
            f"{asked.bytes_asked:12.0f}{asked.us_per_token:12.2f}"
        )
    if json_file:
        kl = {kind: {form: float(each.mean()) for form, each in of.items()} for kind, of in losses.items()}
        content = {"kl": kl, "forms": [asdict(each) for each in results], "draws": draws}
        content["queries"] = [asdict(each) for each in queries]
        json_file.write_text(json.dumps(content))


def _answer(logprobs: NDArray[np.float64], vocab_size: int) -> Distributions:
    """Distributions with ids at random, which crowd nowhere."""
    num_rows, top_k = logprobs.shape
    rng = np.random.default_rng(1)
    ids = np.stack([rng.choice(vocab_size, top_k, replace=False) for _ in range(num_rows)])
    tail = 1 - np.exp(logprobs).sum(axis=1)
    return Distributions(
        start=1,
        token_ids=ids.astype(np.int32),
        logprobs=logprobs.astype(np.float32),
        target_logprobs=logprobs[:, top_k // 2].astype(np.float32),
        log_tail=np.log(np.maximum(tail, 1e-12)).astype(np.float32),
    )


def _encode(answer: Distributions, form: str, vocab_size: int) -> TokenDistributions:
    dtype, packs = FORMS[form]
    bits = packed_bits(vocab_size) if packs else None
    return encode_distributions(answer, logprob_dtype=dtype, pack_bits=bits)


def _decode(message: TokenDistributions, vocab_size: int) -> Distributions:
    return decode_distributions(message, vocab_size=vocab_size, max_rows=1 << 20, max_top_k=1 << 10)


def _divergence(exact: NDArray[np.float64], form: str) -> NDArray[np.float64]:
    """KL [T] of each row's kept tokens."""
    size = VOCAB_SIZES[0]
    found = _decode(_encode(_answer(exact, size), form, size), size).logprobs.astype(np.float64)
    p, q = np.exp(exact), np.exp(found)
    kl: NDArray[np.float64] = (p * (exact - found) - p + q).sum(axis=1)
    return kl


def _measure(logprobs: NDArray[np.float64], form: str, vocab_size: int, runs: int) -> FormResult:
    answer = _answer(logprobs, vocab_size)
    message = _encode(answer, form, vocab_size)
    data = message.SerializeToString()
    today = _encode(answer, TODAY, vocab_size).ByteSize()
    return FormResult(
        form=form,
        vocab_size=vocab_size,
        top_k=logprobs.shape[1],
        bytes_per_token=len(data) / len(logprobs),
        bytes_of_today=len(data) / today,
        encode=_rate(lambda: _encode(answer, form, vocab_size).SerializeToString(), len(logprobs), runs),
        decode=_rate(lambda: _decode(TokenDistributions.FromString(data), vocab_size), len(logprobs), runs),
        decode_arrays=_rate(lambda: _decode_arrays(message), len(logprobs), runs),
    )


def _decode_arrays(message: TokenDistributions) -> None:
    for tensor in (message.token_ids, message.logprobs):
        decode(tensor, field="bench", dtypes=(tensor.dtype,), shape=(None, None))


def _rate(work: Callable[[], object], num_tokens: int, runs: int) -> Rate:
    work()
    seconds = []
    for _ in range(runs):
        began = time.thread_time_ns()
        work()
        seconds.append((time.thread_time_ns() - began) / 1e9)
    return Rate(median=num_tokens / statistics.median(seconds), best=num_tokens / min(seconds))


def _draw_bytes(vocab_size: int, num_rows: int = 512) -> float:
    """Bytes of a token that has draws alone, sorted, without their log-probabilities."""
    rng = np.random.default_rng(2)
    nothing = np.empty((num_rows, 0))
    answer = Distributions(
        start=1,
        token_ids=nothing.astype(np.int32),
        logprobs=nothing.astype(np.float32),
        target_logprobs=np.full(num_rows, -2, np.float32),
        log_tail=np.zeros(num_rows, np.float32),
        sampled_token_ids=rng.integers(0, vocab_size, (num_rows, NUM_DRAWS)).astype(np.int32),
    )
    bits = packed_bits(vocab_size)
    message = encode_distributions(
        answer, logprob_dtype=Tensor.DATA_TYPE_FALLING, pack_bits=bits, sort_bits=bits
    )
    return message.ByteSize() / num_rows


def _measure_queries(vocab_size: int, form: str, runs: int, num_rows: int = 64) -> QueryResult:
    """Queries as those of the student's own draws: its likeliest ids, then others that rise, fewer where it is sharp."""
    generator, write_query = np.random.default_rng(3), QUERY_FORMS[form]
    rows = np.full((num_rows, NUM_LIKELIEST + NUM_QUERIED), -1, np.int32)
    for row in rows:
        used = int(generator.integers(NUM_QUERIED // 2, NUM_QUERIED + 1))
        ids = generator.choice(vocab_size, NUM_LIKELIEST + used, replace=False)
        row[:NUM_LIKELIEST] = ids[:NUM_LIKELIEST]
        row[NUM_LIKELIEST : NUM_LIKELIEST + used] = np.sort(ids[NUM_LIKELIEST:])
    values = np.where(rows >= 0, -generator.random(rows.shape, np.float32), np.float32(-np.inf))
    nothing, zeros = np.empty((num_rows, 0)), np.zeros(num_rows, np.float32)
    answer = Distributions(
        start=1,
        token_ids=nothing.astype(np.int32),
        logprobs=nothing.astype(np.float32),
        target_logprobs=zeros,
        log_tail=zeros,
        query_logprobs=values,
    )
    coded = write_query is encode_differences

    def ask() -> bytes:
        return ScoreSequence(query_token_ids=write_query(rows)).SerializeToString()

    def reply(query: bytes) -> bytes:
        tensor = ScoreSequence.FromString(query).query_token_ids
        ids = decode(tensor, field="bench", dtypes=(tensor.dtype,), shape=(num_rows, None))
        assert ids.min() >= -1
        assert ids.max() < vocab_size
        return encode_distributions(answer, queried_ids=ids if coded else None).SerializeToString()

    def both() -> Distributions:
        return decode_distributions(
            TokenDistributions.FromString(reply(ask())),
            vocab_size=vocab_size,
            max_rows=num_rows,
            max_top_k=1,
            queried_ids=rows,
        )

    np.testing.assert_array_equal(both().query_logprobs, values)
    num_asked, num_told = len(ask()), len(reply(ask()))
    return QueryResult(
        form=form,
        vocab_size=vocab_size,
        ids_per_token=float(np.count_nonzero(rows >= 0)) / num_rows,
        bytes_per_token=(num_asked + num_told) / num_rows,
        bytes_asked=num_asked / num_rows,
        us_per_token=1e6 / _rate(both, num_rows, runs).median,
    )


if __name__ == "__main__":
    main()
