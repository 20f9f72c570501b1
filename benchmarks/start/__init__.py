"""Start: seconds from `run create` to the first step, and from `stillhouse-teacher` to its first answer."""
