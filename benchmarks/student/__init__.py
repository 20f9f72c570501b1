"""Time and memory of the student step."""
