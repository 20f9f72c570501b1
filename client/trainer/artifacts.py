"""Downloads artifacts of a run: resumable, checked by SHA-256, atomic."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from stillhouse.client.core.connection import resumed
from stillhouse.client.core.errors import file_errors
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.adapter import CONFIG, base_beside, name_base
from stillhouse.protos.stillhouse.v1 import run_pb2

Download = Callable[[str, int], Iterator[run_pb2.DownloadArtifactResponse]]
"""Yields the file at a path from a byte offset on."""
OnFile = Callable[[str, int, int], None]
"""Called with path, bytes received and size of the file."""

PART_SUFFIX = ".part"
_READ_BYTES = 1 << 20
_CHECKPOINT = re.compile(r"checkpoints/\d+")
_MODEL_CONFIGS = ("config.json", "adapter_config.json")
_TRAINING_STATE = ("weights.safetensors", "optimizer.pt", "state.json", "MANIFEST.json")
"""Files of a checkpoint that only a resume needs; the optimizer's are twice as large as the model."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")


def pull(
    run: str,
    artifacts: Sequence[run_pb2.Artifact],
    download: Download,
    what: str,
    to: Path | str | None,
    *,
    on_file: OnFile | None,
) -> list[Path]:
    """Downloads those `artifacts` of `run` that `what` names; see RunHandle.pull."""
    what = "/".join(part for part in what.split("/") if part not in ("", "."))
    wanted = [each for each in artifacts if each.path == what or each.path.startswith(what + "/") or not what]
    if not wanted:
        tops = sorted({_top(each.path) for each in artifacts})
        has = f"it has: {', '.join(tops)}" if tops else "it has none yet"
        raise StillhouseError(
            Reason.ARTIFACT_NOT_FOUND, f'run {run} has no artifact "{what}"; {has}.', resource=what
        )
    target = Path(to) if to else Path(run, what)
    if wanted[0].path == what and not (target.is_dir() or str(to).endswith("/")):
        _below(what, what)  # refuses a name that leaves the default directory
        targets = [(wanted[0], target)]
    else:
        wanted = _without_training_state(wanted, what)
        targets = [(each, target / _below(each.path, what)) for each in wanted]
    for artifact, path in targets:
        _fetch(download, artifact, path, on_file or (lambda *_: None))
    for _, path in targets:
        if path.name == CONFIG and base_beside(path.parent) is not None:
            _name_base(path)
    return [path for _, path in targets]


def _name_base(config: Path) -> None:
    """Lets an adapter's configuration name the base beside it by its path on this machine."""
    try:
        with file_errors("write", config):
            name_base(config.parent, config.parent)
    except (ValueError, TypeError) as error:
        raise StillhouseError(
            Reason.CHECKPOINT_CORRUPT,
            f"{config} is not the configuration of an adapter ({error}); pull it again.",
        ) from error


def _without_training_state(artifacts: Sequence[run_pb2.Artifact], what: str) -> list[run_pb2.Artifact]:
    """Leaves out what only a resume needs, but for a file that `what` names; an older version's checkpoint holds no model."""
    folders = [each.path.rpartition("/") for each in artifacts]
    models = {
        folder for folder, _, name in folders if name in _MODEL_CONFIGS and _CHECKPOINT.fullmatch(folder)
    }
    return [
        each
        for each, (folder, _, name) in zip(artifacts, folders, strict=True)
        if each.path == what or folder not in models or name not in _TRAINING_STATE
    ]


def _top(path: str) -> str:
    parts = path.split("/")
    return "/".join(parts[:2]) if parts[0] == "checkpoints" else parts[0]


def _below(path: str, what: str) -> PurePosixPath:
    """Returns `path` relative to the directory of `what`. The path comes from the network."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or _CONTROL.search(path):
        raise StillhouseError(
            Reason.PATH_NOT_ALLOWED,
            f"the trainer offers a file named {path!a}, which leaves the directory; refused.",
        )
    return PurePosixPath(pure.name) if path == what else pure.relative_to(what or ".")


def _fetch(download: Download, artifact: run_pb2.Artifact, path: Path, on_file: OnFile) -> None:
    with file_errors("write", path):
        if _is_same(path, artifact):
            on_file(artifact.path, artifact.size_bytes, artifact.size_bytes)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + PART_SUFFIX)
        resumes = part.is_file()
        if not _download(download, artifact, part, on_file):
            part.unlink()
            # The partial file may belong to another file of that name; only then can a second attempt succeed.
            if not resumes or not _download(download, artifact, part, on_file):
                part.unlink(missing_ok=True)
                raise StillhouseError(
                    Reason.CHECKPOINT_CORRUPT,
                    f"{artifact.path} arrived with another SHA-256 than the trainer stated; nothing was kept. "
                    "Pull again; if it fails again, the file is damaged on the trainer's host.",
                )
        part.replace(path)


def _is_same(path: Path, artifact: run_pb2.Artifact) -> bool:
    has_size = path.is_file() and path.stat().st_size == artifact.size_bytes
    return has_size and _sha256(path).hexdigest() == artifact.sha256


def _download(download: Download, artifact: run_pb2.Artifact, part: Path, on_file: OnFile) -> bool:
    """Returns True once `part` is complete and its SHA-256 is right."""
    digest = _sha256(part) if part.is_file() else hashlib.sha256()
    size = part.stat().st_size if part.is_file() else 0
    if size > artifact.size_bytes:
        return False
    stated = artifact.sha256
    with part.open("ab") as file:

        def open_stream() -> Iterator[run_pb2.DownloadArtifactResponse]:
            return download(artifact.path, size)

        for chunk in resumed(open_stream):
            size += len(chunk.data)
            if size > artifact.size_bytes:
                return False
            digest.update(chunk.data)
            file.write(chunk.data)
            stated = chunk.sha256 or stated
            on_file(artifact.path, size, artifact.size_bytes)
    return size == artifact.size_bytes and digest.hexdigest() == stated


def _sha256(path: Path) -> hashlib._Hash:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
    return digest
