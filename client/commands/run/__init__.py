"""The commands `stillhouse run ...`."""
