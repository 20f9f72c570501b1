"""The task of classifiers: rows with labels, their batches, and what an evaluation counts."""
