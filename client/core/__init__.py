"""Settings, connections, errors."""
