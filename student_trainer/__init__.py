"""The student: the run service (runs) and the training process (train)."""
