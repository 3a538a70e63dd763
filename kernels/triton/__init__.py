"""GPU kernels in Triton, one file an operation: kernels → launch configuration → launcher.

Importing this package imports nothing of Triton. A launcher describes each launch as a `launch.Launch`, whatever
device its tensors are on, so that the same description is run on a GPU or in Triton's interpreter, compiled ahead of
time (`ahead`), executed by the tests' emulator, counted and modelled.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: ``TRITON_INTERPRET=1`` before Triton's import."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on")


def takes_tf32() -> bool:
    """Whether convolutions of float32 on a GPU take TF32: PyTorch's, and with them ours."""
    # `cudnn.allow_tf32` raises where the switches of convolutions and recurrent layers differ; this one is its own.
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]  # not in stubs


def load() -> tuple[bool, str]:
    """Whether Triton is installed, and which version or what is missing; looked up once, imported by first use."""
    return _load_once()


# torch.compile takes both answers as they are: it cannot read the switch, and as with the native kernels need not look.
load._dynamo_marked_constant = True  # type: ignore[attr-defined]  # no attribute that stubs know
takes_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]  # nor this one


@functools.cache
def _load_once() -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed; it comes with CUDA builds of PyTorch"
    from importlib.metadata import version

    return True, f"Triton {version('triton')}" + (", interpreted" if interpreted() else "")
