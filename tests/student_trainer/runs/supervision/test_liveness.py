"""Silence is counted between polls, and ends with any heartbeat."""

from __future__ import annotations

import os
from pathlib import Path

from stillhouse.student_trainer.runs.supervision.liveness import LOOK_LIMIT_S, HeartbeatWatch


def test_silence_grows_until_a_heartbeat_without_the_services_own_suspension(tmp_path: Path) -> None:
    beat, now_s = tmp_path / "heartbeat", 100.0
    pulse = HeartbeatWatch(beat, lambda: now_s)

    def after(seconds: float) -> float:
        nonlocal now_s
        now_s += seconds
        return pulse.silent_s()

    assert [after(0.5), after(0.5), after(3600.0)] == [0.5, 1.0, 1.0 + LOOK_LIMIT_S]
    beat.touch()
    assert after(0.5) == 0
    assert after(0.5) == 0.5
    os.utime(beat, (0, 0))  # a clock set back is a heartbeat too
    assert after(0.5) == 0
    beat.unlink()
    assert [after(0.5), after(0.5)] == [0, 0.5]
