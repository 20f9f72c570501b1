"""Virtual environments with packages that this one lacks."""
