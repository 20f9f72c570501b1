"""The task "evaluate": a student, its baseline and its teacher on the same rows, without training."""
