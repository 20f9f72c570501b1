"""Fingerprints and files of tokenizers."""
