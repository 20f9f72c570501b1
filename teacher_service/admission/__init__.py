"""Fair sharing of the engine, and the memory budget of unread responses."""
