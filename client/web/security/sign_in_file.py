"""File whose only line signs a person in with the credentials of the web server itself."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from stillhouse.client.core.errors import file_errors, usage_error

LEAST_CHARS = 32
MAX_BYTES = 4096


def read_or_make(path: Path) -> str:
    """The line of the file at `path`, made with a random one of 256 bits, mode 0600, if it is missing.

    Raises StillhouseError(INVALID_REQUEST) if others can read it, or if it holds no line of at least 32 characters.
    """
    with file_errors("use the sign-in file", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            pass
        else:
            with os.fdopen(number, "w") as file:
                file.write(secrets.token_urlsafe(32) + "\n")
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(MAX_BYTES + 1)
    if mode & 0o077:
        raise usage_error(f"others on this host can reach {path} (mode {mode:o}); run `chmod 600 {path}`.")
    line = content.decode("ascii", "replace").strip()
    if not LEAST_CHARS <= len(line) <= MAX_BYTES or not line.isascii() or not line.isprintable():
        raise usage_error(
            f"{path} must hold one line of {LEAST_CHARS} or more characters of ASCII; delete it, and it is made again."
        )
    return line
