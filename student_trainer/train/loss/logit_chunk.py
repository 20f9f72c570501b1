"""The logits of one chunk of positions in memory that is used again for every chunk: read out, then overwritten by their gradient.

Exponentials are taken in float32 at least, a block of rows at a time that fits a processor's cache. At temperature 1
they are taken once: what the readout computes stays in the place of the logits, and a gradient is that times a factor
of its row, which whoever multiplies by it can put elsewhere.
Axes: C positions of the chunk, R of a block, V vocabulary, H hidden units, K kept tokens, S = K + 1 buckets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.student_trainer.train.loss.readout import Readout
from stillhouse.student_trainer.train.loss.sparse import FORBIDDEN_LOGPROB, TeacherBuckets, charge_forbidden
from stillhouse.student_trainer.train.loss.workspace import Workspace

BLOCK_LOGITS = 2**19
"""Logits of a block on a CPU: 2 MiB in float32."""


@dataclass(kw_only=True, slots=True)
class _Read:
    """What the readout of a chunk leaves for its gradient."""

    kept: _Kept | None
    kept_logits: Tensor
    """[C, K] at the terms' temperature, -inf where not kept."""
    log_total: Tensor
    """[C, 1] at the terms' temperature."""
    log_rest: Tensor
    """[C, 1]: logsumexp of all but the kept tokens; -inf where there is none."""
    log_total_plain: Tensor
    """[C, 1] at temperature 1."""
    target_ids: Tensor
    """[C, 1]."""
    temperature: float
    rest_sum: Tensor | None
    """[C, 1]: sum of the exponentials that have replaced the logits of all but the kept tokens; None if logits are there."""


