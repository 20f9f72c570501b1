"""Tests of the metrics that client and training process share."""
