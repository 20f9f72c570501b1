"""Datasets as token ids and masks in Arrow files: encoded once on all cores, kept, and read through memory maps."""
