"""Evaluation of a student: over the tokens of given text, and by text that it writes."""
