"""Teachers with another tokenizer."""
