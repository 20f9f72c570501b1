"""Files of rows made from others: mixed, exported, parsed, converted and filtered."""
