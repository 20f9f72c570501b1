"""Heartbeat, reports, bounded waiting, failpoints."""
