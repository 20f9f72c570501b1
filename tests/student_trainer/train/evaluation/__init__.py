"""Tests of the evaluation of students."""
