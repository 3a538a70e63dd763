"""The operators' namespace `mtl_fast`, and what all native operations, and all on GPUs, ask of a call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..kernels import native, triton
from .backend import Elsewhere

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
    if transform := _transform():
        return False, transform
    if torch.is_autocast_enabled("cpu"):
        return False, "autocast is on"
    return native.load()


def triton_runs(*tensors: Tensor) -> tuple[bool, str]:
    """Whether the Triton kernels may take these tensors, and why (not).

    They are float32, float16 or bfloat16 on a CUDA device, or on the CPU where Triton interprets its kernels; there
    is no rule for torch.func or forward-mode differentiation.
    """
    interpreted = triton.interpreted()
    if not tensors and not interpreted and not torch.cuda.is_available():
        return False, Elsewhere("there is no CUDA device")
    for tensor in tensors:
        if tensor.device.type != "cuda" and not (interpreted and tensor.device.type == "cpu"):
            return False, Elsewhere(f"a tensor is on {tensor.device}")
        name = str(tensor.dtype).removeprefix("torch.")
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return False, f"a tensor is {name}, Triton kernels are float32, float16 and bfloat16"
        if interpreted and tensor.dtype == torch.bfloat16:
            return False, f"a tensor is {name}, which Triton's interpreter computes wrongly"
    if transform := _transform():
        return False, transform
    if torch.is_autocast_enabled("cpu" if interpreted else "cuda"):
        return False, "autocast is on"
    return triton.load()


def _transform() -> str | None:
    """The differentiation without a rule that is going on."""
    if torch._C._functorch.maybe_current_level() is not None:
        return "inside a torch.func transform"
    if forward_ad._current_level >= 0:
        return "inside forward-mode differentiation"
    return None
