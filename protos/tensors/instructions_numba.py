"""Instructions of compiled loops that numba has no words for: fetching memory ahead of its use, and vectors of full width."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from stillhouse.protos.tensors.compiled_loop import compiled_loop

_LINE_BYTES = 64
_TO_WRITE, _TO_KEEP, _DATA = 1, 3, 1


@compiled_loop
def fetch(array: Any, begin: Any, count: Any) -> None:
    """Fetches `count` numbers of a contiguous array from `begin` on, to be overwritten; places behind its end do no harm.

    Where a loop is longer than a processor looks ahead, memory would else be waited for between its turns.
    """
    for index in range(begin, begin + count, _LINE_BYTES // array.itemsize):
        _prefetch(array, index)


@intrinsic  # type: ignore[untyped-decorator]
def wide_vectors(typing_context: Any) -> Any:  # noqa: ARG001 - numba's protocol
    """Lets the calling function be compiled with vectors of 512 bits, where LLVM prefers 256 for some processors.

    The functions that it is inlined in need the call as well. Without effect if this llvmlite keeps attributes otherwise.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        attributes = builder.function.attributes
        if isinstance(attributes, set):
            set.add(attributes, '"prefer-vector-width"="512"')  # its own `add` knows names alone
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic  # type: ignore[untyped-decorator]
def _prefetch(typing_context: Any, array: Any, index: Any) -> Any:  # noqa: ARG001
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        memory = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        line = builder.bitcast(builder.gep(memory, [arguments[1]]), cgutils.voidptr_t)
        number = ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
        builder.call(function, [line, number(_TO_WRITE), number(_TO_KEEP), number(_DATA)])
        return context.get_dummy_value()

    return types.void(array, index), generate
