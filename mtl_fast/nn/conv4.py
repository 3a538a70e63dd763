"""Conv-4, the four-layer encoder of MAML."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..kernels.contracts import EffectiveWeights, Epilogue
from .encoder import Embeddings, Encoder, Statistics
from .layer import normalised_conv
from .scale_shift import ChannelNorm2d, ScaleShiftConv2d


class Conv4(Encoder):
    """Four times 3×3 convolution → norm → ReLU → 2×2 max-pool, then all values as features.

    Args:
        width: channels of every layer (MAML on miniImageNet: 32).
        image_size: height and width of the images; features are width · (image_size // 16)².
        eps: of the norms.
    """

    def __init__(self, width: int = 32, *, image_size: int = 84, eps: float = 1e-5) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width: expected at least 1 channel, got {width}")
        if image_size < 16:
            raise ValueError(
                f"image_size: Conv-4 halves its map four times and needs at least 16 pixels, got {image_size}"
            )
        self.epilogue = Epilogue("after_residual", slope=0.0, pool=True)
        self.image_size = image_size
        self.feature_dim = width * (image_size // 16) ** 2
        self.layers = nn.ModuleList(
            ScaleShiftConv2d(n_in, width, 3, padding=1, norm=ChannelNorm2d(width, eps=eps))
            for n_in in (3, width, width, width)
        )

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def embed(
        self,
        images: Tensor,
        *,
        n_groups: int = 0,
        mask: Tensor | None = None,
        weights: Sequence[EffectiveWeights | None] | None = None,
    ) -> Embeddings:
        sides = [side // 16 for side in images.shape[2:]]
        if images.ndim == 4 and sides != [self.image_size // 16] * 2:
            raise ValueError(
                f"images: {tuple(images.shape)} give another number of features than {self.image_size}×"
                f"{self.image_size} pixels, for which the encoder is made; resize them, or give Conv4 their image_size"
            )
        x, statistics = images, Statistics()
        if mask is not None:
            x = x.where(mask.view(-1, 1, 1, 1), 0)  # a weight's gradient would be 0·NaN
        for i, conv in enumerate(self.convs()):
            out = normalised_conv(
                x,
                conv.operands(weights[i] if weights is not None else None),
                epilogue=self.epilogue,
                **self._options(n_groups, mask),
            )
            statistics.extend(out.statistics)
            x = out.output
        return Embeddings(x.flatten(1), statistics)
