"""vLLM's second model runner, the default of GPUs: rows of prompts and samples on the device."""
