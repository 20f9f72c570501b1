"""A request from the wire to the engine and back."""
