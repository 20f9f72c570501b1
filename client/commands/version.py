"""`stillhouse version`."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

from stillhouse.client.terminal.session import Session, command


@command()
def version(session: Session) -> None:
    """Show the version of this client."""
    try:
        number = installed_version("stillhouse")
    except PackageNotFoundError:
        number = "not installed"
    python = platform.python_version()
    session.show(
        {"version": number, "contract": "stillhouse.v1", "python": python},
        f"stillhouse {number} (contract stillhouse.v1, Python {python})",
    )
