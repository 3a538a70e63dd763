"""What tests of a residual block on the Triton kernels share: operands, results, and operands far from kinks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtl_fast.kernels.contracts import ConvOperands, Epilogue
from mtl_fast.ops import ss_block
from tests.conv_cases import Random, rebuilt, tensors
from tests.native_cases import Kinks, double

FORMS = {
    "common": Epilogue("after_residual", 0.1, pool=True),
    "tensorflow": Epilogue("before_residual", 0.1, pool=True),
}


def make(
    form: str, granularity: str, dtype: torch.dtype, seed: int, size: tuple[int, int] = (5, 6)
) -> tuple[Tensor, list[ConvOperands]]:
    """Images [2, 3, *size] of `dtype` and a block's operands in float32, the shortcut first, with Φ of its own."""
    random = Random(seed, torch.float32)
    norm = "both" if form == "common" else "bias"
    convs = [random.conv(c, 7, granularity=granularity, norm=norm) for c in (3, 7, 7)]
    shortcut = random.conv(3, 7, 1, granularity=granularity, norm=norm if form == "common" else None)
    return random.images(2, 3, *size).to(dtype), [shortcut, *convs]


def results(x: Tensor, layers: list[ConvOperands], form: str, backend: str, **options: Any) -> list[Tensor]:
    """The output and the gradients of x and of the scale-and-shift tensors, on the CPU wherever these are."""
    x = x.clone().requires_grad_()
    made, wanted = [], [x]
    for conv in layers:
        values = {
            name: t.clone().requires_grad_(name in ("scale", "shift")) for name, t in tensors(conv).items()
        }
        made.append(rebuilt(conv, values))
        wanted += [t for t in values.values() if t.requires_grad]
    out = ss_block(x, made[1:], made[0], epilogue=FORMS[form], backend=backend, **options).output
    cotangent = Random(99).normal(*out.shape).bfloat16().to(out)
    return [t.detach().cpu() for t in (out, *torch.autograd.grad(out, wanted, cotangent))]


# A small map has fewer kinks to come near to.
MAPS = {torch.float32: (5, 6), torch.float16: (2, 3), torch.bfloat16: (2, 2)}


def decided(
    form: str, granularity: str, dtype: torch.dtype, rounds_as: torch.dtype | None = None
) -> tuple[Tensor, list[ConvOperands], list[Tensor]]:
    """Operands whose activations are all farther from their kinks than rounding, and the float64 results.

    Args:
        rounds_as: the type whose precision a product's operands have, where that is not `dtype`.
    """
    rounds_as = rounds_as or dtype
    margin = torch.finfo(rounds_as).eps * (9 * 7 + 8) ** 0.5 / 8
    for seed in range(2000):
        x, layers = make(form, granularity, dtype, seed, MAPS[rounds_as])
        with Kinks() as kinks:
            exact = results(x.double(), [double(conv) for conv in layers], form, "torch")
        if kinks.nearest > margin:
            return x, layers, exact
    raise AssertionError("no operands whose activations are all decided")
