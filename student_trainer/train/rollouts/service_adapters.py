"""The student's adapters in one rollout service: each version under a name of its own, loaded for as long as a call writes with it.

A version is loaded while the service still writes with the one before, where it has a slot for both.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, cast

import grpc
import structlog

from stillhouse.protos.errors import Reason, from_rpc_error
from stillhouse.protos.files.adapter import upload_requests
from stillhouse.protos.rpc.channel import is_loopback
from stillhouse.protos.stillhouse.v1.teacher_pb2 import (
    GetTeacherInfoResponse,
    LoadAdapterRequest,
    UnloadAdapterRequest,
)
from stillhouse.protos.stillhouse.v1.teacher_pb2_grpc import TeacherServiceStub
from stillhouse.student_trainer.train.process import failpoints
from stillhouse.student_trainer.train.rollouts.adapter_files import content_digest
from stillhouse.student_trainer.train.teacher.endpoints import INFO_TIMEOUT_S

log = structlog.get_logger()

Response = TypeVar("Response")

OnCancel = Callable[[Callable[[], object]], None]
"""Gets the function that ends the call under way."""
LOAD_TIMEOUT_S = 600.0
_UNREADABLE = frozenset({Reason.PATH_NOT_ALLOWED, Reason.ADAPTER_INVALID})
"""Reasons of a service that cannot, or may not, read a path of this machine."""


class ServiceAdapters:
    """Adapters of one run in one service; used by several calls at once."""

    def __init__(self, target: str, run_name: str) -> None:
        """`run_name` begins the adapters' names."""
        self._target = target
        self._run_name = run_name
        self._changed = threading.Condition()
        """Held during every change; notified when a call no longer needs its adapter."""
        self._users: dict[str, int] = {}
        """Calls that write with each loaded adapter, by its name."""
        self._newest = ""
        self._reads_our_files = is_loopback(target)

    @contextmanager
    def use(
        self, stub: TeacherServiceStub, files: Path, version: int, on_cancel: OnCancel
    ) -> Iterator[tuple[str, str]]:
        """Keeps an adapter loaded inside the block; yields its name and fingerprint.

        `on_cancel` gets the function that ends the call which loads it: other users of this object wait for it. Raises
        StillhouseError, or grpc.RpcError.
        """
        with self._changed:
            name, fingerprint = self._load(stub, files, version, on_cancel)
            self._users[name] += 1
            self._newest = name
        try:
            yield name, fingerprint
        finally:
            with self._changed:
                self._users[name] -= 1
                self._changed.notify_all()
                self.unload_unused(lambda: stub, but=self._newest)

    def unload_unused(self, stub: Callable[[], TeacherServiceStub], *, but: str = "") -> None:
        """Frees the slots of the adapters that no call writes with, if there are any, except of one."""
        with self._changed:
            for name in [name for name, number in self._users.items() if not number and name != but]:
                self._unload(stub(), name)
                del self._users[name]

    def unload_leftovers(self, stub: TeacherServiceStub, info: GetTeacherInfoResponse) -> None:
        """Unloads what a killed attempt of this run has left in the service."""
        for each in info.adapters:
            if each.name.startswith(f"{self._run_name}/"):
                self._unload(stub, each.name)

    def _load(
        self, stub: TeacherServiceStub, files: Path, version: int, on_cancel: OnCancel
    ) -> tuple[str, str]:
        """Loads an adapter; returns its name and fingerprint.

        A service on this machine reads the files where they are, unless it may not; any other one gets them sent.
        """
        if self._reads_our_files:
            name = f"{self._run_name}/{version}-{content_digest(files)[:12]}"
            try:
                return name, self._load_path(stub, name, str(files), on_cancel)
            except grpc.RpcError as error:
                said = from_rpc_error(error, target=self._target, service="teacher")
                if said.reason not in _UNREADABLE:
                    raise
                self._reads_our_files = False
                log.info("adapters are sent to the rollout service", target=self._target, why=said.message)
        stored = _result(stub.UploadAdapter.future(upload_requests(files), timeout=LOAD_TIMEOUT_S), on_cancel)
        name = f"{self._run_name}/{version}-{stored.fingerprint[:12]}"
        self._load_path(stub, name, stored.path, on_cancel)
        return name, stored.fingerprint

    def _load_path(self, stub: TeacherServiceStub, name: str, path: str, on_cancel: OnCancel) -> str:
        """Loads the files at `path` of the service; returns their fingerprint."""
        request = LoadAdapterRequest(adapter=name, path=path)
        while True:
            try:
                loaded = _result(stub.LoadAdapter.future(request, timeout=LOAD_TIMEOUT_S), on_cancel)
                break
            except grpc.RpcError as error:
                said = from_rpc_error(error, target=self._target, service="teacher")
                if said.reason is not Reason.ADAPTER_SLOTS or not self._users:
                    raise
            # A service with one slot: the call that writes in it ends first.
            self._changed.wait_for(lambda: not all(self._users.values()))
            self.unload_unused(lambda: stub)
        self._users.setdefault(name, 0)
        failpoints.reach("rollouts.after_load")
        return str(loaded.adapter.fingerprint)

    def _unload(self, stub: TeacherServiceStub, name: str) -> None:
        try:
            stub.UnloadAdapter(UnloadAdapterRequest(adapter=name), timeout=INFO_TIMEOUT_S)
        except grpc.RpcError as error:  # a service that was restarted has forgotten it
            log.warning("an adapter was not unloaded", adapter=name, why=str(error.code()))


def _result(call: grpc.Future[Response], on_cancel: OnCancel) -> Response:
    """The response of a call that `on_cancel` can end. Raises grpc.RpcError, of an ended call too."""
    on_cancel(call.cancel)
    try:
        return call.result()
    except grpc.FutureCancelledError:
        raise cast("grpc.RpcError", call) from None
