"""Adds the owner of a run, and the flag of a micro-batch halved after running out of memory."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("runs") as runs:
        runs.add_column(sa.Column("owner", sa.String(), nullable=False, server_default=""))
        runs.add_column(sa.Column("halved", sa.Boolean(), nullable=False, server_default=sa.false()))
