"""Code that runs in vLLM's worker process: everything that patches vLLM."""
