"""The contract (stillhouse/v1) and the library that all three programs share."""
