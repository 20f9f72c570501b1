"""YAML run file to RunSpec; problems with line and column."""
