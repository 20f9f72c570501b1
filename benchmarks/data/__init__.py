"""Preparation of training data: rows a second, second starts and memory, beside datasets.map."""
