"""Tests of the task of classifiers."""
