"""The two files of a LoRA adapter, in the order in which they are uploaded."""

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS)
