"""An operator's gradients as PyTorch expressions, for derivatives of derivatives (``create_graph=True``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def alone(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The same tensors (and None where there is none), each an input of its own.

    One operand may have been made from another, as a head from its support features: asked for the gradient by both,
    autograd would go on through the one to the other, and the caller's own pass would count that path again.
    """
    return tuple(None if t is None else t.view_as(t) for t in tensors)


def gradients(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    wanted: Mapping[int, Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of an operator's arguments, with a graph; None of all that are not wanted or not needed.

    Args:
        outputs: expressions of `wanted`.
        cotangents: of the same shapes.
        wanted: arguments by position, as `alone` gives them.
        needs: of every argument, whether its gradient is needed.
    """
    found: list[Tensor | None] = [None] * len(needs)
    asked = {i: t for i, t in wanted.items() if needs[i] and t is not None}
    if asked and outputs:
        values = torch.autograd.grad(
            outputs, list(asked.values()), cotangents, create_graph=True, allow_unused=True
        )
        for i, value in zip(asked, values, strict=True):
            found[i] = value
    return tuple(found)
