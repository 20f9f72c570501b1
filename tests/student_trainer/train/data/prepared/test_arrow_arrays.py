"""Arrow arrays over numpy's memory: the values stay, and pandas stays out."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from stillhouse.student_trainer.train.data.prepared.arrow_arrays import to_arrow, to_numpy


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float16, np.bool_])
@pytest.mark.parametrize("count", [0, 1, 21])
def test_values_are_those_of_pyarrow(dtype: type, count: int) -> None:
    values: NDArray[Any] = (np.arange(count) % 3).astype(dtype)
    array = to_arrow(values)
    array.validate(full=True)
    assert array.equals(pa.array(values))
    for begin in range(0, count, 5):
        np.testing.assert_array_equal(to_numpy(array[begin:]), values[begin:])
        np.testing.assert_array_equal(to_numpy(array[begin : begin + 2]), values[begin : begin + 2])
    assert to_numpy(array).dtype == dtype


def test_nulls_are_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2 values are null"):
        to_numpy(pa.array([1, None], pa.int32()))


def test_prepared_examples_are_written_and_read_without_pandas() -> None:
    program = """
import sys
import numpy as np
from stillhouse.student_trainer.train.data.prepared.columns import BatchBuilder, BatchView, check_batch, examples_bytes
builder = BatchBuilder()
mask = np.array([False, True, True])
builder.add([3, 1, 2], mask, num_prompt=1, path="a", number=7, teacher="t", prompts={})
batch = builder.finish()
names = {name: each.names for name, each in builder.names.items()}
check_batch(batch, names)
found = BatchView(batch).example(0, names)
assert found.token_ids.tolist() == [3, 1, 2] and found.mask.tolist() == mask.tolist()
assert sum(len(bytes(each)) for each in examples_bytes(batch))
assert "pandas" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
