"""Set-up of a run in stages: inputs, teachers, student, then one frozen context for the loop."""
