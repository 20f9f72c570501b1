"""The tracker process: sends a run's metrics from its directory to one experiment tracker, apart from training."""
