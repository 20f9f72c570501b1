"""Alembic's entry: runs the migrations on the connection that the store hands over, and on no other."""

from __future__ import annotations

from alembic import context

from stillhouse.student_trainer.runs.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True
)
with context.begin_transaction():
    context.run_migrations()
