"""One chunk of logits in reused memory: read out, then overwritten in place by their gradient.

Exponentials are taken in float32 at least: on a CPU by compiled code, elsewhere and for small vocabularies in blocks of rows.
At temperature 1 they are taken once: they replace the logits, and the gradient is these times one factor per row, which the
caller may instead apply to a smaller operand of its matmul.
Axes: C positions of the chunk, R of a block, V vocabulary, H hidden units, K kept tokens, S = K + 1 buckets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from stillhouse.student_trainer.train.loss.products import multiply
from stillhouse.student_trainer.train.loss.readout import Readout
from stillhouse.student_trainer.train.loss.sparse import FORBIDDEN_LOGPROB, TeacherBuckets, charge_forbidden
from stillhouse.student_trainer.train.loss.workspace import Workspace

BLOCK_LOGITS = 2**19
"""Logits of a block on a CPU: 2 MiB in float32."""
COMPILED_VOCAB = 2048
"""Smallest vocabulary that repays the second of compilation."""


@dataclass(kw_only=True, slots=True)
class _ForwardState:
    """Values that `read_out` keeps for `differentiate`."""

    kept: _KeptTokens | None
    kept_logits: Float[Tensor, "C K"]
    """At the terms' temperature; -inf where not kept."""
    log_total: Float[Tensor, "C 1"]
    """Logsumexp of all logits at the terms' temperature."""
    log_rest: Float[Tensor, "C 1"]
    """Logsumexp of all but the kept tokens; -inf if there are none."""
    log_total_plain: Float[Tensor, "C 1"]
    """Logsumexp of all logits at temperature 1."""
    target_ids: Int64[Tensor, "C 1"]
    temperature: float
    rest_sum: Float[Tensor, "C 1"] | None
    """Sum of the exponentials that replaced the logits of all but the kept tokens; None if the logits are unchanged."""


