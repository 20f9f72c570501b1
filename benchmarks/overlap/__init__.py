"""Step time with a teacher beside the student."""
