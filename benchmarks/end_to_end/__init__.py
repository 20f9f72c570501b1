"""Time to quality: online and cached distillation beside TRL's local and server teachers, on the same cores."""
