"""Costs of the web server."""
