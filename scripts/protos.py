"""Generates the stubs, and checks contract and stubs: `protos.py generate | drift | lint`, at the root, with grpcio-tools.

The tools live in an environment of their own, because their protobuf must be older than the services'.
"""

import argparse
import difflib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONTRACT = Path("protos/stillhouse/v1")
BUF = "@bufbuild/buf@1.75.0"
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")
# These files declare no service.
WITHOUT_SERVICE = ("tensor",)


def main() -> int:
    """Does what the command line asks, and returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=("generate", "drift", "lint"))
    command = parser.parse_args().command
    if command == "generate":
        generate(ROOT)
        return 0
    return drift() if command == "drift" else lint()


def generate(out: Path) -> None:
    """Writes the stubs of every .proto file below `out`."""
    tools = Path(sysconfig.get_path("scripts"))
    plugins = [f"--plugin={name}={tools / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    outputs = [f"--{kind}_out={out}" for kind in ("python", "grpc_python")]
    outputs += [f"--{kind}_out=quiet:{out}" for kind in ("mypy", "mypy_grpc")]
    protoc(*plugins, *outputs)
    for name in WITHOUT_SERVICE:
        for suffix in ("py", "pyi"):
            (out / CONTRACT / f"{name}_pb2_grpc.{suffix}").unlink(missing_ok=True)
    for path in stub_paths(out):
        path.write_text(as_part_of_the_package(path.read_text(encoding="utf-8")), encoding="utf-8")


def as_part_of_the_package(text: str) -> str:
    """A stub that imports its neighbours as `stillhouse.protos`, while descriptors keep the names of their files."""
    text = text.replace("from protos.stillhouse.v1 import", "from stillhouse.protos.stillhouse.v1 import")
    return text.replace("'protos.stillhouse.v1.", "'stillhouse.protos.stillhouse.v1.")


def drift() -> int:
    """1, with a diff, if the committed stubs are not those of the .proto files."""
    with tempfile.TemporaryDirectory() as directory:
        fresh = Path(directory)
        generate(fresh)
        wanted, found = stubs(fresh), stubs(ROOT)
    for name in sorted(wanted.keys() | found.keys()):
        before, after = found.get(name, ""), wanted.get(name, "")
        diff = difflib.unified_diff(
            before.splitlines(), after.splitlines(), f"committed/{name}", f"generated/{name}", lineterm=""
        )
        sys.stdout.writelines(f"{line}\n" for line in diff)
    if wanted == found:
        return 0
    sys.stderr.write(
        "The committed stubs are not those of the .proto files; run `make protos` and commit the result.\n"
    )
    return 1


def stubs(root: Path) -> dict[str, str]:
    """Name to text of every generated file below `root`."""
    return {path.name: path.read_text(encoding="utf-8") for path in stub_paths(root)}


def stub_paths(root: Path) -> set[Path]:
    """Every generated file below `root`."""
    return {path for pattern in GENERATED for path in (root / CONTRACT).glob(pattern)}


def lint() -> int:
    """The exit status of buf, or 0 with a note where there is no buf: tests/protos walks the contract as well."""
    buf = find_buf()
    if buf is None:
        sys.stdout.write(f"buf lint was left out: there is neither buf nor an npx that can fetch {BUF}.\n")
        return 0
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory) / "image.binpb"
        protoc("--include_imports", "--include_source_info", f"--descriptor_set_out={image}")
        lint_command = [*buf, "lint", str(image), "--path", "protos", "--config", "buf.yaml"]
        return subprocess.run(lint_command, cwd=ROOT, check=False).returncode


def find_buf() -> list[str] | None:
    """Command that starts buf, if there is one."""
    patience = {**os.environ, "npm_config_fetch_retries": "0", "npm_config_update_notifier": "false"}
    for command in (["buf"], ["npx", "--yes", BUF]):
        if shutil.which(command[0]) is None:
            continue
        probe = subprocess.run(
            [*command, "--version"], cwd=ROOT, env=patience, capture_output=True, check=False
        )
        if probe.returncode == 0:
            return command
    return None


def protoc(*arguments: str) -> None:
    """Runs protoc on every .proto file of the contract."""
    include = sysconfig.get_path("purelib")  # googleapis-common-protos lies there
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / CONTRACT).glob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"-I{include}", *arguments, *files]
    subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main())
