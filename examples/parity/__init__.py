"""Every row of the two older systems, shown by a command on small real models."""
