"""Files on disk: atomic replacement, locks, and the errors of a full or broken disk."""
