"""Filters of rows: each says of a row why it is dropped, or nothing."""
