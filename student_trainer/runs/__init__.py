"""The run service, without torch."""
