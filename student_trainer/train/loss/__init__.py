"""Losses between a teacher's sparse distributions and a student's logits, as pure functions."""
