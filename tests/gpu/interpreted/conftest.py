"""Kernels run in Triton's interpreter here: ``TRITON_INTERPRET=1 python -m pytest tests/gpu/interpreted``."""

from __future__ import annotations

from mtl_fast.kernels.triton import interpreted

# The variable acts when Triton is imported, so these tests are a process of their own.
collect_ignore_glob = [] if interpreted() else ["test_*.py"]
