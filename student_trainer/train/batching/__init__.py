"""Teacher outputs to micro-batches and target forms."""
