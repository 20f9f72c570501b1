"""Control of the experiment: forwards a teacher's rows in a shuffled order, which must train worse students.

Only streams with the given top_k are shuffled. A run with another top_k in its evaluation is trained on shuffled rows
and evaluated against the true ones.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.distillation.teacher_proxy import TeacherProxy
from stillhouse.protos.files.atomic import write_atomic
from stillhouse.protos.stillhouse.v1.teacher_pb2 import ScoreRequest, ScoreResponse, ScoreResult
from stillhouse.protos.tensors.distributions import Distributions, decode_distributions, encode_distributions

MAX_ROWS = 2**20
VOCAB_LIMIT = 2**31 - 1


class Shuffler:
    """Collects each sequence's response and forwards it with permuted rows, in parts of the same sizes."""

    def __init__(self, top_k: int, seed: int) -> None:
        self._top_k = top_k
        self._seed = seed
        self._active = False
        self._parts: defaultdict[int, list[ScoreResult]] = defaultdict(list)

    def request(self, request: ScoreRequest) -> None:
        """Reads from the stream's config whether to shuffle it."""
        if request.HasField("config"):
            self._active = request.config.top_k == self._top_k

    def response(self, response: ScoreResponse) -> ScoreResponse:
        """Responses completed by this one, shuffled; the others wait."""
        if not self._active:
            return response
        results: list[ScoreResult] = []
        for result in response.results:
            if not result.HasField("distributions"):
                results.append(result)
                continue
            parts = self._parts[result.sequence_id]
            parts.append(result)
            if result.last:
                results += shuffle(parts, np.random.default_rng((self._seed, result.sequence_id)))
                del self._parts[result.sequence_id]
        return ScoreResponse(results=results)


def shuffle(parts: list[ScoreResult], generator: np.random.Generator) -> list[ScoreResult]:
    """Permutes the rows of one response across its parts."""
    decoded = [
        decode_distributions(
            part.distributions, vocab_size=VOCAB_LIMIT, max_rows=MAX_ROWS, max_top_k=MAX_ROWS
        )
        for part in parts
    ]
    whole = Distributions.concat(decoded)
    order = generator.permutation(whole.num_rows)
    columns = {field.name: getattr(whole, field.name) for field in fields(whole)}
    permuted: dict[str, Any] = {
        name: each[order] for name, each in columns.items() if isinstance(each, np.ndarray)
    }
    mixed = replace(whole, **permuted)
    shuffled, begin = [], 0
    for part, piece in zip(parts, decoded, strict=True):
        rows = mixed.rows(begin, begin + piece.num_rows)
        begin += piece.num_rows
        shuffled.append(
            ScoreResult(
                sequence_id=part.sequence_id,
                distributions=encode_distributions(rows, logprob_dtype=part.distributions.logprobs.dtype),
                last=part.last,
            )
        )
    return shuffled


@click.command()
@click.option("--target", required=True, help="The teacher.")
@click.option("--top-k", type=int, required=True, help="Shuffle streams with this top_k.")
@click.option("--seed", default=0, show_default=True)
@click.option("--listen", default="127.0.0.1:0", show_default=True)
@click.option("--address-file", type=click.Path(path_type=Path), help="File to write the bound address to.")
def main(*, target: str, top_k: int, seed: int, listen: str, address_file: Path | None) -> None:
    """Forward calls to a teacher and shuffle the rows of its responses."""
    with TeacherProxy(target, lambda: Shuffler(top_k, seed), listen=listen) as proxy:
        if address_file is not None:
            write_atomic(address_file, proxy.target.encode())
        proxy.wait()


if __name__ == "__main__":
    main()
