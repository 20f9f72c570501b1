"""Architectures of transformers, each through every stage of the system; and model directories that are damaged."""
