"""A layer of a model shaped like Llama for one more token of each sequence, compiled with numba.

A sequence's result is independent of the others. Axes: B sequences, R >= B rows, L keys, H hidden units, N heads, D units of a head, a
multiple of LANES.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stillhouse.protos.tensors.compiled_loop import compiled_loop
from stillhouse.protos.tensors.exponentials_numba import LOG2_E, power_of_two
from stillhouse.protos.tensors.instructions_numba import wide_vectors
from stillhouse.student_trainer.train.rollouts.panels_numba import (
    LANES,
    PANEL,
    ROWS,
    multiply,
    product,
    weighted_sum,
)

_LARGEST_EXPONENT = np.float32(126.0)
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


def _in_any_order(function: Any) -> Any:
    """Sums and maxima in any order."""
    return compiled_loop(function, fastmath={"reassoc", "nsz", "contract"}, error_model="numpy")


def prepare() -> None:
    """Calls the compiled loops once."""
    states, units = np.zeros((ROWS, PANEL), np.float32), np.ones(PANEL, np.float32)
    panels, memory = np.zeros((1, PANEL, PANEL), np.float32), np.zeros((1, 1, 1, LANES), np.float32)
    norm, linear = (units, _ONE), (panels, units)
    mlp = np.zeros((2, PANEL, PANEL), np.float32), np.zeros(2 * PANEL, np.float32)
    wide, places = np.zeros((ROWS, 2 * PANEL), np.float32), np.zeros(1, np.int64)
    turns = np.zeros((1, 2, LANES), np.float32)
    heads = states[:, :LANES].copy()
    cached = (turns, places, places, memory, memory, 0, _ONE)
    attend(
        states,
        ROWS,
        *norm,
        *mlp,
        units[:0],
        units[:0],
        _ONE,
        *cached,
        panels[:, :LANES].copy(),
        units,
        states.copy(),
        wide,
        heads,
        states,
    )
    transform(states, 1, ROWS, *norm, *mlp, *linear, states.copy(), wide, states.copy())
    logits(states, 1, ROWS, *norm, *linear, states.copy(), states.copy())


@compiled_loop
def attend(  # noqa: PLR0917 - compiled code takes no keywords
    hidden_RH: Any,
    num_rows: Any,
    norm_H: Any,
    epsilon: Any,
    weight_in: Any,
    bias_in: Any,
    query_norm: Any,
    key_norm: Any,
    head_epsilon: Any,
    turns: Any,
    positions_B: Any,
    padding_B: Any,
    keys_BNLD: Any,
    values_BNLD: Any,
    num_keys: Any,
    scaling: Any,
    weight_out: Any,
    bias_out: Any,
    normed_RH: Any,
    heads_RN: Any,
    attended_RN: Any,
    added_RH: Any,
) -> None:
    """Adds the attention of a layer to the hidden states, and the token's keys and values behind `num_keys` others.

    `turns` [positions, 2, D] are cosines and sines, the lower half of which is negative; head norms are empty if there are none.
    The last four arrays are its own.
    """
    batch, hidden_size = len(positions_B), hidden_RH.shape[1]
    heads, room, width = keys_BNLD.shape[1], keys_BNLD.shape[2], keys_BNLD.shape[3]
    queries = attended_RN.shape[1] // width
    _normalise(hidden_RH, batch, norm_H, epsilon, normed_RH)
    multiply(normed_RH, num_rows, hidden_size, weight_in, bias_in, heads_RN)
    keys, values = keys_BNLD.reshape(-1), values_BNLD.reshape(-1)
    attended, own = attended_RN.reshape(-1), heads_RN.reshape(-1)
    shares, zeros = np.empty(num_keys + 1, np.float32), np.zeros(PANEL, np.float32)
    for row in range(batch):
        at = row * heads_RN.shape[1]
        for head in range(queries + heads):
            here = own[at + head * width : at + (head + 1) * width]
            if head < queries and len(query_norm):
                _normalise_row(here, query_norm, head_epsilon, here)
            if head >= queries and len(key_norm):
                _normalise_row(here, key_norm, head_epsilon, here)
            _turn(here, turns[positions_B[row]])
        for head in range(heads):
            place = ((row * heads + head) * room + num_keys) * width
            begin = at + (queries + head) * width
            for unit in range(width):
                keys[place + unit] = own[begin + unit]
                values[place + unit] = own[begin + heads * width + unit]
        first = padding_B[row]
        count = num_keys + 1 - first
        for head in range(queries):
            begin = ((row * heads + head * heads // queries) * room + first) * width
            query_at = at + head * width
            for key in range(count):
                shares[key] = product(own, query_at, keys, begin + key * width, width)
            _softmax(shares[:count], scaling)
            out_at = row * attended_RN.shape[1] + head * width
            weighted_sum(shares, count, values, begin, width, zeros, attended, out_at)
    multiply(attended_RN, num_rows, queries * width, weight_out, bias_out, added_RH)
    _add(hidden_RH, batch, added_RH)


@compiled_loop
def transform(  # noqa: PLR0917
    hidden_RH: Any,
    batch: Any,
    num_rows: Any,
    norm_H: Any,
    epsilon: Any,
    weight_in: Any,
    bias_in: Any,
    weight_out: Any,
    bias_out: Any,
    normed_RH: Any,
    gates_RI: Any,
    added_RH: Any,
) -> None:
    """Adds the MLP of a layer, with SiLU as its activation, to the hidden states; the last three arrays are its own."""
    inner = weight_out.shape[1]
    _normalise(hidden_RH, batch, norm_H, epsilon, normed_RH)
    multiply(normed_RH, num_rows, hidden_RH.shape[1], weight_in, bias_in, gates_RI)
    for row in range(batch):
        _gate(gates_RI[row], inner)
    multiply(gates_RI, num_rows, inner, weight_out, bias_out, added_RH)
    _add(hidden_RH, batch, added_RH)


@compiled_loop
def logits(  # noqa: PLR0917
    hidden_RH: Any,
    batch: Any,
    num_rows: Any,
    norm_H: Any,
    epsilon: Any,
    weight: Any,
    bias: Any,
    normed: Any,
    out: Any,
) -> None:
    """Fills in the logits of the hidden states; `normed` is its own."""
    _normalise(hidden_RH, batch, norm_H, epsilon, normed)
    multiply(normed, num_rows, hidden_RH.shape[1], weight, bias, out)


@compiled_loop
def _normalise(states: Any, batch: Any, weight: Any, epsilon: Any, out: Any) -> None:
    for row in range(batch):
        _normalise_row(states[row], weight, epsilon, out[row])


@_in_any_order
def _normalise_row(states: Any, weight: Any, epsilon: Any, out: Any) -> None:
    """RMSNorm."""
    wide_vectors()
    total = _ZERO
    for unit in range(len(weight)):
        total += states[unit] * states[unit]
    factor = np.float32(_ONE / np.sqrt(np.float32(total / np.float32(len(weight)) + epsilon)))
    for unit in range(len(weight)):
        out[unit] = states[unit] * factor * weight[unit]


@compiled_loop
def _turn(states: Any, turns_2D: Any) -> None:
    """Rotary embedding, in place."""
    half = len(states) // 2
    for unit in range(half):
        low, high = states[unit], states[unit + half]
        states[unit] = low * turns_2D[0, unit] + high * turns_2D[1, unit]
        states[unit + half] = high * turns_2D[0, unit + half] + low * turns_2D[1, unit + half]


@_in_any_order
def _softmax(scores: Any, scaling: Any) -> None:
    wide_vectors()
    highest = np.float32(-np.inf)
    for key in range(len(scores)):
        highest = max(highest, scores[key])
    factor, total = np.float32(scaling * LOG2_E), _ZERO
    for key in range(len(scores)):
        share = power_of_two(np.float32((scores[key] - highest) * factor))
        scores[key] = share
        total += share
    share = np.float32(_ONE / total)
    for key in range(len(scores)):
        scores[key] *= share


@_in_any_order
def _gate(gates: Any, inner: Any) -> None:
    """Replaces the first half by SiLU of itself times the second."""
    wide_vectors()
    for unit in range(inner):
        gate = gates[unit]
        spread = power_of_two(np.float32(min(np.float32(-gate * LOG2_E), _LARGEST_EXPONENT)))
        gates[unit] = gate / (_ONE + spread) * gates[inner + unit]


@compiled_loop
def _add(states: Any, batch: Any, added: Any) -> None:
    wide_vectors()
    for row in range(batch):
        for unit in range(states.shape[1]):
            states[row, unit] += added[row, unit]
