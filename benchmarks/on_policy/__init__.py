"""On-policy distillation: updates and rollouts a minute, beside TRL's trainers."""
