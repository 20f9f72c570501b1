"""Size and fidelity of a cached token: bytes on disk against the divergence between a teacher and its cached
distributions.

Two divergences, means over positions in nats. "kept": KL on the k tokens and the tail, the codec's loss alone.
"whole": KL over the complete vocabulary with the tail spread uniformly, the loss of top-k and codec together. Our
bytes are those of the Parquet files, with text, keys, tails and checksums; DistillKit's follow its own formula,
without these.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from benchmarks.cache.distillkit_scheme import SCHEMES, Scheme
from stillhouse.protos.cache.format import CODECS, CacheMeta, Codec
from stillhouse.protos.cache.reader import CacheReader
from stillhouse.protos.cache.writer import CacheWriter
from stillhouse.protos.tensors.distributions import Distributions

TOP_KS = (50, 64, 128)


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherText:
    """Teacher distributions of one text, untruncated."""

    token_ids: NDArray[np.int32]
    """[L]."""
    logprobs: NDArray[np.float32]
    """[L - 1, V]: at positions 1 to L - 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRow:
    """One row of the table."""

    scheme: str
    top_k: int
    bytes_per_token: float
    kl_kept: float
    kl_whole: float
    read_us_per_token: float | None
    """Time to read a sequence by its key, checks included; None for a formula."""


