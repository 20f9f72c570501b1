"""Fair sharing of the engine, and the bound on unread responses."""
