"""The memory estimate of a run."""
