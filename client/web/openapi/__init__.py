"""The OpenAPI document, from the routes and the descriptors of the contract."""
