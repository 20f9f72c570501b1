"""The tables of the store; a change here needs a migration in migrations/versions, which a test compares."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    false,
)

# Constraints need names so that later migrations can drop them on every database.
metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)

runs = Table(
    "runs",
    metadata,
    # Grows with every run; the newest has the largest.
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("id", String(12), nullable=False, unique=True),
    Column("spec", LargeBinary, nullable=False),
    Column("effective_spec", LargeBinary, nullable=False),
    Column("created_by_version", String, nullable=False),
    Column("state", Integer, nullable=False, index=True),
    Column("condition", Integer, nullable=False, default=0),
    # Position in the queue while PENDING: smaller goes first.
    Column("queue_number", BigInteger, nullable=False),
    # Attempt that was the last when a person created or resumed the run; later ones are retries.
    Column("asked_attempt", Integer, nullable=False, default=0),
    Column("step", BigInteger, nullable=False, default=0),
    Column("total_steps", BigInteger, nullable=False, default=0),
    Column("trained_tokens", BigInteger, nullable=False, default=0),
    Column("tokens_per_second", Float, nullable=False, default=0.0),
    Column("latest_checkpoint", BigInteger),
    # google.rpc.Status.
    Column("error", LargeBinary),
    # Microseconds since the epoch.
    Column("create_us", BigInteger, nullable=False),
    Column("start_us", BigInteger),
    Column("end_us", BigInteger),
    # Sequence of the run's newest event.
    Column("last_sequence", BigInteger, nullable=False, default=0),
    # Bytes of the run directory's journals that are in the store.
    Column("events_offset", BigInteger, nullable=False, default=0),
    Column("metrics_offset", BigInteger, nullable=False, default=0),
    # Name of the token or certificate that submitted it; empty without authentication.
    Column("owner", String, nullable=False, default="", server_default=""),
    # Names of the uploaded datasets that it uses, pinned when it was created; a space between two.
    Column("datasets", String, nullable=False, default="", server_default=""),
    # True if it continues with half its micro-batch after running out of memory.
    Column("halved", Boolean, nullable=False, default=False, server_default=false()),
    # A MetricSeries of some points of its loss.
    Column("loss_curve", LargeBinary),
)

attempts = Table(
    "attempts",
    metadata,
    Column("run_id", ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    # Indices of its devices, such as "0,1"; empty for the CPU.
    Column("devices", String, nullable=False),
    Column("start_us", BigInteger, nullable=False),
    Column("end_us", BigInteger),
    Column("first_step", BigInteger, nullable=False, default=0),
    Column("last_step", BigInteger, nullable=False, default=0),
    Column("exit_code", Integer, nullable=False, default=0),
    Column("signal", Integer, nullable=False, default=0),
    # Outcome that the process reported: completed, stopped or failed.
    Column("outcome", String),
    Column("error", LargeBinary),
)

events = Table(
    "events",
    metadata,
    Column("run_id", ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
    # Counts from 1 without gaps.
    Column("sequence", BigInteger, primary_key=True),
    # "run" with a Run that leaves out both specs, or "metrics" with a MetricPoint.
    Column("kind", String, nullable=False),
    # Step of metrics.
    Column("step", BigInteger),
    Column("payload", LargeBinary, nullable=False),
)

metric_blocks = Table(
    "metric_blocks",
    metadata,
    Column("run_id", ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
    Column("level", Integer, primary_key=True),
    # Sequences of the first and last event that it stands for.
    Column("last_sequence", BigInteger, primary_key=True),
    Column("first_sequence", BigInteger, nullable=False),
    # Least and greatest step.
    Column("first_step", BigInteger, nullable=False),
    Column("last_step", BigInteger, nullable=False),
    # QueryMetricsResponse.
    Column("payload", LargeBinary, nullable=False),
)

changes = Table(
    "changes",
    metadata,
    Column("run_id", ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
    # That of its event of kind "run".
    Column("sequence", BigInteger, primary_key=True),
    Column("time_us", BigInteger, nullable=False),
    # Of the run from then on.
    Column("state", Integer, nullable=False),
    Column("condition", Integer, nullable=False),
    Column("step", BigInteger, nullable=False),
    # 0 without a checkpoint.
    Column("checkpoint_step", BigInteger, nullable=False),
)

requests = Table(
    "requests",
    metadata,
    # Chosen by the client.
    Column("id", String, primary_key=True),
    # SHA-256 of the spec as submitted.
    Column("spec_sha256", String(64), nullable=False),
    Column("run_id", ForeignKey("runs.id", ondelete="CASCADE"), nullable=False, index=True),
)

datasets = Table(
    "datasets",
    metadata,
    # Hex digest of the content.
    Column("sha256", String(64), primary_key=True),
    # Suffix of the first upload, such as ".jsonl"; the file lies at datasets/<sha256><suffix>.
    Column("suffix", String, nullable=False),
    Column("file_name", String, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("create_us", BigInteger, nullable=False),
)

dataset_versions = Table(
    "dataset_versions",
    metadata,
    # Grows with every upload; the newest has the largest.
    Column("number", Integer, primary_key=True, autoincrement=True),
    # Chosen by the client; the content's digest of one without an id.
    Column("dataset_id", String, nullable=False),
    # Counts from 1 for each id and is never given twice; 0 without an id.
    Column("version", Integer, nullable=False),
    Column("sha256", String(64), nullable=False, index=True),
    Column("file_name", String, nullable=False),
    # 0 if the client did not count them.
    Column("num_rows", BigInteger, nullable=False),
    Column("num_tokens", BigInteger, nullable=False),
    # As of runs.
    Column("owner", String, nullable=False),
    Column("create_us", BigInteger, nullable=False),
    # Time of its deletion: the row stays, so that its version stays taken.
    Column("delete_us", BigInteger),
    UniqueConstraint("dataset_id", "version"),
)
