"""Peers of the teacher benchmark: their environment, clients and engine baselines."""
