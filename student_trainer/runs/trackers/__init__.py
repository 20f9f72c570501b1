"""Experiment trackers of runs: a process for each, with its secret in its environment alone, followed to the run's end."""
