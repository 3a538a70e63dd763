"""The plain data that every backend of an operation receives: tensors and shapes, no behaviour of a network.

Shapes: O output channels, I input channels, g = `groups`, k×k taps. Images are [N, C, H, W] in dense
channels-last memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from torch import Tensor

Granularity = Literal["kernel", "filter"]
Activation = Literal["none", "before_residual", "after_residual"]


@dataclass(frozen=True)
class FrozenFilters:
    """A convolution's frozen weight, its geometry, and whatever a backend derives from it once.

    Attributes:
        weight: [O, I/g, k, k]; [T, O, I/g, k, k] where each of T tasks has its own.
        bias: [O] or None; [T, O] where each task has its own.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`.
        derived: what backends computed from `weight` (packed, rotated, transformed), by name, on first use;
            not for a weight that requires a gradient. It lives as long as this object: the module that owns
            the weight makes a new one when it loads, moves or has been trained.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    derived: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def by_task(self) -> bool:
        """Whether each task has a weight of its own: an operand of `task_conv` only."""
        return self.weight.dim() == 5


@dataclass(frozen=True)
class ChannelNorm:
    """A per-channel normalisation (z − mean)/√(var + eps)·weight + bias; every tensor is [C].

    `mean` and `var` are the stored (running) statistics; None means that only batch statistics exist.
    `weight` (γ) and `bias` (β) may be None: then 1 and 0.
    """

    mean: Tensor | None
    var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5


@dataclass(frozen=True)
class Epilogue:
    """What follows the normalised convolution: [act] → + residual → [act] → 2×2 max-pool.

    Attributes:
        activation: ``none``; ``before_residual`` (MTL's TensorFlow form: on the convolution's own output);
            ``after_residual`` (the common form; also the plain case without a residual).
        slope: of the leaky ReLU for negative inputs; 0 is the ReLU.
        pool: 2×2 max-pooling with stride 2 at the end; odd last rows and columns are dropped.
    """

    activation: Activation = "none"
    slope: float = 0.1
    pool: bool = False


class PackedWeights(NamedTuple):
    """A weight [O, I, k, k] in the layouts that a GPU's convolution kernels read, in the images' dtype.

    `forward` is [O, k, k, I'], with zeros from I to I'; `rotated`, for the input gradient, is [I, k, k, O] with
    both orders of taps turned round.
    """

    forward: Tensor
    rotated: Tensor


@dataclass(frozen=True)
class EffectiveWeights:
    """What a convolution really multiplies by, computed once a meta-step; holds values, no gradient.

    Attributes:
        weight: [O, I/g, k, k] = (γ/σ)·Φ_S1·W, or Φ_S1·W when not folded.
        shift: [O] = (b + Φ_S2 − mean)·γ/σ + β, or b + Φ_S2 when not folded.
        folded: whether the stored norm is inside.
        packed: the same weight as the kernels of the backend that computed it read it; None where they read `weight`.
    """

    weight: Tensor
    shift: Tensor
    folded: bool
    packed: PackedWeights | None = None


@dataclass(frozen=True)
class ConvOperands:
    """All tensors of one scale-and-shift convolution.

    Attributes:
        filters: the frozen weight.
        scale: Φ_S1, [O, I/g, 1, 1] (`kernel`) or [O, 1, 1, 1] (`filter`); None is 1.
        shift: Φ_S2, [O]; None is 0.
        norm: what follows the convolution, or None.
        effective: this meta-step's `EffectiveWeights`, or None.
    """

    filters: FrozenFilters
    scale: Tensor | None = None
    shift: Tensor | None = None
    norm: ChannelNorm | None = None
    effective: EffectiveWeights | None = None

    def without_norm(self) -> ConvOperands:
        """The convolution alone, for batch statistics taken after it."""
        return replace(self, norm=None)


class Normalised(NamedTuple):
    """Output of `episode_norm`: images; each group's mean and biased variance [G, C]; values a channel [G]."""

    output: Tensor
    mean: Tensor
    var: Tensor
    n_values: Tensor


class BlockOutput(NamedTuple):
    """Output of `ss_block`: images, and per normalised convolution the batch statistics (empty when stored)."""

    output: Tensor
    statistics: tuple[tuple[Tensor, Tensor, Tensor], ...]


def granularity(scale: Tensor, weight: Tensor) -> Granularity:
    """`kernel` or `filter`, read off the shape of Φ_S1.

    Raises:
        ValueError: the scale's shape is neither [O, I/g, 1, 1] nor [O, 1, 1, 1].
    """
    n_out, n_in = weight.shape[:2]
    if tuple(scale.shape) == (n_out, n_in, 1, 1):
        return "kernel"
    if tuple(scale.shape) == (n_out, 1, 1, 1):
        return "filter"
    raise ValueError(
        f"scale: shape {tuple(scale.shape)} fits weight {tuple(weight.shape)} neither as kernel "
        f"{(n_out, n_in, 1, 1)} nor as filter {(n_out, 1, 1, 1)}"
    )
