"""What every encoder can do: freeze, scale and shift, refresh, embed with stored or batch statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ..kernels.contracts import EffectiveWeights, Granularity
from ..ops.effective_weights import effective_weights
from ..ops.ss_conv import reads_effective_weights
from .scale_shift import ChannelNorm2d, ScaleShiftConv2d, scale_shift_parameters

Statistics = list[tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class BatchShare:
    """The part of a training batch that this process holds; others hold the rest, at least one image each.

    Attributes:
        start, total: images of the batch that come before it, and images of the whole batch.
        gather: [K] → [processes, K], every process's vector; a sum of its rows has its gradient in each process.
    """

    start: int
    total: int
    gather: Callable[[Tensor], Tensor]


class Embeddings(NamedTuple):
    """[N, D] features; per norm layer the batch statistics (mean, var, count), or none at all."""

    features: Tensor
    statistics: Statistics


class Encoder(nn.Module, ABC):
    """Base of the encoders: images [N, 3, H, W] → features [N, feature_dim].

    In training mode (pre-training) a plain call is an ordinary network: batch statistics of the whole batch,
    running averages moved, dropout active; of a batch in several processes with `share` set. In evaluation mode it
    uses the stored statistics.
    The meta-training engine calls `embed`, which says explicitly which statistics are used.
    """

    feature_dim: int
    dropout: float = 0.0
    backend: str = "auto"
    fold: bool = True
    dropout_generator: torch.Generator | None = None
    share: BatchShare | None = None

    @abstractmethod
    def embed(
        self,
        images: Tensor,
        *,
        n_groups: int = 0,
        mask: Tensor | None = None,
        weights: Sequence[EffectiveWeights | None] | None = None,
    ) -> Embeddings:
        """Features of the images.

        Args:
            images: [N, 3, H, W] floating.
            n_groups: 0: stored statistics; g ≥ 1: batch statistics of g groups of neighbouring images.
            mask: bool [N], images that count in batch statistics.
            weights: this meta-step's `refresh()`.
        """

    def blocks(self) -> list[nn.Module]:
        """The encoder's blocks, first to last, by default one; "Θ4" in the ablations is the last one."""
        return [self]

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] → [N, feature_dim]; see the class for what training mode changes."""
        if not self.training:
            return self.embed(images).features
        features, statistics = self.embed(images, n_groups=1)
        self.update_running(statistics)
        return features

    def convs(self, within: nn.Module | None = None) -> list[ScaleShiftConv2d]:
        """The scale-and-shift convolutions in order, of the whole encoder or within one of its modules."""
        return [m for m in (within or self).modules() if isinstance(m, ScaleShiftConv2d)]

    def norms(self) -> list[ChannelNorm2d]:
        """The norm layers, in the order of `Embeddings.statistics`."""
        return [conv.norm for conv in self.convs() if conv.norm is not None]

    def takes_scale_shift(self, conv: ScaleShiftConv2d) -> bool:
        """Whether this convolution gets Φ; an encoder may leave its shortcuts out."""
        return True

    def freeze(self) -> None:
        """No gradient for any parameter."""
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def enable_scale_shift(
        self,
        granularity: Granularity = "kernel",
        *,
        last_block_only: bool = False,
        shift: Literal["every", "biased"] = "every",
    ) -> None:
        """Freezes Θ and starts Φ as the identity, on every convolution or on the last block's only.

        A Φ that was there before is dropped.

        Args:
            granularity: of Φ_S1.
            last_block_only: Θ4 of the ablations.
            shift: Φ_S2 beside every Φ_S1, or only where the frozen convolution has a bias (MTL's PyTorch code).

        Raises:
            ValueError: another granularity or shift, or the last block of an encoder that names none; nothing is
                changed then.
        """
        if granularity not in get_args(Granularity):
            raise ValueError(f"granularity: {granularity!r} is neither kernel nor filter")
        if shift not in ("every", "biased"):
            raise ValueError(f"shift: {shift!r} is neither every nor biased")
        if last_block_only and self.blocks()[-1] is self:
            raise ValueError(
                f"last_block_only: {type(self).__name__} names no blocks, its last one is the whole; leave it out, or "
                "name them in a blocks() of its own"
            )
        self.freeze()
        for conv in self.convs():
            conv.scale = conv.shift = None
        for conv in self.convs(self.blocks()[-1] if last_block_only else None):
            if self.takes_scale_shift(conv):
                conv.enable_scale_shift(granularity, shift=shift == "every" or conv.bias is not None)

    def scale_shift_parameters(self) -> Iterator[nn.Parameter]:
        """Φ_S1 and Φ_S2 of every convolution that has them."""
        return scale_shift_parameters(self)

    def _options(self, n_groups: int, mask: Tensor | None) -> dict[str, Any]:
        """What every layer of one `embed` is told alike."""
        return {
            "n_groups": n_groups,
            "mask": mask,
            "fold": self.fold,
            "gather": self._gather,
            "backend": self.backend,
        }

    def refresh(
        self, *, fold: bool = True, dtype: torch.dtype | None = None
    ) -> tuple[EffectiveWeights | None, ...]:
        """`effective_weights` of all layers that read them, for every forward of one meta-step; None of the others.

        Args:
            fold: for stored statistics; False for batch statistics (and where `self.fold` is off).
            dtype: of the images to come, as in `effective_weights`; None is the parameters'.
        """
        fold = fold and self.fold
        operands = [conv.operands() for conv in self.convs()]
        read = [reads_effective_weights(conv, fold=fold, backend=self.backend) for conv in operands]
        readers = [conv for conv, reads in zip(operands, read, strict=True) if reads]
        computed = iter(effective_weights(readers, fold=fold, dtype=dtype) if readers else ())
        return tuple(next(computed) if reads else None for reads in read)

    def update_running(self, statistics: Statistics) -> None:
        """Moves the running averages of all norms, group after group."""
        for norm, (mean, var, count) in zip(self.norms(), statistics, strict=True):
            norm.update(mean, var, count)

    @property
    def _gather(self) -> Callable[[Tensor], Tensor] | None:
        """What makes batch statistics those of the whole batch; None where this process has all of it."""
        return self.share.gather if self.training and self.share is not None else None

    def _dropout(self, x: Tensor) -> Tensor:
        """Inverted dropout in training mode, from `dropout_generator` so that a resumed run repeats it."""
        if not self.training or not self.dropout:
            return x
        start, total = (0, len(x)) if self.share is None else (self.share.start, self.share.total)
        last = x.is_contiguous(memory_format=torch.channels_last)
        # Drawn for the whole batch, in its order in memory: no image's mask depends on who holds it.
        keep = torch.empty(
            (total, *x.shape[1:]),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last if last else torch.contiguous_format,
        ).bernoulli_(1 - self.dropout, generator=self.dropout_generator)
        return x * keep[start : start + len(x)].mul_(1 / (1 - self.dropout))
