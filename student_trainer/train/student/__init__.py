"""The student model: loading, adapters, output layer, export."""
