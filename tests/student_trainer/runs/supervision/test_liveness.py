"""A silence is counted while somebody looks, and ends with any sign of life."""

from __future__ import annotations

import os
from pathlib import Path

from stillhouse.student_trainer.runs.supervision.liveness import LOOK_LIMIT_S, HeartbeatWatch


def test_silence_grows_until_a_sign_of_life_and_a_service_that_slept_counts_no_sleep(tmp_path: Path) -> None:
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
    os.utime(beat, (0, 0))  # a clock that was set back is a sign of life too
    assert after(0.5) == 0
    beat.unlink()
    assert [after(0.5), after(0.5)] == [0, 0.5]
