"""The teacher: one frozen model behind TeacherService."""
