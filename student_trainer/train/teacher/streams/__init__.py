"""Streams of a teacher's outputs: scored, generated, cached, behind a prompt of its own, and combined."""
