"""Metrics of text and of predictions as pure functions, without torch: the client and the training process share them."""