@dataclass(kw_only=True, slots=True)
class Sums:
    """Divergences over the positions seen so far."""

    kept: float = 0.0
    whole: float = 0.0
    positions: int = 0

    def add(
        self,
        full: NDArray[np.float32],
        ids: NDArray[np.int32],
        restored: NDArray[np.float32],
        log_tail: NDArray[Any],
    ) -> None:
        """Adds one text: its full logprobs [T, V], and the restored ones of `ids` [T, K] and of the tail [T]."""
        p = np.exp(full.astype(np.float64))
        q, q_tail = np.exp(restored.astype(np.float64)), np.exp(log_tail.astype(np.float64))
        total = q.sum(axis=1) + q_tail
        log_q = restored - np.log(total)[:, None]
        log_q_tail = np.log(np.maximum(q_tail / total, 1e-300))
        p_kept = np.take_along_axis(p, ids, 1)
        p_tail = np.maximum(p.sum(axis=1) - p_kept.sum(axis=1), 0)
        self.kept += float((p_kept * (np.log(np.maximum(p_kept, 1e-300)) - log_q)).sum())
        self.kept += float((p_tail * (np.log(np.maximum(p_tail, 1e-300)) - log_q_tail)).sum())
        spread = log_q_tail - np.log(max(full.shape[1] - ids.shape[1], 1))
        log_q_full = np.repeat(spread[:, None], full.shape[1], axis=1)
        np.put_along_axis(log_q_full, ids, log_q, axis=1)
        self.whole += float((p * (full - log_q_full)).sum())
        self.positions += len(full)


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="Teacher; without it one is trained on TEXT.")
@click.option("--text", type=click.Path(path_type=Path), help="JSON lines; without it made-up stories.")
@click.option("--template", default="{prompt}{completion}", show_default=True, help="Text of a line.")
@click.option("--tokens", default=8192, show_default=True, help="Positions to measure.")
@click.option(
    "--minutes", default=2.0, show_default=True, help="Training time of the teacher, if one is trained."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the lines here as well.")
def main(
    *,
    model: Path | None,
    text: Path | None,
    template: str,
    tokens: int,
    minutes: float,
    json_file: Path | None,
) -> None:
    """Bytes per token and reconstruction KL of both codecs, beside DistillKit's scheme."""
    with tempfile.TemporaryDirectory() as folder:
        documents = _documents(text, template)
        teacher = model or _trained(documents, Path(folder) / "teacher", minutes)
        said = list(_teacher_texts(teacher, documents, tokens))
        lines = [
            _ours(said, Path(folder) / f"{codec}-{top_k}", codec, top_k)
            for codec in CODECS
            for top_k in TOP_KS
        ]
    lines += [_theirs(said, name, scheme) for name, scheme in SCHEMES.items()]
    positions = sum(len(each.logprobs) for each in said)
    print(f"{positions} positions, vocabulary {said[0].logprobs.shape[1]}\n")
    print(f"{'':24}{'k':>5}{'bytes/token':>13}{'KL kept':>12}{'KL whole':>12}{'read µs/token':>15}")
    for line in lines:
        read = "" if line.read_us_per_token is None else f"{line.read_us_per_token:.1f}"
        print(
            f"{line.scheme:24}{line.top_k:5}{line.bytes_per_token:13.1f}{line.kl_kept:12.2e}{line.kl_whole:12.2e}{read:>15}"
        )
    if json_file:
        json_file.write_text(json.dumps({"positions": positions, "lines": [asdict(each) for each in lines]}))


def _documents(text: Path | None, template: str) -> list[str]:
    from examples.demo.text import sample_habits, stories
    from tests.support.train_teacher import read_documents

    if text is not None:
        return list(read_documents(text, template))
    return [f"{story['prompt']}{story['completion']}" for story in stories(sample_habits(0), 20_000, 0)]


def _trained(documents: Sequence[str], directory: Path, minutes: float) -> Path:
    from tests.support.train_teacher import TeacherRecipe, train_teacher

    perplexity = train_teacher(documents, directory, TeacherRecipe(minutes=minutes))
    print(f"teacher trained; held-out perplexity {perplexity:.2f}")
    return directory


def _teacher_texts(teacher: Path, documents: Sequence[str], positions: int) -> Iterator[TeacherText]:
    """Teacher distributions of held-out text, where the teacher names it, else of the last documents."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    held_out = teacher / "held_out.jsonl"
    texts = list(documents[::-1])
    if held_out.exists():
        texts = [json.loads(line)["text"] for line in held_out.read_text().splitlines()]
    left = positions
    for text in texts:
        token_ids = np.array(tokenizer(text)["input_ids"][: min(512, left + 1)], np.int32)
        if len(token_ids) < 2:
            continue
        with torch.no_grad():
            logits = model(torch.from_numpy(token_ids.astype(np.int64))[None]).logits[0, :-1]
        yield TeacherText(token_ids=token_ids, logprobs=logits.float().log_softmax(-1).numpy())
        left -= len(token_ids) - 1
        if left <= 0:
            return


def top(said: TeacherText, top_k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Top-k ids and logprobs, [T, K] each, in falling order."""
    ids = np.argsort(-said.logprobs, axis=1, kind="stable")[:, :top_k].astype(np.int32)
    return ids, np.take_along_axis(said.logprobs, ids, 1)


def _ours(said: Sequence[TeacherText], folder: Path, codec: Codec, top_k: int) -> TableRow:
    vocab_size = said[0].logprobs.shape[1]
    meta = CacheMeta(
        model="measured",
        teacher_fingerprint="",
        tokenizer_fingerprint="",
        tokenizer_size=vocab_size,
        vocab_size=vocab_size,
        top_k=top_k,
    )
    with CacheWriter(folder, codec=codec) as writer:
        for each in said:
            writer.add(meta, each.token_ids, _answer(each, top_k))
    reader = CacheReader(folder)
    sums, spent_s = Sums(), 0.0
    for each in said:
        began = time.perf_counter()
        found = reader.get(meta.key(each.token_ids, 1), meta)
        spent_s += time.perf_counter() - began
        assert found is not None
        sums.add(each.logprobs, found.token_ids, found.logprobs, found.log_tail)
    return TableRow(
        scheme=f"Stillhouse {codec}",
        top_k=top_k,
        bytes_per_token=sum(shard.num_bytes for shard in reader.shards) / sums.positions,
        kl_kept=sums.kept / sums.positions,
        kl_whole=sums.whole / sums.positions,
        read_us_per_token=1e6 * spent_s / sums.positions,
    )


def _answer(said: TeacherText, top_k: int) -> Distributions:
    """Distributions as received over the float16 wire."""
    ids, kept = top(said, top_k)
    tail = np.exp(said.logprobs.astype(np.float64)).sum(1) - np.exp(kept.astype(np.float64)).sum(1)
    targets = np.take_along_axis(said.logprobs, said.token_ids[1:, None].astype(np.int64), 1)[:, 0]
    return Distributions(
        start=1,
        token_ids=ids,
        logprobs=kept.astype(np.float16).astype(np.float32),
        target_logprobs=targets,
        log_tail=np.log(np.maximum(tail, 1e-30)).astype(np.float32),
    )


def _theirs(said: Sequence[TeacherText], name: str, scheme: Scheme) -> TableRow:
    sums = Sums()
    vocab_size = said[0].logprobs.shape[1]
    for each in said:
        ids, kept = top(each, scheme.top_k)
        restored = scheme.restored(kept)
        sums.add(each.logprobs, ids, restored, scheme.log_tail(restored, vocab_size))
    return TableRow(
        scheme=name,
        top_k=scheme.top_k,
        bytes_per_token=scheme.bytes_per_token(vocab_size),
        kl_kept=sums.kept / sums.positions,
        kl_whole=sums.whole / sums.positions,
        read_us_per_token=None,
    )


if __name__ == "__main__":
    main()
