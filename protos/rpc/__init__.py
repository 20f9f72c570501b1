"""Channels, servers, TLS, authentication, and the interceptors of a call."""
