"""Writes or checks the generated references: `python -m scripts.reference generate | check`, at the root."""

import argparse
import difflib
import sys
from pathlib import Path

from scripts.reference import cli, contract, errors, metrics, run_file

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "client/runfile/run_schema.json": run_file.json_schema,
    "docs/reference/run-file.md": run_file.page,
    "docs/reference/cli.md": cli.page,
    "docs/reference/contract.md": contract.page,
    "docs/reference/metrics.md": metrics.page,
    "docs/reference/errors.md": errors.page,
}


def main() -> int:
    """Runs the command, and returns the exit status: 1 for stale files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=("generate", "check"))
    if parser.parse_args().command == "generate":
        for name, text in texts().items():
            (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
            (ROOT / name).write_text(text, encoding="utf-8")
        return 0
    stale = {name: diff(name, text) for name, text in texts().items()}
    sys.stdout.write("\n".join(line for lines in stale.values() for line in lines[:20]))
    if not any(stale.values()):
        return 0
    names = ", ".join(name for name, lines in stale.items() if lines)
    sys.stderr.write(f"\nThe code has changed since {names} were generated; run `make reference`.\n")
    return 1


def texts() -> dict[str, str]:
    """Fresh text of every generated file."""
    return {name: make() for name, make in FILES.items()}


def diff(name: str, fresh: str) -> list[str]:
    """Differences between a committed file and its fresh text."""
    path = ROOT / name
    found = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = difflib.unified_diff(
        found.splitlines(), fresh.splitlines(), f"committed/{name}", f"generated/{name}", lineterm=""
    )
    return list(lines)


if __name__ == "__main__":
    sys.exit(main())
