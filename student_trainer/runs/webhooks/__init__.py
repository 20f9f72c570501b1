"""State changes of runs, posted to the addresses that their specs name."""
