"""Size and fidelity of cached targets."""