class LogitChunk:
    """Memory for C rows of logits, and the block in which their exponentials are taken."""

    def __init__(self, memory: Tensor, block: Tensor) -> None:
        self._memory = memory
        self._block = block
        self._read: _Read | None = None
        self.logits = memory
        """[C, V]: of the rows that were filled in last; after `differentiate` their gradient, but for a factor."""

    @classmethod
    def allocate(
        cls,
        num_rows: int,
        num_logits: int,
        dtype: torch.dtype,
        device: torch.device,
        workspace: Workspace,
    ) -> LogitChunk:
        """Memory for at most `num_rows` rows."""
        wide = dtype if dtype == torch.float64 else torch.float32
        on_cpu = device.type == "cpu"
        # Threads share a block by rows.
        threads = torch.get_num_threads()
        wanted = max(1, BLOCK_LOGITS // (threads * num_logits)) * threads
        block_rows = min(num_rows, wanted) if on_cpu else num_rows
        return cls(
            workspace.empty("logits", (num_rows, num_logits), dtype, device),
            torch.empty(block_rows, num_logits, dtype=wide, device=device),
        )

    def fill(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Computes the logits of `hidden` [C, H]."""
        self.logits = self._memory[: hidden.shape[0]]
        torch.mm(hidden, weight.T, out=self.logits)
        if bias is not None:
            self.logits.add_(bias.to(self.logits.dtype))

    def read(
        self,
        target_ids: Tensor,
        teacher: TeacherBuckets | None,
        temperature: float,
        *,
        differentiate: bool = True,
    ) -> Readout:
        """The readout, as [1, C, S] and [1, C], without gradient. The logits are overwritten; `differentiate` may follow if it is said here."""
        ids = target_ids[0].unsqueeze(-1)
        target_logits = self.logits.gather(-1, ids).to(self._block.dtype)
        kept = None if teacher is None else _Kept.of(teacher, self.logits.shape[-1])
        plain_total, rest_sum = None, None
        if kept is None:
            kept_logits = target_logits[:, :0]
            log_rest, rest_sum = self._logsumexp(1.0, keep=differentiate)
            log_total = log_rest
        else:
            if temperature != 1.0:
                plain_total = self._logsumexp(1.0)[0]
            kept_logits = kept.take(self.logits).to(self._block.dtype) / temperature
            kept.put(self.logits, kept_logits.new_full((), -torch.inf).expand_as(kept_logits))
            log_rest, rest_sum = self._logsumexp(temperature, keep=differentiate and temperature == 1.0)
            log_total = torch.cat([kept_logits, log_rest], dim=-1).logsumexp(-1, keepdim=True)
        self._read = _Read(
            kept=kept,
            kept_logits=kept_logits,
            log_total=log_total,
            log_rest=log_rest,
            log_total_plain=log_total if plain_total is None else plain_total,
            target_ids=ids,
            temperature=temperature,
            rest_sum=rest_sum,
        )
        targets = (target_logits - self._read.log_total_plain).squeeze(-1).unsqueeze(0)
        if kept is None:
            return Readout(buckets=None, targets=targets)
        return Readout(buckets=self._buckets(self._read, kept).unsqueeze(0), targets=targets)

    def differentiate(self, by_buckets: Tensor | None, by_targets: Tensor) -> Tensor | None:
        """Overwrites the logits by the gradient of a loss, given that by the readout: [1, C, S] and [1, C].

        What stands there is to be multiplied by the factors [C, 1] that are returned, if there are any.
        """
        read = self._read
        assert read is not None, "read first"
        by_target = by_targets[0].unsqueeze(-1)
        by_kept, by_tail = torch.zeros_like(read.kept_logits), torch.zeros_like(by_target)
        if by_buckets is not None:
            # A forbidden token or tail is charged a constant.
            by_kept = by_buckets[0, :, :-1].masked_fill(torch.isneginf(read.kept_logits), 0.0)
            by_tail = by_buckets[0, :, -1:].masked_fill(torch.isneginf(read.log_rest), 0.0)
        probs_kept = (read.kept_logits - read.log_total).exp()
        prob_rest = (read.log_rest - read.log_total).exp()
        by_all = by_kept.sum(-1, keepdim=True) + by_tail
        plain = read.temperature == 1.0
        if plain:
            by_all = by_all + by_target
        of_rest = (by_tail - prob_rest * by_all) / read.temperature
        of_kept = (by_kept - probs_kept * by_all) / read.temperature
        if not plain:
            of_kept = of_kept - by_target * (read.kept_logits * read.temperature - read.log_total_plain).exp()
        factors = None
        if read.rest_sum is None:
            self._replace(of_rest, read, extra=None if plain else by_target)
        else:
            highest = torch.cat([of_kept, by_target], dim=-1).abs().amax(-1, keepdim=True)
            factors = self._factors(of_rest, read.rest_sum, highest)
            divisors = factors.masked_fill(factors == 0, 1.0)
            of_kept, by_target = of_kept / divisors, by_target / divisors
        if read.kept is not None:
            read.kept.put(self.logits, of_kept)
        at_target = self.logits.gather(-1, read.target_ids) + by_target.to(self.logits.dtype)
        _scatter(self.logits, read.target_ids, at_target)
        self._read = None
        return factors

    def _factors(self, of_rest: Tensor, rest_sum: Tensor, highest: Tensor) -> Tensor:
        """[C, 1]: what each row's exponentials are to be multiplied by; `highest` is the most that is to be divided by it.

        Where that would leave the type's range, the row is multiplied here, and its factor is 1.
        """
        factors = of_rest / rest_sum.masked_fill(rest_sum == 0, 1.0)
        most = 1e3 if self.logits.dtype == torch.float16 else 1e30
        far = (factors.abs() * most < highest).squeeze(-1)
        for row in far.nonzero().flatten().tolist():
            self.logits[row].mul_(factors[row].to(self.logits.dtype))
        return factors.masked_fill(far.unsqueeze(-1), 1.0)

    def _buckets(self, read: _Read, kept: _Kept) -> Tensor:
        """[C, S]."""
        logprobs = charge_forbidden(read.kept_logits - read.log_total).masked_fill(~kept.mask, -torch.inf)
        tail = (read.log_rest - read.log_total).masked_fill(torch.isneginf(read.log_rest), FORBIDDEN_LOGPROB)
        has_none = kept.mask.sum(-1, keepdim=True) == self.logits.shape[-1]
        return torch.cat([logprobs, tail.masked_fill(has_none, -torch.inf)], dim=-1)

    def _logsumexp(self, temperature: float, *, keep: bool = False) -> tuple[Tensor, Tensor | None]:
        """[C, 1] of the logits / temperature; -inf for a row of -inf.

        With `keep` the logits become exponentials, 1 at the highest of a row, whose sums [C, 1] are returned as well.
        """
        found = self._block.new_empty(self.logits.shape[0], 1)
        sums = torch.empty_like(found)
        for rows, block in self._blocks(temperature, overwrite=keep):
            highest = block.amax(-1, keepdim=True)
            highest.masked_fill_(torch.isneginf(highest), 0.0)
            block.sub_(highest).exp_()
            total = block.sum(-1, keepdim=True)
            sums[rows] = total
            found[rows] = total.log().add_(highest)
            if keep and block.dtype != self.logits.dtype:
                self.logits[rows] = block
        return found, sums if keep else None

    def _replace(self, of_rest: Tensor, read: _Read, *, extra: Tensor | None) -> None:
        """Each logit by of_rest x its share of the rest; with `extra`, minus extra x its probability at temperature 1."""
        log_rest = read.log_rest.masked_fill(torch.isneginf(read.log_rest), 0.0)
        for rows, block in self._blocks(read.temperature):
            block.sub_(log_rest[rows]).exp_().mul_(of_rest[rows])
            if extra is not None:
                logprobs = self.logits[rows].to(block.dtype) - read.log_total_plain[rows]
                block.sub_(logprobs.exp_().mul_(extra[rows]))
            self.logits[rows] = block

    def _blocks(self, temperature: float, *, overwrite: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and a wide copy of their logits / temperature that may be written to; with `overwrite` no copy of logits that are as wide."""
        size = self._block.shape[0]
        for first in range(0, self.logits.shape[0], size):
            rows = slice(first, min(first + size, self.logits.shape[0]))
            block = self.logits[rows]
            if not overwrite or block.dtype != self._block.dtype:
                block = self._block[: rows.stop - first].copy_(block)
            yield rows, block if temperature == 1.0 else block.div_(temperature)


class _Kept:
    """The kept tokens of each row, in a form that can be scattered: a column that is none repeats another's place."""

    def __init__(self, mask: Tensor, places: Tensor, columns: Tensor | None) -> None:
        self.mask = mask
        """[C, K]: which columns are kept tokens."""
        self._places = places
        self._columns = columns

    @classmethod
    def of(cls, teacher: TeacherBuckets, num_logits: int) -> _Kept:
        """Of a teacher with [1, C, K] tokens."""
        assert teacher.token_ids is not None
        assert teacher.kept is not None
        mask, token_ids = teacher.kept[0], teacher.token_ids[0]
        if bool(mask.all()):
            return cls(mask, token_ids, None)
        own = torch.arange(mask.shape[-1], device=mask.device).expand_as(mask)
        columns = torch.where(mask, own, mask.int().argmax(-1, keepdim=True))
        return cls(mask, token_ids.gather(-1, columns).clamp(0, num_logits - 1), columns)

    def take(self, logits: Tensor) -> Tensor:
        """[C, K]: the kept tokens' logits, -inf elsewhere."""
        return logits.gather(-1, self._places).masked_fill(~self.mask, -torch.inf)

    def put(self, logits: Tensor, values: Tensor) -> None:
        """Overwrites the kept tokens' logits with `values` [C, K]; a row without any stays as it is."""
        values = values.to(logits.dtype)
        if self._columns is None:
            _scatter(logits, self._places, values)
            return
        some = self.mask.any(-1, keepdim=True)
        values = torch.where(some, values.gather(-1, self._columns), logits.gather(-1, self._places))
        _scatter(logits, self._places, values)


def _scatter(logits: Tensor, places: Tensor, values: Tensor) -> None:
    """logits[c, places[c, k]] = values[c, k], both of one type."""
    if logits.element_size() == 2:
        # On a CPU torch takes the whole matrix to float32 and back to scatter into half precision; bits are bits.
        logits, values = logits.view(torch.int16), values.view(torch.int16)
    logits.scatter_(-1, places, values)
