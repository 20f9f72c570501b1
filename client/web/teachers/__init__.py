"""Prompts tried on a teacher over HTTP, generated or scored, and the calls to teachers that OpenAI's API shares."""
