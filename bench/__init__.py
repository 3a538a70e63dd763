"""Measurements beside plain PyTorch: `python -m bench ops|step|pretrain`, and `pytest bench/ops` by operation."""
