"""Training processes: start, watch, stop, classify, retain."""
