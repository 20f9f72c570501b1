"""Teacher throughput as ratios to other engines, servers and clients."""
