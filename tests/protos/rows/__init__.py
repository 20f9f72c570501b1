"""Rows shared by the programs."""
