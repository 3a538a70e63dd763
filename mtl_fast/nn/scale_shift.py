"""Convolution and normalisation modules whose weights can be frozen under a learned scale and shift."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.contracts import ChannelNorm, ConvOperands, EffectiveWeights, FrozenFilters, Granularity
from ..ops.ss_conv import ss_conv


class ChannelNorm2d(nn.Module):
    """γ, β and running statistics of a normalisation over channels; the arithmetic is in the operations.

    Args:
        n_channels: C.
        affine: ``"both"`` (γ and β), ``"bias"`` (β only, MTL's TensorFlow form) or ``"none"``.
        eps: added to the variance.
        momentum: weight of a new statistic in the running average, as in `torch.nn.BatchNorm2d`.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, n_channels: int, *, affine: str = "both", eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__()
        if affine not in ("both", "bias", "none"):
            raise ValueError(f"affine: {affine!r} is not one of both, bias, none")
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(n_channels)) if affine == "both" else None
        self.bias = nn.Parameter(torch.zeros(n_channels)) if affine != "none" else None
        self.register_buffer("running_mean", torch.zeros(n_channels))
        self.register_buffer("running_var", torch.ones(n_channels))

    @property
    def operands(self) -> ChannelNorm:
        """The tensors as the operations take them."""
        return ChannelNorm(self.running_mean, self.running_var, self.weight, self.bias, self.eps)

    @torch.no_grad()
    def update(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Moves the running averages by the groups' statistics, one group after the other.

        r ← (1 − m)·r + m·statistic, group by group, in closed form; of the variance the unbiased one.

        Args:
            mean: [G, C]; var: [G, C], biased; count: [G], values a channel.
        """
        unbiased = var * (count / (count - 1).clamp(min=1))[:, None]
        age = torch.arange(len(mean) - 1, -1, -1, device=mean.device, dtype=mean.dtype)
        share = self.momentum * (1 - self.momentum) ** age
        kept = (1 - self.momentum) ** len(mean)
        self.running_mean.mul_(kept).add_(share @ mean)
        self.running_var.mul_(kept).add_(share @ unbiased)

    def extra_repr(self) -> str:
        return f"{len(self.running_mean)}, eps={self.eps}, momentum={self.momentum}"


def _written(weight: Tensor) -> tuple[int, int]:
    """Whose memory its values lie in and how often they were written to, in place; zeros where that is not counted."""
    if torch.compiler.is_compiling() or weight.is_inference():
        return 0, 0
    return weight.untyped_storage()._cdata, weight._version


class ScaleShiftConv2d(nn.Module):
    """A convolution, its norm, and (after `enable_scale_shift`) Φ_S1 and Φ_S2 on its frozen weight.

    Before that it is an ordinary trainable convolution. Φ starts as the identity: outputs stay the same.

    Args:
        n_in, n_out, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as in `torch.nn.Conv2d`.
        norm: what follows the convolution, or None.

    Attributes:
        backend: of this layer's own forward; an encoder that runs its layers' operands has one for them all.

    Raises:
        ValueError: an unknown padding or padding mode, or ``same`` with a stride.
    """

    scale: nn.Parameter | None
    shift: nn.Parameter | None
    backend: str = "auto"

    def __init__(
        self,
        n_in: int,
        n_out: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        norm: ChannelNorm2d | None = None,
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.padding_mode = padding_mode
        self.weight = nn.Parameter(torch.empty(n_out, n_in // groups, *_pair(kernel_size)))
        self._divided_padding()  # a wrong one is told now
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None
        self.norm = norm
        self.register_parameter("scale", None)
        self.register_parameter("shift", None)
        self._filters: FrozenFilters | None = None
        self._written = (0, 0)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Kaiming-normal weight over the fan-out, as ResNets start; bias 0."""
        self._filters = None
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def enable_scale_shift(self, granularity: Granularity = "kernel", *, shift: bool = True) -> None:
        """Freezes weight and bias and starts Φ_S1 at 1, Φ_S2 (with `shift`) at 0, as new parameters."""
        if granularity not in ("kernel", "filter"):
            raise ValueError(f"granularity: {granularity!r} is neither kernel nor filter")
        self.freeze()
        n_out, n_in = self.weight.shape[:2]
        shape = (n_out, n_in if granularity == "kernel" else 1, 1, 1)
        self.scale = nn.Parameter(self.weight.new_ones(shape))
        self.shift = nn.Parameter(self.weight.new_zeros(n_out)) if shift else None

    def freeze(self) -> None:
        """No gradient for weight, bias and the norm's affine."""
        self._filters = None
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    @property
    def filters(self) -> FrozenFilters:
        """The weight as the operations take it; built once, anew after a load, a move, a replacement or a write.

        A write through ``weight.data`` in place leaves no trace: assign the weight, or write to it under ``no_grad``.
        """
        kept = self._filters
        inner, _ = self._divided_padding()
        geometry = (self.stride, inner, self.dilation, self.groups)
        # Parameters can also be replaced: by assignment, or for one call by torch.func.functional_call.
        if (
            kept is None
            or kept.weight is not self.weight
            or kept.bias is not self.bias
            or (kept.stride, kept.padding, kept.dilation, kept.groups) != geometry
            or self._is_stale(kept)
        ):
            kept = FrozenFilters(self.weight, self.bias, *geometry)
            # What stands in for the parameter during one call, as a task's own weights do, lasts no longer.
            self._filters = kept if isinstance(self.weight, nn.Parameter) else None
            self._written = _written(self.weight) if self._filters is kept else (0, 0)
        return kept

    def _is_stale(self, kept: FrozenFilters) -> bool:
        """Whether what was derived from the weight is of former values."""
        if not kept.derived:
            return False
        # A weight that trains keeps nothing derived from it, so that freezing it again starts afresh.
        return self.weight.requires_grad or (
            not torch.compiler.is_compiling() and _written(self.weight) != self._written
        )

    def _divided_padding(self) -> tuple[tuple[int, int], tuple[int, ...]]:
        """What conv2d pads itself, and what is added before it."""
        height, width = self.weight.shape[-2:]
        pairs = (_pair(value) for value in (self.stride, self.dilation))
        return _divided(self.padding, self.padding_mode, (height, width), *pairs)

    def operands(self, effective: EffectiveWeights | None = None) -> ConvOperands:
        """All tensors of this layer, for `ss_conv`, `ss_block` and `effective_weights`.

        Padding that conv2d has no number for (other modes than zeros, an odd ``same``) is not in them: only
        `forward` adds it.
        """
        norm = None if self.norm is None else self.norm.operands
        return ConvOperands(self.filters, self.scale, self.shift, norm, effective)

    def forward(self, x: Tensor) -> Tensor:
        """[N, I, H, W] → [N, O, H', W'], normalised by the stored statistics if there is a norm.

        In memory the result lies as that of conv2d: channels-last where the images or the weight do.
        """
        _, outer = self._divided_padding()
        padded = x
        if any(outer):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            padded = F.pad(x, outer, mode=mode)
        y = ss_conv(padded, self.operands(), backend=self.backend)
        own = y.contiguous() if x.stride(1) != 1 and self.weight.is_contiguous() else y
        # A filter's gradient is taken from the output that the kernel keeps: what follows may write over its own.
        by_filter = self.scale is not None and self.scale.shape[1] == 1
        return y.clone() if own is y and by_filter and y.requires_grad else own

    def __getstate__(self) -> dict[str, Any]:
        # Copies and files start afresh: what was derived belongs to this weight and this process.
        return {**self.__dict__, "_filters": None}

    def _apply(self, fn: Any, recurse: bool = True) -> ScaleShiftConv2d:
        self._filters = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        self._filters = None
        super()._load_from_state_dict(state, prefix, *args)

    def extra_repr(self) -> str:
        n_out, n_in, *taps = self.weight.shape
        form = "trainable" if self.scale is None else f"scale {tuple(self.scale.shape[:2])}"
        side = "×".join(map(str, taps))
        return f"{n_in * self.groups}, {n_out}, {side}, stride={self.stride}, padding={self.padding}, {form}"


def scale_shift_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Φ_S1 and Φ_S2 of every convolution in `module` that has them, in the order of its modules."""
    for conv in module.modules():
        if isinstance(conv, ScaleShiftConv2d):
            yield from (p for p in (conv.scale, conv.shift) if p is not None)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _divided(
    padding: str | int | tuple[int, int],
    mode: str,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[tuple[int, int], tuple[int, ...]]:
    """What conv2d pads itself (rows, columns), and what is added before it (left, right, top, bottom).

    As `torch.nn.Conv2d` does it: other modes than zeros are padded before; of an odd ``same`` the one row or
    column more at the end.
    """
    if mode not in ("zeros", "reflect", "replicate", "circular"):
        raise ValueError(f"padding_mode: {mode!r} is not one of zeros, reflect, replicate, circular")
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f"padding: 'same' needs stride 1, got {stride}")
        total = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
        before, after = [t // 2 for t in total], [t - t // 2 for t in total]
    elif padding == "valid":
        before = after = [0, 0]
    elif isinstance(padding, str):
        raise ValueError(f"padding: {padding!r} is neither same nor valid, nor a number of pixels")
    else:
        before = after = list(_pair(padding))
    inner = (before[0], before[1]) if mode == "zeros" else (0, 0)
    rows, columns = ((b - i, a - i) for b, a, i in zip(before, after, inner, strict=True))
    return inner, (*columns, *rows)


def interleave(*passes: list[tuple[Tensor, Tensor, Tensor]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per layer, the statistics of some passes in task order: all of task 0, all of task 1, …"""
    return [
        tuple(torch.stack(values, dim=1).flatten(0, 1) for values in zip(*layer, strict=True))  # type: ignore[misc]  # always three
        for layer in zip(*passes, strict=True)
    ]
