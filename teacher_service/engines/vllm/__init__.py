"""The vLLM engine in the service's process: settings, tiers, requests, rows."""
