"""Choices that a run settles once and keeps: by its machine, its teachers and its model."""
