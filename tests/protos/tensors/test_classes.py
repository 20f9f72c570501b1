"""Class rows over the wire: whole, in parts with hidden states, and refused where they are not what was asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.stillhouse.v1.teacher_pb2 import ClassDistribution
from stillhouse.protos.tensors.classes import class_row, decode_classes, encode_classes, reorder_classes
from stillhouse.protos.tensors.distributions import encode

LOGPROBS = np.log(np.array([0.2, 0.5, 0.3], np.float32))
STATES = np.random.default_rng(0).standard_normal((1, 7, 2, 5)).astype(np.float32)
ROW = replace(class_row(LOGPROBS, 7), layer_states=STATES)


def test_a_row_is_the_same_behind_the_wire_in_any_number_of_parts() -> None:
    for part_bytes, number in ((10_000, 1), (100, 4), (1, 7)):
        parts = list(encode_classes(ROW, part_bytes=part_bytes))
        assert len(parts) == number
        found = decode_classes(parts, num_classes=3, num_tokens=7, num_layers=2)
        np.testing.assert_array_equal(found.logprobs, ROW.logprobs)
        np.testing.assert_array_equal(found.layer_states, STATES)
    ordered = reorder_classes(ROW, np.array([2, 0, 1]))
    assert ordered.layer_states is STATES


@pytest.mark.parametrize(
    ("states", "words"),
    [
        (STATES[0, :6], "those of 6 tokens"),
        (STATES[0, :, :1], "shape"),
        (np.full_like(STATES[0], np.nan), "NaN"),
        (np.zeros((7, 2, 40_000), np.float32), "units at most"),
    ],
)
def test_states_that_were_not_asked_for_are_refused(states: np.ndarray, words: str) -> None:
    message = ClassDistribution(logprobs=encode(LOGPROBS), layer_states=encode(states))
    with pytest.raises(StillhouseError, match=words):
        decode_classes([message], num_classes=3, num_tokens=7, num_layers=2)
