"""Plain PyTorch: the definition that every other backend is tested against; any device."""
