"""The operators' namespace `mtl_fast`, and what all native operations ask of a call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..kernels import native

# Schemas, fakes and gradients are declared from Python; a native library adds implementations only.
LIBRARY = torch.library.Library("mtl_fast", "DEF")


def native_runs(*tensors: Tensor) -> tuple[bool, str]:
    """Whether the native kernels may take these tensors, and why (not).

    They are float32 on the CPU, and have no rule for torch.func or forward-mode differentiation.
    """
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return False, f"a tensor is on {tensor.device}"
        if tensor.dtype != torch.float32:
            return (
                False,
                f"a tensor is {str(tensor.dtype).removeprefix('torch.')}, native kernels are float32",
            )
    if torch._C._functorch.maybe_current_level() is not None:
        return False, "inside a torch.func transform"
    if forward_ad._current_level >= 0:
        return False, "inside forward-mode differentiation"
    if torch.is_autocast_enabled("cpu"):
        return False, "autocast is on"
    return native.load()
