"""The commands `stillhouse data ...`."""
