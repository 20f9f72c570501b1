"""A host of its own for programs under test: a network namespace behind a cable that can be pulled, a route that can vanish, a line that can be slow.

Unlike a proxy it is the kernel that loses packets here: neither side is told, and no connection is closed or reset.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.privileges import NOT_ALLOWED

NETWORK = "198.18"
"""Prefix of the addresses that are kept for tests of networks (RFC 2544)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """The far end of a cable to this machine."""

    name: str
    """Name of the namespace, and of the cable's far end in it."""
    near: str
    """This machine's address on the cable."""
    far: str
    """The other host's."""
    python: Path
    """An interpreter whose programs run there; their process ids are those of this machine."""

    def pull_cable(self) -> None:
        """The far end goes down: packets of both directions are lost."""
        self._there("link", "set", self.name, "down")

    def plug_cable(self) -> None:
        """The far end comes up again."""
        self._there("link", "set", self.name, "up")

    def lose_answers(self) -> None:
        """Drops what the other host sends; what this machine sends arrives."""
        self._there("route", "add", "blackhole", f"{self.near}/32")

    def find_answers(self) -> None:
        """The route is as it was."""
        self._there("route", "del", "blackhole", f"{self.near}/32")

    def slow_down(self, bits_per_s: int) -> None:
        """Lets what the other host sends pass at this rate; a full queue of 400 ms drops packets."""
        shape = ("tbf", "rate", str(bits_per_s), "burst", "32kbit", "latency", "400ms")
        _run("ip", "netns", "exec", self.name, "tc", "qdisc", "add", "dev", self.name, "root", *shape)

    def _there(self, *arguments: str) -> None:
        _run("ip", "-n", self.name, *arguments)


@contextlib.contextmanager
def other_host(directory: Path, python: Path) -> Iterator[Host]:
    """A host with a cable to this machine; processes that were started on it have to end before the block does."""
    if shutil.which("ip") is None:
        pytest.skip("ip is not installed")
    name = f"sh{uuid.uuid4().hex[:8]}"
    net = f"{NETWORK}.{random.randrange(256)}"
    first = 4 * random.randrange(64)
    wrapper = directory / f"{name}-python"
    host = Host(name=name, near=f"{net}.{first + 1}", far=f"{net}.{first + 2}", python=wrapper)
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip("making a network namespace" + NOT_ALLOWED)
    try:
        cable = subprocess.run(
            ["ip", "link", "add", f"{name}n", "type", "veth", "peer", "name", name, "netns", name],
            capture_output=True,
            check=False,
        )
        if cable.returncode:
            pytest.skip("making a veth pair" + NOT_ALLOWED)
        _run("ip", "address", "add", f"{host.near}/30", "dev", f"{name}n")
        _run("ip", "link", "set", f"{name}n", "up")
        _run("ip", "-n", name, "address", "add", f"{host.far}/30", "dev", name)
        _run("ip", "-n", name, "link", "set", name, "up")
        _run("ip", "-n", name, "link", "set", "lo", "up")
        wrapper.write_text(f'#!/bin/sh\nexec ip netns exec {name} {python} "$@"\n')
        wrapper.chmod(0o755)
        yield host
    finally:
        # The cable ends with the namespace.
        _run("ip", "netns", "delete", name)


def _run(*command: str) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"}
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
