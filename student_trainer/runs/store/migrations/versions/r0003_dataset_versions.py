"""Adds ids and versions of datasets, with those uploaded so far by their content, and the datasets of a run."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    versions = op.create_table(
        "dataset_versions",
        sa.Column("number", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("dataset_id", sa.String(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("file_name", sa.String(), nullable=False),
        sa.Column("num_rows", sa.BigInteger(), nullable=False),
        sa.Column("num_tokens", sa.BigInteger(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("create_us", sa.BigInteger(), nullable=False),
        sa.Column("delete_us", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_dataset_versions")),
        sa.UniqueConstraint("dataset_id", "version", name=op.f("uq_dataset_versions_dataset_id")),
    )
    op.create_index(op.f("ix_dataset_versions_sha256"), "dataset_versions", ["sha256"], unique=False)
    with op.batch_alter_table("runs") as runs:
        runs.add_column(sa.Column("datasets", sa.String(), nullable=False, server_default=""))
    datasets = sa.table("datasets", *(sa.column(name) for name in ("sha256", "file_name", "create_us")))
    constants: tuple[sa.ColumnElement[object], ...] = (
        sa.literal_column("0"),
        sa.literal_column("0"),
        sa.literal_column("0"),
        sa.literal_column("''"),
    )
    columns = datasets.c
    op.execute(
        versions.insert().from_select(
            ["dataset_id", "sha256", "file_name", "create_us", "version", "num_rows", "num_tokens", "owner"],
            sa.select(
                columns.sha256, columns.sha256, columns.file_name, columns.create_us, *constants
            ).order_by(columns.create_us),
        )
    )
