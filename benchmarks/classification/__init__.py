"""Classifiers: a distilled student against one that learns labels alone."""
