"""Checks of hosts, services and certificates."""
