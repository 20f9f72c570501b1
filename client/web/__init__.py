"""Web server: HTTP API of the services, on the client's own connections."""
