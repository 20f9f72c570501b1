"""Distillation against cross-entropy, sparse targets, and cross-tokenizer distillation."""
