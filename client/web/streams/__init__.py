"""Server-sent events, and streams that many readers share."""
