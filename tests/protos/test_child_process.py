"""Ends of processes are told by the names of signals."""

from __future__ import annotations

from stillhouse.protos.child_process import signal_name


def test_a_signal_has_its_name_and_one_without_a_name_its_number() -> None:
    assert signal_name(9) == "SIGKILL"
    assert signal_name(99) == "signal 99"
