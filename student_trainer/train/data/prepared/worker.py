"""A process that encodes blocks for the one that started it: `python -m …worker DESCRIPTOR`, a socket to that process.

It ends with the socket, so that none outlives a killed run.
"""

from __future__ import annotations

import pickle
import signal
import sys
from multiprocessing.connection import Connection

from stillhouse.student_trainer.train.data.prepared.block import BlockEncoder
from stillhouse.student_trainer.train.data.prepared.identity import tokenizer_digest


def main() -> None:
    """Serves until the socket is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the process that started this one decides
    with Connection(int(sys.argv[1])) as socket:
        try:
            _serve(socket)
        except (EOFError, OSError):
            return


def _serve(socket: Connection) -> None:
    tokenizer, settings = pickle.loads(socket.recv_bytes())  # noqa: S301 - of this program's own process
    encoder = BlockEncoder(tokenizer, settings)
    socket.send_bytes(tokenizer_digest(tokenizer).encode())
    while True:
        rows, learned = pickle.loads(socket.recv_bytes())  # noqa: S301
        try:
            block = encoder.encode(rows, learned)
        except Exception:
            # The process that started this one encodes it again, and has the error itself.
            block = None
        socket.send_bytes(pickle.dumps(block, protocol=5))


if __name__ == "__main__":
    main()
