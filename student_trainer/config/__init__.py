"""RunConfig: schema, defaults, checks, from and to RunSpec."""
