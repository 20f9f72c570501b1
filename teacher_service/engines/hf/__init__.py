"""The transformers reference engine."""
