"""The store's schema migrations (Alembic)."""
