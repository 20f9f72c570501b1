"""Looks at a dataset before it is trained on: what its rows are, how long, and which of them are refused."""
