"""Lengths of a dataset's rows, before it is trained on."""
