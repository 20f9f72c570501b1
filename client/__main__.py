"""Runs the command line: `stillhouse`, or `python -m stillhouse.client`."""

from __future__ import annotations

from stillhouse.client.cli import cli


def main() -> None:
    """Runs the command line and exits with its code."""
    cli(prog_name="stillhouse")


if __name__ == "__main__":
    main()
