"""ResNet-12 of the few-shot literature, in its common form and in that of MTL's TensorFlow code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from ..kernels.contracts import EffectiveWeights, Epilogue
from ..ops.ss_block import ss_block
from .encoder import Embeddings, Encoder, Statistics
from .scale_shift import ChannelNorm2d, ScaleShiftConv2d


class ResidualBlock(nn.Module):
    """Operands of one block: a 1×1 shortcut and three 3×3 convolutions; `ss_block` does the arithmetic."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        bias: bool,
        shortcut_bias: bool,
        shortcut_norm: bool,
        affine: str,
        eps: float,
    ) -> None:
        super().__init__()

        def norm() -> ChannelNorm2d:
            return ChannelNorm2d(n_out, affine=affine, eps=eps)

        # The shortcut comes first: statistics and effective weights follow the order of modules().
        self.shortcut = ScaleShiftConv2d(
            n_in, n_out, 1, bias=shortcut_bias, norm=norm() if shortcut_norm else None
        )
        widths = [n_in, n_out, n_out]
        self.convs = nn.ModuleList(
            ScaleShiftConv2d(width, n_out, 3, padding=1, bias=bias, norm=norm()) for width in widths
        )


class ResNet12(Encoder):
    """Four residual blocks, each halving the map, then its mean: [N, 3, H, W] → [N, widths[-1]].

    The defaults are the common form: norm and no activation on the third convolution and the shortcut, the
    activation after the addition. `ResNet12.tensorflow()` is the form behind the tables of MTL (CVPR 2019).

    Args:
        widths: output channels of the blocks.
        slope: of the leaky ReLU for negative inputs.
        dropout: probability after each block, in training mode (pre-training) only.
        bias: whether the 3×3 convolutions (and a normalised shortcut) have one.
        shortcut_norm: whether the 1×1 shortcut has a norm; without one it has no bias either.
        activation: ``after_residual`` or ``before_residual``.
        shortcut_scale_shift: whether Φ reaches the shortcut as well.
        affine: γ and β of the norms: ``both``, ``bias`` or ``none``.
        eps: of the norms.
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 256, 512),
        *,
        slope: float = 0.1,
        dropout: float = 0.1,
        bias: bool = True,
        shortcut_norm: bool = True,
        activation: Literal["after_residual", "before_residual"] = "after_residual",
        shortcut_scale_shift: bool = False,
        affine: str = "both",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.shortcut_scale_shift = shortcut_scale_shift
        self.epilogue = Epilogue(activation, slope, pool=True)
        self.feature_dim = widths[-1]
        self.layers = nn.ModuleList(
            ResidualBlock(
                n_in,
                n_out,
                bias=bias,
                shortcut_bias=bias and shortcut_norm,
                shortcut_norm=shortcut_norm,
                affine=affine,
                eps=eps,
            )
            for n_in, n_out in zip((3, *widths[:-1]), widths, strict=True)
        )

    @classmethod
    def tensorflow(
        cls,
        widths: Sequence[int] = (64, 128, 256, 512),
        *,
        dropout: float = 0.1,
        shortcut_scale_shift: bool = False,
    ) -> ResNet12:
        """The authors' TensorFlow form: every 3×3 convolution activated, raw 1×1 residual, no γ, eps 1e-3."""
        return cls(
            widths,
            dropout=dropout,
            shortcut_norm=False,
            activation="before_residual",
            shortcut_scale_shift=shortcut_scale_shift,
            affine="bias",
            eps=1e-3,
        )

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def takes_scale_shift(self, conv: ScaleShiftConv2d) -> bool:
        return self.shortcut_scale_shift or all(conv is not block.shortcut for block in self.layers)

    def embed(
        self,
        images: Tensor,
        *,
        n_groups: int = 0,
        mask: Tensor | None = None,
        weights: Sequence[EffectiveWeights | None] | None = None,
    ) -> Embeddings:
        smallest = 2 ** len(self.layers)
        if images.ndim == 4 and min(images.shape[2:]) < smallest:
            raise ValueError(
                f"images: {tuple(images.shape)} are halved {len(self.layers)} times; give at least "
                f"{smallest}×{smallest} pixels"
            )
        x, statistics = images, Statistics()
        effective = iter(weights) if weights is not None else None

        for block in self.layers:
            shortcut, *convs = (
                conv.operands(next(effective) if effective is not None else None)
                for conv in self.convs(block)
            )
            out = ss_block(
                x,
                convs,
                shortcut,
                epilogue=self.epilogue,
                **self._options(n_groups, mask),
            )
            statistics.extend(out.statistics)
            x = self._dropout(out.output)
        return Embeddings(x.mean(dim=(2, 3)), statistics)
