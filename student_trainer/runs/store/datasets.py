"""Uploaded datasets in the store: files by content, and the versions of each id that name them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, RowMapping, Select, delete, func, insert, select, update

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.run_pb2 import Dataset
from stillhouse.student_trainer.runs.store.database import transaction
from stillhouse.student_trainer.runs.store.queries import now_us
from stillhouse.student_trainer.runs.store.run_state import ENDED, RESUMABLE
from stillhouse.student_trainer.runs.store.schema import dataset_versions, datasets, runs

FOLDER = "datasets/"
SHA256 = re.compile(r"[0-9a-f]{64}")
DATASET_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_REFERENCE = re.compile(rf"({DATASET_ID.pattern})(?:@([1-9][0-9]{{0,8}}))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A dataset as a spec or a request names it."""

    dataset_id: str
    """Id, or the SHA-256 of the content."""
    version: int | None
    """None means the newest one; 0 is that of a content without an id."""

    @classmethod
    def parse(cls, name: str) -> Reference | None:
        """Parses `datasets/{id}`, `datasets/{id}@{version}` or `datasets/{sha256}`; None for anything else."""
        if not name.startswith(FOLDER):
            return None
        found = _REFERENCE.fullmatch(name, len(FOLDER))
        if found is None:
            return cls(dataset_id=name[len(FOLDER) :], version=0) if is_digest(name[len(FOLDER) :]) else None
        if is_digest(found[1]):
            return cls(dataset_id=found[1], version=0) if found[2] is None else None
        return cls(dataset_id=found[1], version=int(found[2]) if found[2] else None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Upload:
    """A stored file, and what its client said about it."""

    sha256: str
    suffix: str
    file_name: str
    size_bytes: int
    dataset_id: str = ""
    """Empty names it by its content."""
    num_rows: int = 0
    num_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredDataset:
    """A dataset that a spec names, pinned."""

    name: str
    """`datasets/{id}@{version}` or `datasets/{sha256}`."""
    sha256: str
    suffix: str

    @property
    def file(self) -> str:
        """Its path below the data directory."""
        return f"{FOLDER}{self.sha256}{self.suffix}"


def is_digest(text: str) -> bool:
    """Returns True for a SHA-256 in hexadecimal."""
    return SHA256.fullmatch(text) is not None


class DatasetStore:
    """Datasets of the store; methods block and raise as those of Store do."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, upload: Upload, *, owner: str = "") -> Dataset:
        """Adds a file, whose first upload sets the suffix, and returns the version that it is now.

        The content of an id's newest version is that version; it gets the number of tokens if its owner has counted them by now.
        """
        values = {
            "sha256": upload.sha256,
            "suffix": upload.suffix,
            "file_name": upload.file_name,
            "size_bytes": upload.size_bytes,
            "create_us": now_us(),
        }
        with transaction(self._engine) as db:
            if _suffix_of(db, upload.sha256) is None:
                db.execute(insert(datasets).values(**values))
            newest = _find(db, _versions_of(upload.dataset_id or upload.sha256))
            if newest is None or newest["sha256"] != upload.sha256:
                newest = self._add_version(db, upload, owner)
            elif newest["owner"] == owner and upload.num_tokens and not newest["num_tokens"]:
                this = dataset_versions.c.number == newest["number"]
                db.execute(update(dataset_versions).where(this).values(num_tokens=upload.num_tokens))
                newest = _require(db, Reference(dataset_id=newest["dataset_id"], version=newest["version"]))
            return _to_message(newest)

    def _add_version(self, db: Connection, upload: Upload, owner: str) -> RowMapping:
        given = dataset_versions.c.dataset_id == upload.dataset_id
        taken = db.execute(select(func.max(dataset_versions.c.version)).where(given)).scalar_one()
        values = {
            "dataset_id": upload.dataset_id or upload.sha256,
            "version": (taken or 0) + 1 if upload.dataset_id else 0,
            "sha256": upload.sha256,
            "file_name": upload.file_name,
            "num_rows": upload.num_rows,
            "num_tokens": upload.num_tokens,
            "owner": owner,
            "create_us": now_us(),
        }
        db.execute(insert(dataset_versions).values(**values))
        return _require(db, Reference(dataset_id=str(values["dataset_id"]), version=int(values["version"])))

    def suffix_of(self, sha256: str) -> str | None:
        """Returns the suffix of a stored file; None for content that no dataset has."""
        with transaction(self._engine) as db:
            return _suffix_of(db, sha256)

    def has_file(self, sha256: str) -> bool:
        """Returns True for content that a dataset has."""
        return self.suffix_of(sha256) is not None

    def owners(self, dataset_id: str) -> set[str]:
        """Clients that uploaded versions of an id."""
        query = _versions_of(dataset_id).with_only_columns(dataset_versions.c.owner)
        with transaction(self._engine) as db:
            return set(db.execute(query).scalars())

    def find(self, name: str) -> StoredDataset | None:
        """Finds the dataset that a spec names; None if there is none."""
        reference = Reference.parse(name)
        if reference is None:
            return None
        with transaction(self._engine) as db:
            if reference.version == 0:
                # The content of a version may be named by its digest as well.
                query = select(datasets).where(datasets.c.sha256 == reference.dataset_id)
                row = db.execute(query).mappings().one_or_none()
            else:
                row = _find(db, _versions_of(reference.dataset_id, reference.version))
            if row is None:
                return None
            pinned = name if reference.version == 0 else _name(row)
            return StoredDataset(name=pinned, sha256=row["sha256"], suffix=row["suffix"])

    def get(self, reference: Reference) -> Dataset:
        """Returns a dataset with its live runs. Raises StillhouseError(DATASET_NOT_FOUND)."""
        with transaction(self._engine) as db:
            row = _require(db, reference)
            return _to_message(row, live_runs=_live_runs(db, row["sha256"]))

    def page(self, dataset_id: str, *, before: int | None, limit: int) -> tuple[list[Dataset], int | None]:
        """At most `limit` datasets, newest first, older than number `before`, of one id if it is not empty; and the number
        to continue from, if there are more."""
        query = _select().order_by(dataset_versions.c.number.desc()).limit(limit + 1)
        if dataset_id:
            query = query.where(dataset_versions.c.dataset_id == dataset_id)
        if before is not None:
            query = query.where(dataset_versions.c.number < before)
        with transaction(self._engine) as db:
            found = db.execute(query).mappings().all()
        shown = [_to_message(row) for row in found[:limit]]
        return shown, int(found[limit - 1]["number"]) if len(found) > limit else None

    def delete(self, reference: Reference) -> None:
        """Deletes a dataset, and the row of its file if no other has the same content.

        Raises StillhouseError: DATASET_NOT_FOUND; DATASET_IN_USE if a run uses it that has not ended, or can be resumed.
        """
        with transaction(self._engine) as db:
            row = _require(db, reference)
            used_by = _live_runs(db, row["sha256"])
            if used_by:
                raise StillhouseError(
                    Reason.DATASET_IN_USE,
                    f"{_name(row)} is used by {_some(used_by)}; wait until they are completed, or delete those that are not "
                    "resumed any more with `stillhouse run delete`.",
                    resource=_name(row),
                )
            this = dataset_versions.c.number == row["number"]
            if row["version"]:
                db.execute(update(dataset_versions).where(this).values(delete_us=now_us()))
            else:
                db.execute(delete(dataset_versions).where(this))
            if _find(db, _select().where(dataset_versions.c.sha256 == row["sha256"])) is None:
                db.execute(delete(datasets).where(datasets.c.sha256 == row["sha256"]))


def require_files(db: Connection, stored: Sequence[StoredDataset]) -> None:
    """Checks that no dataset was deleted since it was found. Raises StillhouseError(DATASET_NOT_FOUND)."""
    for each in stored:
        if db.execute(select(datasets.c.sha256).where(datasets.c.sha256 == each.sha256)).first() is None:
            raise _not_found(each.name)


def _select() -> Select[tuple[object, ...]]:
    """Selects the datasets that are not deleted, with their files."""
    columns = (*dataset_versions.c, datasets.c.suffix, datasets.c.size_bytes)
    return (
        select(*columns)
        .join(datasets, datasets.c.sha256 == dataset_versions.c.sha256)
        .where(dataset_versions.c.delete_us.is_(None))
    )


def _versions_of(dataset_id: str, version: int | None = None) -> Select[tuple[object, ...]]:
    query = _select().where(dataset_versions.c.dataset_id == dataset_id)
    return query if version is None else query.where(dataset_versions.c.version == version)


def _find(db: Connection, query: Select[tuple[object, ...]]) -> RowMapping | None:
    """The newest of the datasets that a query selects."""
    return db.execute(query.order_by(dataset_versions.c.number.desc()).limit(1)).mappings().one_or_none()


def _require(db: Connection, reference: Reference) -> RowMapping:
    row = _find(db, _versions_of(reference.dataset_id, reference.version))
    if row is None:
        at = f"@{reference.version}" if reference.version else ""
        raise _not_found(f"{FOLDER}{reference.dataset_id}{at}")
    return row


def _not_found(name: str) -> StillhouseError:
    return StillhouseError(
        Reason.DATASET_NOT_FOUND,
        f"There is no dataset {name}; `stillhouse data list` shows all.",
        resource=name,
    )


def _suffix_of(db: Connection, sha256: str) -> str | None:
    return db.execute(select(datasets.c.suffix).where(datasets.c.sha256 == sha256)).scalar_one_or_none()


def _live_runs(db: Connection, sha256: str) -> list[str]:
    """Names of the runs that read a file or would if they were resumed: their effective specs hold its path."""
    query = select(runs.c.id, runs.c.effective_spec).where(runs.c.state.not_in(sorted(ENDED - RESUMABLE)))
    return [f"runs/{run_id}" for run_id, spec in db.execute(query) if sha256.encode() in spec]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _name(row: RowMapping) -> str:
    return f"{FOLDER}{row['dataset_id']}" + (f"@{row['version']}" if row["version"] else "")


def _to_message(row: RowMapping, *, live_runs: Sequence[str] = ()) -> Dataset:
    message = Dataset(
        name=_name(row),
        sha256=row["sha256"],
        file_name=row["file_name"],
        size_bytes=row["size_bytes"],
        num_rows=row["num_rows"],
        num_tokens=row["num_tokens"],
        owner=row["owner"],
        live_runs=live_runs,
    )
    message.create_time.FromMicroseconds(row["create_us"])
    return message
