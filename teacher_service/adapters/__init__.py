"""LoRA adapters: registry and uploads."""
