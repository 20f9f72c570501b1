"""Rows of prompts and of training data: their fields, conversations and files, for every program alike."""
