"""A watch over what a step asks the device for."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NothingReadBack(TorchDispatchMode):
    """Raises where the host would wait for a value of the device."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal", "item")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        if name.lstrip("_") in [n.lstrip("_") for n in self.FORBIDDEN] or name.startswith(
            ("_unique", "unique")
        ):
            raise AssertionError(f"{func.name()} reads a value back")
        indices = args[1] if name.startswith("index") and len(args) > 1 else None
        if isinstance(indices, (list, tuple)) and any(
            i is not None and i.dtype == torch.bool for i in indices
        ):
            raise AssertionError("an index by a mask reads its length back")
        return func(*args, **(kwargs or {}))
