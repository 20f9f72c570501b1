"""Pages of the web view, rendered on the server from the services' responses."""
