"""The rpcs of RunService."""
