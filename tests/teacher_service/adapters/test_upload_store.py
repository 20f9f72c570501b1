"""Uploads: stored complete, checked and by content, or not at all; in bounded disk space."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.teacher_pb2 import UploadAdapterRequest
from stillhouse.teacher_service.adapters.upload_store import KEPT_UPLOADS, UploadStore, move_once
from stillhouse.teacher_service.models.fingerprint import adapter_fingerprint
from tests.conftest import Models
from tests.support.small_models import make_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def chunks(directory: Path, size: int = 1000) -> list[UploadAdapterRequest]:
    requests = []
    for name in (CONFIG, WEIGHTS):
        data = (directory / name).read_bytes()
        requests.append(UploadAdapterRequest(file_name=name, sha256=hashlib.sha256(data).hexdigest()))
        requests += [
            UploadAdapterRequest(data=data[begin : begin + size]) for begin in range(0, len(data), size)
        ]
    return requests


async def stream(requests: Iterable[UploadAdapterRequest]) -> AsyncIterator[UploadAdapterRequest]:
    for request in requests:
        yield request


async def receive(spool: UploadStore, requests: Iterable[UploadAdapterRequest], *in_use: Path) -> Path:
    path, _ = await spool.receive(stream(requests), in_use=in_use)
    return path


async def test_an_upload_is_kept_by_content(models: Models, tmp_path: Path) -> None:
    spool = UploadStore(tmp_path / "spool", max_bytes=1 << 20)
    path, fingerprint = await spool.receive(stream(chunks(models.adapter_a)), in_use=())
    assert fingerprint == adapter_fingerprint(models.adapter_a)
    for name in (CONFIG, WEIGHTS):
        assert (path / name).read_bytes() == (models.adapter_a / name).read_bytes()
    assert await receive(spool, chunks(models.adapter_a, size=77_777)) == path
    assert await receive(spool, chunks(models.adapter_b)) != path
    assert len(list(spool.directory.iterdir())) == 2


async def test_an_incomplete_upload_leaves_nothing(models: Models, tmp_path: Path) -> None:
    spool = UploadStore(tmp_path / "spool", max_bytes=1 << 20)
    good = chunks(models.adapter_a)
    damaged = [*good[:-1], UploadAdapterRequest(data=bytes(len(good[-1].data)))]
    outside = [UploadAdapterRequest(file_name="../x", data=b"1")]
    twice = [*good, *good]
    code = [*good, UploadAdapterRequest(file_name="modeling.py", data=b"1")]
    no_weights = [
        UploadAdapterRequest(file_name=CONFIG, data=b"{}"),
        UploadAdapterRequest(file_name=WEIGHTS, data=b"no weights"),
    ]
    for bad in ([], good[1:], good[:-1], good[:2], damaged, outside, twice, code, no_weights):
        with pytest.raises(StillhouseError) as caught:
            await receive(spool, bad)
        assert caught.value.reason == Reason.ADAPTER_INVALID, caught.value.message
        assert list(spool.directory.iterdir()) == []


async def test_an_aborted_upload_leaves_nothing(models: Models, tmp_path: Path) -> None:
    spool = UploadStore(tmp_path / "spool", max_bytes=1 << 20)

    async def broken() -> AsyncIterator[UploadAdapterRequest]:
        for request in chunks(models.adapter_a)[:5]:
            yield request
        raise ConnectionResetError

    with pytest.raises(StillhouseError, match="cannot write") as caught:
        await spool.receive(broken(), in_use=())
    assert caught.value.reason == Reason.INVALID_CONFIG
    assert list(spool.directory.iterdir()) == []


async def test_uploads_and_their_store_are_bounded(models: Models, tmp_path: Path) -> None:
    size = sum((models.adapter_b / name).stat().st_size for name in (CONFIG, WEIGHTS))
    with pytest.raises(StillhouseError, match="max-upload-bytes") as caught:
        await receive(UploadStore(tmp_path / "spool", max_bytes=size - 1), chunks(models.adapter_b))
    assert caught.value.reason == Reason.QUOTA
    with pytest.raises(StillhouseError, match="takes no uploads") as caught:
        await receive(UploadStore(tmp_path / "spool", max_bytes=0), chunks(models.adapter_b))
    assert caught.value.reason == Reason.CAPABILITY

    spool = UploadStore(tmp_path / "spool", max_bytes=size)
    kept = []
    for seed in range(KEPT_UPLOADS):
        made = make_adapter(tmp_path / f"adapter-{seed}", models.teacher, rank=8, seed=seed)
        kept.append(await receive(spool, chunks(made)))
        os.utime(kept[-1], (seed, seed))
    # The oldest is loaded, the second oldest makes room.
    last = await receive(spool, chunks(models.adapter_b), kept[0])
    assert set(spool.directory.iterdir()) == {kept[0], *kept[2:], last}
    more = make_adapter(tmp_path / "more", models.teacher, rank=8, seed=99)
    with pytest.raises(StillhouseError, match="Unload one") as caught:
        await receive(spool, chunks(more), kept[0], *kept[2:], last)
    assert caught.value.reason == Reason.QUOTA


def test_the_later_of_two_equal_uploads_leaves_the_files_of_the_first(tmp_path: Path) -> None:
    final = tmp_path / "final"
    for content in ("first", "second"):
        partial = tmp_path / content
        partial.mkdir()
        (partial / "file").write_text(content)
        move_once(partial, final)
    assert (final / "file").read_text() == "first"
    assert not (tmp_path / "first").exists()
    with pytest.raises(FileNotFoundError):
        move_once(tmp_path / "missing", tmp_path / "other")
