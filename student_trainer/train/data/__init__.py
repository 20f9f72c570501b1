"""Files to rows, token ids, loss masks and order."""
