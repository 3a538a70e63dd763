"""PTX is executed here, which the interpreter's process has none of."""

from __future__ import annotations

from mtl_fast.kernels.triton import interpreted

collect_ignore_glob = ["test_*.py"] if interpreted() else []
