"""Arrays to bytes and back: the only code that knows their layout."""
