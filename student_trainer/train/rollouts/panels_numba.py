"""Products of a few rows with a small model's weights on a CPU, compiled with numba: weights lie in panels, sums in registers.

A row's result is independent of the other rows. Axes: R rows, K terms of a sum, N results of a row, P panels.
"""

# ruff: noqa: ARG001, PLR0917 - the protocol of numba's instructions, whose arguments have no keywords
from __future__ import annotations

from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.protos.telemetry.processor import Processor
from stillhouse.protos.tensors.compiled_loop import compiled_loop

LANES = 16
"""Numbers of a vector, 512 bits; where registers are shorter, LLVM takes several."""
PANEL = 2 * LANES
"""Results of a panel."""
ROWS = 4 if "avx512f" in Processor.read().flags else 1
"""Rows come in multiples of this. Twice as many have their sums in registers at a time."""

_NUMBER, _INDEX = ir.FloatType(), ir.IntType(64)
_VECTOR = ir.VectorType(_NUMBER, LANES)
_FIRST_LANES = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)


def padded(count: int, multiple: int) -> int:
    """The next multiple."""
    return -(-count // multiple) * multiple


def panels(weight_NK: Tensor, bias_N: Tensor | None) -> tuple[NDArray[Any], NDArray[Any]]:
    """Weight [P, K, PANEL] and bias [P * PANEL], with zeros behind the last result."""
    num_results, num_terms = weight_NK.shape
    missing = padded(num_results, PANEL) - num_results
    bias_N = weight_NK.new_zeros(num_results) if bias_N is None else bias_N
    if missing:
        weight_NK = torch.nn.functional.pad(weight_NK, (0, 0, 0, missing))
        bias_N = torch.nn.functional.pad(bias_N, (0, missing))
    weight_PKN = weight_NK.reshape(-1, PANEL, num_terms).transpose(1, 2)
    return weight_PKN.contiguous().numpy(), bias_N.contiguous().numpy()


def _tile(num_rows: int, num_vectors: int) -> Any:
    """An instruction: out[r] = bias + sum_k left[r, k] * right[k] for some rows, each `num_vectors` vectors wide.

    Arrays have one axis; of each it takes the first place, and of those with rows the distance between two.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        typing_context: Any,
        left: Any,
        left_at: Any,
        left_row: Any,
        right: Any,
        right_at: Any,
        right_row: Any,
        num_terms: Any,
        bias: Any,
        bias_at: Any,
        out: Any,
        out_at: Any,
        out_row: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def memory(number: int) -> Any:
                array = context.make_array(signature.args[number])(context, builder, arguments[number])
                return builder.gep(array.data, [arguments[number + 1]])

            lefts, rights, biases, outs = map(memory, (0, 3, 7, 9))
            rows = [_INDEX(row) for row in range(num_rows)]
            vectors = [_INDEX(vector * LANES) for vector in range(num_vectors)]

            def vector_at(pointer: Any, offset: Any) -> Any:
                return builder.bitcast(builder.gep(pointer, [offset]), _VECTOR.as_pointer())

            begins = [builder.gep(lefts, [builder.mul(arguments[2], row)]) for row in rows]
            first = [builder.load(vector_at(biases, vector), align=4) for vector in vectors]
            before, loop = builder.block, builder.append_basic_block("terms")
            after = builder.append_basic_block("summed")
            builder.branch(loop)
            builder.position_at_end(loop)
            term = builder.phi(_INDEX)
            sums = [[builder.phi(_VECTOR) for _ in vectors] for _ in rows]
            here = builder.gep(rights, [builder.mul(term, arguments[5])])
            factors = [builder.load(vector_at(here, vector), align=4) for vector in vectors]
            undefined = ir.Constant(_VECTOR, ir.Undefined)
            totals = []
            for begin, row_sums in zip(begins, sums, strict=True):
                lone = builder.insert_element(
                    undefined, builder.load(builder.gep(begin, [term])), ir.IntType(32)(0)
                )
                spread = builder.shuffle_vector(lone, undefined, _FIRST_LANES)
                totals.append(
                    [
                        builder.fadd(
                            builder.fmul(spread, factor, flags=("contract",)), total, flags=("contract",)
                        )
                        for factor, total in zip(factors, row_sums, strict=True)
                    ]
                )
            following = builder.add(term, _INDEX(1))
            for phi, start, again in (
                (term, _INDEX(0), following),
                *(
                    (phi, start, total)
                    for row_sums, row_totals in zip(sums, totals, strict=True)
                    for phi, start, total in zip(row_sums, first, row_totals, strict=True)
                ),
            ):
                phi.add_incoming(start, before)
                phi.add_incoming(again, loop)
            builder.cbranch(builder.icmp_signed("<", following, arguments[6]), loop, after)
            builder.position_at_end(after)
            for row, row_totals in zip(rows, totals, strict=True):
                target = builder.gep(outs, [builder.mul(arguments[11], row)])
                for vector, total in zip(vectors, row_totals, strict=True):
                    builder.store(total, vector_at(target, vector), align=4)
            return context.get_dummy_value()

        index = types.intp
        arrays = left, index, index, right, index, index, index, bias, index, out, index, index
        return types.void(*arrays), generate

    return tile


_most_rows, _rows = _tile(2 * ROWS, 2), _tile(ROWS, 2)
_row, _half_row = _tile(1, 2), _tile(1, 1)


@compiled_loop
def multiply(left_RK: Any, num_rows: Any, num_terms: Any, weight_PKN: Any, bias_N: Any, out_RN: Any) -> None:
    """Fills in out = left @ weight + bias for the first `num_rows` rows, a multiple of ROWS, of `num_terms` >= 1 terms each."""
    left, weight, out = left_RK.reshape(-1), weight_PKN.reshape(-1), out_RN.reshape(-1)
    left_row, out_row = left_RK.shape[1], out_RN.shape[1]
    for panel in range(len(weight_PKN)):
        at, first = panel * num_terms * PANEL, panel * PANEL
        row = 0
        while row + 2 * ROWS <= num_rows:
            here, there = row * left_row, row * out_row + first
            _most_rows(left, here, left_row, weight, at, PANEL, num_terms, bias_N, first, out, there, out_row)
            row += 2 * ROWS
        if row < num_rows:
            here, there = row * left_row, row * out_row + first
            _rows(left, here, left_row, weight, at, PANEL, num_terms, bias_N, first, out, there, out_row)


@compiled_loop
def weighted_sum(
    shares: Any, num_terms: Any, rows: Any, rows_at: Any, width: Any, zeros: Any, out: Any, out_at: Any
) -> None:
    """Fills in sum_k shares[k] * rows[k], each row `width` wide, a multiple of LANES; `zeros` are as many as PANEL."""
    place = 0
    while place + PANEL <= width:
        _row(shares, 0, 0, rows, rows_at + place, width, num_terms, zeros, 0, out, out_at + place, 0)
        place += PANEL
    if place < width:
        _half_row(shares, 0, 0, rows, rows_at + place, width, num_terms, zeros, 0, out, out_at + place, 0)


@intrinsic  # type: ignore[untyped-decorator]
def product(
    typing_context: Any,
    left: Any,
    left_at: Any,
    right: Any,
    right_at: Any,
    width: Any,
) -> Any:
    """The sum of the products of two rows of `width` numbers, a multiple of LANES, in arrays of one axis."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def memory(number: int) -> Any:
            array = context.make_array(signature.args[number])(context, builder, arguments[number])
            return builder.gep(array.data, [arguments[number + 1]])

        pointers = memory(0), memory(2)
        before, loop = builder.block, builder.append_basic_block("products")
        after = builder.append_basic_block("reduced")
        builder.branch(loop)
        builder.position_at_end(loop)
        place, total = builder.phi(_INDEX), builder.phi(_VECTOR)
        left_lanes, right_lanes = (
            builder.load(builder.bitcast(builder.gep(each, [place]), _VECTOR.as_pointer()), align=4)
            for each in pointers
        )
        added = builder.fadd(
            builder.fmul(left_lanes, right_lanes, flags=("contract",)), total, flags=("contract",)
        )
        following = builder.add(place, _INDEX(LANES))
        for phi, start, again in (
            (place, _INDEX(0), following),
            (total, ir.Constant(_VECTOR, [0.0] * LANES), added),
        ):
            phi.add_incoming(start, before)
            phi.add_incoming(again, loop)
        builder.cbranch(builder.icmp_signed("<", following, arguments[4]), loop, after)
        builder.position_at_end(after)
        name = f"llvm.vector.reduce.fadd.v{LANES}f32"
        function_type = ir.FunctionType(_NUMBER, [_NUMBER, _VECTOR])
        function = builder.module.globals.get(name) or ir.Function(builder.module, function_type, name)
        return builder.call(function, [_NUMBER(0.0), added], fastmath=("reassoc",))

    return types.float32(left, types.intp, right, types.intp, types.intp), generate
