"""Queries to teachers: connect, dispatch, cache, results."""
