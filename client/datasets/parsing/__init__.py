"""Parses completions into named, typed fields."""
