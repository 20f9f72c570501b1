"""Digests of all that decides what a dataset's examples are: its bytes, the tokenizer, the settings, and the code that encodes."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import stillhouse
from stillhouse.protos.files.atomic import write_atomic
from stillhouse.protos.rows.reading.plugins import plugin_of
from stillhouse.protos.rows.reading.source import RowSource, files_of
from stillhouse.student_trainer.config.schema import DatasetConfig
from stillhouse.student_trainer.prepared_store import CONTENTS
from stillhouse.student_trainer.train.data.chat.mask import Learned
from stillhouse.student_trainer.train.data.prepared.settings import ExampleSettings

FORMAT = 2
"""Version of the columns and of the manifest."""
_READ_BYTES = 1 << 22
_SETTLED_S = 3.0
"""Age of a file's last change from which its times would tell of another one, also on disks with whole seconds."""
_CODE = (
    "protos/rows",
    "protos/tokenizers",
    "protos/cache",
    "student_trainer/train/data",
    "student_trainer/config/rules",
)
_LIBRARIES = ("tokenizers", "transformers", "jinja2", "pyarrow", "datasets")
_ELSEWHERE = ("train", "eval", "eval_fraction", "seed", "packing", "date")
"""Fields of `data` that do not decide how one dataset is encoded, or are added to a digest where they do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """The content of a file."""

    digest: str
    num_lines: int


def read_content(path: Path, folder: Path) -> Content:
    """Hashes a file, unless `folder` tells its hash and the file has not changed since: same inode, size and times.

    A file that changed a moment ago is not remembered, since a further change might leave its times as they are.
    """
    memory = folder / CONTENTS / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.json"
    began = time.time()
    stamp = _stamp(path)
    try:
        told = json.loads(memory.read_bytes())
        if told["stamp"] == stamp:
            return Content(digest=str(told["digest"]), num_lines=int(told["num_lines"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    digest, num_lines, last = hashlib.blake2b(digest_size=20), 0, b"\n"
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
            num_lines += data.count(b"\n")
            last = data[-1:]
    content = Content(digest=digest.hexdigest(), num_lines=num_lines + (last != b"\n"))
    if stamp == _stamp(path) and began - max(stamp[-2:]) / 1e9 > _SETTLED_S:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(memory, json.dumps({"stamp": stamp, **dataclasses.asdict(content)}).encode())
    return content


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetContent:
    """The files of a dataset."""

    digest: str
    num_rows: int | None
    """Lines of a file of lines, or rows of a table; None if that is unknown before it is read."""


def dataset_content(source: RowSource, folder: Path) -> DatasetContent | None:
    """Hashes the files of a source; None if it has none: rows from elsewhere, which may be others each time.

    None also for files that cannot be read: their reader has the error.
    """
    path = Path(source.location)
    if plugin_of(source.location) is not None:
        return None
    try:
        if path.is_dir():
            files = sorted(each for each in path.rglob("*") if each.is_file())
        else:
            files = [each for each in files_of(path) if each.is_file()]
        contents = [(each, read_content(each, folder)) for each in files]
    except OSError:
        return None
    if not contents:
        return None
    return DatasetContent(
        digest=_digest([(str(each), content.digest) for each, content in contents]),
        num_rows=None if path.is_dir() else _num_rows(*contents[0]),
    )


def encoding_digest(
    dataset: DatasetConfig,
    location: str,
    content: str,
    *,
    tokenizer: str,
    settings: ExampleSettings,
    learned: Learned,
) -> str:
    """Digest of the examples of one dataset at `location`, but for a date in them; `tokenizer` is its digest.

    `learned` is what the rows before have told.
    """
    data = dataclasses.asdict(settings.data)
    source = dataclasses.asdict(dataset)
    del source["weight"]
    return _digest(
        {
            "format": FORMAT,
            "code": _code_digest(),
            "location": location,
            "source": source,
            "content": content,
            "tokenizer": tokenizer,
            "settings": {name: value for name, value in data.items() if name not in _ELSEWHERE},
            "teachers": settings.teachers,
            "prompts": [
                (number, each.name, dataclasses.asdict(each.prompt))
                for number, each in enumerate(settings.prompted)
                if each.prompt is not None
            ],
            "learned": [
                learned.marks,
                [[source, dataclasses.astuple(ends)] for source, ends in learned.turn_ends],
            ],
        }
    )


def dated(digest: str, date: str) -> str:
    """Digest of the same examples where a template wrote the date into them."""
    return _digest([digest, date])


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of all that a fast tokenizer of transformers encodes and renders by."""
    added = {number: (str(token), token.special) for number, token in tokenizer.added_tokens_decoder.items()}
    return _digest(
        {
            "class": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
            "backend": tokenizer.backend_tokenizer.to_str(),
            "roles": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "special": [str(each) for each in tokenizer.all_special_tokens],
            "added": added,
            "template": tokenizer.chat_template,
            "splits_special": bool(getattr(tokenizer, "split_special_tokens", False)),
        }
    )


def _num_rows(path: Path, content: Content) -> int | None:
    """Returns the rows of a file as far as they can be told before they are read: those of a table, or its lines."""
    with path.open("rb") as file:
        head = file.read(4)
    if head == b"PAR1":
        import pyarrow
        import pyarrow.parquet

        try:
            return int(pyarrow.parquet.read_metadata(path).num_rows)
        except (pyarrow.ArrowException, OSError):
            return None
    is_packed = head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"["))
    return None if is_packed else content.num_lines


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


@cache
def _code_digest() -> str:
    """Digest of the code and of the libraries that encode, so that an upgrade of either prepares anew."""
    root = Path(stillhouse.__file__).parent
    files = sorted(path for folder in _CODE for path in (root / folder).rglob("*.py"))
    texts = [(str(path.relative_to(root)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    return _digest([texts, [importlib.metadata.version(name) for name in _LIBRARIES]])


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
