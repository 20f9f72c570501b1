"""The process of one batch: `stillhouse generate` on its input, told by one line on standard input.

It writes its progress to standard output, a JSON object a line; the last one has `done` or `error`. The end of standard
input ends it: the server has ended then. What is done stays in the output's journal.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from stillhouse.client.batch.pipeline import BatchProgress, BatchSettings, Listeners, generate_file
from stillhouse.client.teacher.teacher import Teacher
from stillhouse.protos.errors import StillhouseError, from_status, to_status
from stillhouse.protos.telemetry.logs import configure_logging

TELL_S = 0.5
"""Between two lines of progress."""
PATIENCE_S = 60.0
"""For a lost teacher; the server starts the process again later."""
_PATHS = ("tls_ca", "tls_cert", "tls_key")


def main() -> int:
    """Runs the batch; the exit code."""
    configure_logging("warning")
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    security = {
        name: Path(value) if name in _PATHS and value else value for name, value in order["security"].items()
    }
    told_s = 0.0

    def progress(now: BatchProgress) -> None:
        nonlocal told_s
        if time.monotonic() - told_s > TELL_S or now.rows == now.total_rows:
            told_s = time.monotonic()
            _tell({"rows": now.rows, "failed": now.failed})

    try:
        with Teacher(order["target"], **security) as teacher:
            summary = generate_file(
                teacher,
                order["source"],
                order["out"],
                BatchSettings(format="openai", patience_s=PATIENCE_S),
                Listeners(progress=progress),
            )
    except Exception as caught:
        error = caught if isinstance(caught, StillhouseError) else from_status(to_status(caught))
        _tell({"error": {"code": str(error.reason), "message": error.message, "retryable": error.retryable}})
        return 1
    _tell({"rows": summary.rows, "failed": summary.failed, "done": True})
    return 0


def _tell(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    while sys.stdin.read(4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