class LogitChunk:
    """Memory for C rows of logits, and the block in which their exponentials are taken, or the threads of compiled code."""

    def __init__(self, memory: Tensor, block: Tensor, threads: RowThreads | None) -> None:
        self._memory = memory
        self._block = block
        self.threads = threads
        """Threads of compiled code over the logits; None where the vocabulary is small, or not on a CPU."""
        self._state: _ForwardState | None = None
        self.logits: Float[Tensor, "C V"] = memory
        """Rows filled last; after `differentiate` their gradient, up to the row factors that it returns."""

    @classmethod
    def allocate(
        cls,
        num_rows: int,
        num_logits: int,
        dtype: torch.dtype,
        device: torch.device,
        workspace: Workspace,
    ) -> LogitChunk:
        """Allocates memory for at most `num_rows` rows."""
        wide = dtype if dtype == torch.float64 else torch.float32
        on_cpu = device.type == "cpu"
        # Threads share a block by rows.
        threads = torch.get_num_threads()
        wanted = max(1, BLOCK_LOGITS // (threads * num_logits)) * threads
        block_rows = min(num_rows, wanted) if on_cpu else num_rows
        compiled = on_cpu and dtype in (torch.bfloat16, torch.float32) and num_logits >= COMPILED_VOCAB
        return cls(
            workspace.empty("logits", (num_rows, num_logits), dtype, device),
            torch.empty(0 if compiled else block_rows, num_logits, dtype=wide, device=device),
            RowThreads(threads, rows_per_piece=max(1, BLOCK_LOGITS // num_logits)) if compiled else None,
        )

    def compute_logits(
        self, hidden: Float[Tensor, "C H"], weight: Float[Tensor, "V H"], bias: Float[Tensor, " V"] | None
    ) -> None:
        """Overwrites the memory with hidden @ weight.T + bias."""
        self.logits = self._memory[: hidden.shape[0]]
        multiply(hidden, weight, out=self.logits)
        if bias is not None:
            self.logits.add_(bias.to(self.logits.dtype))

    def read_out(
        self,
        target_ids: Int64[Tensor, "1 C"],
        teacher: TeacherBuckets | None,
        temperature: float,
        *,
        differentiate: bool = True,
    ) -> Readout:
        """Returns the readout, as [1, C, S] and [1, C], without gradient, and overwrites the logits.

        `differentiate` announces that the method of this name follows.
        """
        ids = target_ids[0].unsqueeze(-1)
        target_logits = self.logits.gather(-1, ids).to(self._block.dtype)
        kept = None if teacher is None else _KeptTokens.from_buckets(teacher, self.logits.shape[-1])
        plain_total, rest_sum = None, None
        if kept is None:
            kept_logits = target_logits[:, :0]
            log_rest, rest_sum = self._logsumexp(1.0, keep=differentiate)
            log_total = log_rest
        else:
            if temperature != 1.0:
                plain_total = self._logsumexp(1.0)[0]
            kept_logits = kept.gather(self.logits).to(self._block.dtype) / temperature
            kept.blank(self.logits)
            log_rest, rest_sum = self._logsumexp(temperature, keep=differentiate and temperature == 1.0)
            log_total = torch.cat([kept_logits, log_rest], dim=-1).logsumexp(-1, keepdim=True)
        self._state = _ForwardState(
            kept=kept,
            kept_logits=kept_logits,
            log_total=log_total,
            log_rest=log_rest,
            log_total_plain=log_total if plain_total is None else plain_total,
            target_ids=ids,
            temperature=temperature,
            rest_sum=rest_sum,
        )
        targets = (target_logits - self._state.log_total_plain).squeeze(-1).unsqueeze(0)
        if kept is None:
            return Readout(buckets=None, targets=targets)
        return Readout(buckets=self._buckets(self._state, kept).unsqueeze(0), targets=targets)

    def differentiate(
        self, grad_buckets: Float[Tensor, "1 C S"] | None, grad_targets: Float[Tensor, "1 C"]
    ) -> Float[Tensor, "C 1"] | None:
        """Overwrites the logits by the gradient of a loss, given the loss's gradient with respect to the readout.

        With h_s = dL/db_s of the buckets, c = dL/dt of the text's token, H = sum_s h_s (+ c at temperature T = 1), and
        q the student at temperature T:
            dL/dz_k = (h_k - q_k H) / T                              on a kept token k,
            dL/dz_j = q_j / Q_tail (h_tail - Q_tail H) / T           on any other token j,
            dL/dz_y += c on the text's token y; for T != 1 also dL/dz_v -= c q_v(T = 1) on every token v.
        Returns factors by which the rows still have to be multiplied, or None if there are none.
        """
        state = self._state
        assert state is not None, "read_out first"
        grad_target = grad_targets[0].unsqueeze(-1)
        grad_kept, grad_tail = torch.zeros_like(state.kept_logits), torch.zeros_like(grad_target)
        if grad_buckets is not None:
            # A forbidden token or tail is charged a constant.
            grad_kept = grad_buckets[0, :, :-1].masked_fill(torch.isneginf(state.kept_logits), 0.0)
            grad_tail = grad_buckets[0, :, -1:].masked_fill(torch.isneginf(state.log_rest), 0.0)
        probs_kept_CK = (state.kept_logits - state.log_total).exp()
        prob_tail = (state.log_rest - state.log_total).exp()
        grad_sum = grad_kept.sum(-1, keepdim=True) + grad_tail
        plain = state.temperature == 1.0
        if plain:
            grad_sum = grad_sum + grad_target
        grad_rest_logits = (grad_tail - prob_tail * grad_sum) / state.temperature
        grad_kept_logits_CK = (grad_kept - probs_kept_CK * grad_sum) / state.temperature
        if not plain:
            plain_logits_CK = state.kept_logits * state.temperature
            grad_kept_logits_CK = (
                grad_kept_logits_CK - grad_target * (plain_logits_CK - state.log_total_plain).exp()
            )
        row_factors = None
        if state.rest_sum is None:
            self._write_rest_gradient(grad_rest_logits, state, plain_share=None if plain else grad_target)
        else:
            max_gradient = torch.cat([grad_kept_logits_CK, grad_target], dim=-1).abs().amax(-1, keepdim=True)
            row_factors = self._row_factors(grad_rest_logits, state.rest_sum, max_gradient)
            divisors = row_factors.masked_fill(row_factors == 0, 1.0)
            grad_kept_logits_CK, grad_target = grad_kept_logits_CK / divisors, grad_target / divisors
        if state.kept is not None:
            state.kept.scatter(self.logits, grad_kept_logits_CK)
        at_target = self.logits.gather(-1, state.target_ids) + grad_target.to(self.logits.dtype)
        _put(self.logits, state.target_ids, at_target)
        self._state = None
        return row_factors

    def _row_factors(
        self,
        grad_rest_logits: Float[Tensor, "C 1"],
        rest_sum: Float[Tensor, "C 1"],
        max_gradient: Float[Tensor, "C 1"],
    ) -> Float[Tensor, "C 1"]:
        """Factors that turn each row's exponentials into gradients; other entries of a row are divided by its factor.

        Where `max_gradient` / factor would leave the dtype's range, the row is multiplied here and its factor is 1.
        """
        factors = grad_rest_logits / rest_sum.masked_fill(rest_sum == 0, 1.0)
        max_quotient = 1e3 if self.logits.dtype == torch.float16 else 1e30
        overflows = (factors.abs() * max_quotient < max_gradient).squeeze(-1)
        for row in overflows.nonzero().flatten().tolist():
            self.logits[row].mul_(factors[row].to(self.logits.dtype))
        return factors.masked_fill(overflows.unsqueeze(-1), 1.0)

    def _buckets(self, state: _ForwardState, kept: _KeptTokens) -> Float[Tensor, "C S"]:
        logprobs = charge_forbidden(state.kept_logits - state.log_total).masked_fill(~kept.mask, -torch.inf)
        tail = (state.log_rest - state.log_total).masked_fill(
            torch.isneginf(state.log_rest), FORBIDDEN_LOGPROB
        )
        has_none = kept.mask.sum(-1, keepdim=True) == self.logits.shape[-1]
        return torch.cat([logprobs, tail.masked_fill(has_none, -torch.inf)], dim=-1)

    def _logsumexp(
        self, temperature: float, *, keep: bool = False
    ) -> tuple[Float[Tensor, "C 1"], Float[Tensor, "C 1"] | None]:
        """Logsumexp of the logits / temperature; -inf for a row of -inf.

        With `keep` the logits become exponentials, at a row's maximum 1, or e^40 at most, and their sums are returned as well.
        """
        if self.threads is not None:
            return self._compiled_logsumexp(self.threads, temperature, keep=keep)
        logsumexps = self._block.new_empty(self.logits.shape[0], 1)
        sums = torch.empty_like(logsumexps)
        for rows, block in self._blocks(temperature, overwrite=keep):
            highest = block.amax(-1, keepdim=True)
            highest.masked_fill_(torch.isneginf(highest), 0.0)
            block.sub_(highest).exp_()
            total = block.sum(-1, keepdim=True)
            sums[rows] = total
            logsumexps[rows] = total.log().add_(highest)
            if keep and block.dtype != self.logits.dtype:
                self.logits[rows] = block
        return logsumexps, sums if keep else None

    def _compiled_logsumexp(
        self, threads: RowThreads, temperature: float, *, keep: bool
    ) -> tuple[Float[Tensor, "C 1"], Float[Tensor, "C 1"] | None]:
        from stillhouse.protos.tensors.exponentials_numba import exponentials

        num_rows = self.logits.shape[0]
        references, sums = torch.empty(num_rows), torch.empty(num_rows, dtype=torch.float64)
        threads.run(
            num_rows,
            partial(
                exponentials,
                bits_of(self.logits),
                scale=1 / temperature,
                keep=keep,
                references_R=references.numpy(),
                sums_R=sums.numpy(),
            ),
        )
        logsumexps = (sums.log() + references.double() / temperature).float().unsqueeze(-1)
        return logsumexps, sums.float().unsqueeze(-1) if keep else None

    def _write_rest_gradient(
        self,
        grad_rest_logits: Float[Tensor, "C 1"],
        state: _ForwardState,
        *,
        plain_share: Float[Tensor, "C 1"] | None,
    ) -> None:
        """Replaces each logit by grad_rest_logits x its share of the rest, minus plain_share x q at temperature 1."""
        log_rest = state.log_rest.masked_fill(torch.isneginf(state.log_rest), 0.0)
        if self.threads is not None:
            from stillhouse.protos.tensors.exponentials_numba import shares

            plain = torch.zeros_like(log_rest) if plain_share is None else plain_share
            columns = (log_rest, grad_rest_logits, state.log_total_plain, plain)
            by_row = [each.flatten().contiguous().numpy() for each in columns]
            self.threads.run(
                self.logits.shape[0],
                partial(shares, bits_of(self.logits), by_row, scale=1 / state.temperature),
            )
            return
        for rows, block in self._blocks(state.temperature):
            block.sub_(log_rest[rows]).exp_().mul_(grad_rest_logits[rows])
            if plain_share is not None:
                logprobs = self.logits[rows].to(block.dtype) - state.log_total_plain[rows]
                block.sub_(logprobs.exp_().mul_(plain_share[rows]))
            self.logits[rows] = block

    def _blocks(
        self, temperature: float, *, overwrite: bool = False
    ) -> Iterator[tuple[slice, Float[Tensor, "R V"]]]:
        """Yields rows and a wide, writable copy of their logits / temperature.

        With `overwrite` logits that are wide already are yielded themselves.
        """
        size = self._block.shape[0]
        for first in range(0, self.logits.shape[0], size):
            rows = slice(first, min(first + size, self.logits.shape[0]))
            block = self.logits[rows]
            if not overwrite or block.dtype != self._block.dtype:
                block = self._block[: rows.stop - first].copy_(block)
            yield rows, block if temperature == 1.0 else block.div_(temperature)


def bits_of(logits: Float[Tensor, "C V"]) -> Any:
    """The logits' memory as an array: float32, or the bits of bfloat16."""
    array = (logits.view(torch.uint16) if logits.dtype == torch.bfloat16 else logits).detach().numpy()
    assert array.flags.c_contiguous
    return array


class _KeptTokens:
    """The kept tokens of each row as scatter indices: an unused column repeats the index of a used one."""

    def __init__(
        self,
        mask: Bool[Tensor, "C K"],
        token_ids: Int64[Tensor, "C K"],
        columns: Int64[Tensor, "C K"] | None,
    ) -> None:
        self.mask = mask
        """True in columns that hold a kept token."""
        self._token_ids = token_ids
        self._columns = columns
        self._rows_with_some: Bool[Tensor, "C 1"] | None = None
        """Rows with a kept token; None if all have one."""
        if columns is not None:
            some = mask.any(-1, keepdim=True)
            self._rows_with_some = None if bool(some.all()) else some

    @classmethod
    def from_buckets(cls, teacher: TeacherBuckets, num_logits: int) -> _KeptTokens:
        """Indexes the kept tokens of a teacher with `token_ids` [1, C, K]."""
        assert teacher.token_ids is not None
        assert teacher.kept is not None
        mask, token_ids = teacher.kept[0], teacher.token_ids[0]
        if bool(mask.all()):
            return cls(mask, token_ids, None)
        own = torch.arange(mask.shape[-1], device=mask.device).expand_as(mask)
        columns = torch.where(mask, own, mask.int().argmax(-1, keepdim=True))
        return cls(mask, token_ids.gather(-1, columns).clamp(0, num_logits - 1), columns)

    def gather(self, logits: Float[Tensor, "C V"]) -> Float[Tensor, "C K"]:
        """Returns the kept tokens' logits, -inf in unused columns."""
        return logits.gather(-1, self._token_ids).masked_fill(~self.mask, -torch.inf)

    def scatter(self, logits: Float[Tensor, "C V"], values: Float[Tensor, "C K"]) -> None:
        """Overwrites the kept tokens' logits with `values`; a row without any is unchanged."""
        values = values.to(logits.dtype)
        if self._columns is not None:
            values = values.gather(-1, self._columns)
        if self._rows_with_some is not None:
            values = torch.where(self._rows_with_some, values, logits.gather(-1, self._token_ids))
        _put(logits, self._token_ids, values)

    def blank(self, logits: Float[Tensor, "C V"]) -> None:
        """Overwrites the kept tokens' logits with -inf; a row without any is unchanged."""
        places = _places(self._token_ids, logits)
        if self._rows_with_some is not None:
            places = places[self._rows_with_some.expand_as(self.mask).flatten()]
        logits.view(-1).index_fill_(0, places, -torch.inf)


def _put(logits: Float[Tensor, "C V"], token_ids: Int64[Tensor, "C K"], values: Float[Tensor, "C K"]) -> None:
    """Sets logits[c, token_ids[c, k]] = values[c, k]; both have one dtype."""
    if logits.element_size() == 2:
        # On a CPU torch takes the whole matrix to float32 and back to scatter into half precision; bits are bits.
        logits, values = logits.view(torch.int16), values.view(torch.int16)
    elif logits.device.type == "cpu":
        # In one line torch takes a third of the time on a CPU.
        logits, token_ids, values = logits.view(-1), _places(token_ids, logits), values.reshape(-1)
    logits.scatter_(-1, token_ids, values)


def _places(token_ids: Int64[Tensor, "C K"], logits: Float[Tensor, "C V"]) -> Int64[Tensor, " CK"]:
    """Returns the places of ids in the flattened logits."""
    rows = torch.arange(len(token_ids), device=token_ids.device).unsqueeze(-1)
    return (token_ids + rows * logits.shape[-1]).flatten()


class RowThreads:
    """The calling thread and, once there is work for them, helpers, which end with this object: they take rows as they get free."""

    def __init__(self, num_threads: int, *, rows_per_piece: int) -> None:
        self._num_threads = num_threads
        self._rows_per_piece = rows_per_piece
        self._helpers: ThreadPoolExecutor | None = None

    def run(self, num_rows: int, work: Callable[[slice], None]) -> None:
        """Calls `work`, which releases the interpreter's lock, with slices that cover the rows once. Raises the first error."""
        pieces = iter(range(0, num_rows, self._rows_per_piece))

        def take_pieces() -> None:
            for first in pieces:
                work(slice(first, min(first + self._rows_per_piece, num_rows)))

        num_helpers = min(self._num_threads, -(-num_rows // self._rows_per_piece)) - 1
        if num_helpers > 0 and self._helpers is None:
            self._helpers = ThreadPoolExecutor(self._num_threads - 1, "stillhouse-logits")
        helping = [self._helpers.submit(take_pieces) for _ in range(num_helpers)] if self._helpers else []
        take_pieces()
        for each in helping:
            each.result()
