"""What tests of the backward kernels share: gradients behind an epilogue, written out, and poisoned inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_fast.kernels.contracts import Epilogue
from mtl_fast.ops._epilogue_codes import PLACE, POSITIVE
from tests.conv_cases import Random
from tests.native_cases import windows

NAN = float("nan")


def poisoned(t: Tensor) -> Tensor:
    """The same values and strides inside a larger buffer full of NaN (of ones, for whole numbers)."""
    around = 4096
    filler = NAN if t.is_floating_point() else 1
    buffer = torch.full((t.numel() + 2 * around,), filler, dtype=t.dtype)
    view = buffer.as_strided(t.shape, t.stride(), around)
    return view.copy_(t)


def images(random: Random, *shape: int, dtype: torch.dtype) -> Tensor:
    """Channels-last, poisoned around."""
    return poisoned(random.images(*shape).to(dtype))


class Saved:
    """A forward pass of an epilogue on values already rounded to `dtype`: z, r, y, codes, and a cotangent of y."""

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        epilogue: Epilogue,
        dtype: torch.dtype,
        *,
        residual: bool,
        seed: int = 0,
    ) -> None:
        random = Random(seed)
        self.epilogue, self.size = epilogue, (shape[2], shape[3])
        self.z = random.images(*shape)
        self.residual = images(random, *shape, dtype=dtype) if residual else None
        r = 0.0 if self.residual is None else self.residual.double()
        first = self._act(self.z) if epilogue.activation == "before_residual" else self.z
        whole = first + r
        sign = self.z if epilogue.activation == "before_residual" else whole
        if epilogue.activation == "after_residual":
            whole = self._act(whole)
        codes = (sign > 0).to(torch.uint8) * POSITIVE
        y = whole
        if epilogue.pool:
            place = windows(whole).argmax(-1, keepdim=True)
            y = windows(whole).gather(-1, place)[..., 0]
            codes = (windows(codes).gather(-1, place) | place.to(torch.uint8))[..., 0]
        self.y = poisoned(y.to(dtype).contiguous(memory_format=torch.channels_last))
        self.codes = poisoned(codes.contiguous(memory_format=torch.channels_last))
        self.grad = images(random, *y.shape, dtype=dtype)

    def _act(self, t: Tensor) -> Tensor:
        return F.leaky_relu(t, self.epilogue.slope)

    def at_codes(self, t: Tensor) -> Tensor:
        """[N, C, H', W'] at the places of the maxima."""
        if not self.epilogue.pool:
            return t
        return windows(t).gather(-1, (self.codes & PLACE).long()[..., None])[..., 0]

    def scattered(self, t: Tensor) -> Tensor:
        """The other way, zeros elsewhere."""
        if not self.epilogue.pool:
            return t
        whole = torch.zeros(self.z.shape, dtype=t.dtype)
        height, width = (length // 2 * 2 for length in self.size)
        spread = F.one_hot((self.codes & PLACE).long(), 4) * t[..., None]
        spread = spread.unflatten(-1, (2, 2)).permute(0, 1, 2, 4, 3, 5)
        whole[:, :, :height, :width] = spread.reshape(*t.shape[:2], height, width)
        return whole

    def inner(self) -> Tensor:
        """G at the values of y, in float64."""
        grad = self.grad.double()
        if self.epilogue.activation == "none":
            return grad
        return torch.where((self.codes & POSITIVE) != 0, grad, self.epilogue.slope * grad)


@contextmanager
def called(*names: str) -> Iterator[list[tuple[Any, tuple[Any, ...]]]]:
    """The first call of each of these operators inside: (operator, arguments) by the order of their names."""
    found: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            operator = getattr(torch.ops.mtl_fast, name)

            def noting(*arguments: Any, name: str = name, operator: Any = operator) -> Any:
                found.setdefault(name, (operator.default, arguments))
                return operator(*arguments)

            patch.setattr(torch.ops.mtl_fast, name, noting)
        yield calls
    calls += [found[name] for name in names]


def root_sum_of_squares(t: Tensor) -> Tensor:
    """Of each channel [C]: what independent rounding errors of the terms add up to, relative to one of them."""
    return t.square().sum(dim=(0, 2, 3)).sqrt()


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float, what: str) -> None:
    """Every value within its own bound."""
    assert actual.shape == expected.shape, what
    assert actual.isfinite().all(), f"{what}: {actual}"
    error = (actual.double() - expected).abs()
    worst = (error - bound).max()
    assert worst <= 0, f"{what}: {error.max():.3e} > {float(torch.as_tensor(bound).max()):.3e}"
