"""Pipelines: a file of named stages, run in order and resumed at the stage that broke."""
