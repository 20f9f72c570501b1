"""Model files, fingerprints, tokenizers."""
