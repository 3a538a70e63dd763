"""The "ResNet-25" of MTL's PyTorch code: a stem, then stages of basic blocks that begin with a stride of 2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from ..kernels.contracts import ConvOperands, EffectiveWeights, Epilogue
from ..ops.ss_block import ss_block
from .encoder import Embeddings, Encoder, Statistics
from .layer import normalised_conv
from .scale_shift import ChannelNorm2d, ScaleShiftConv2d


class BasicBlock(nn.Module):
    """Operands of one block: two 3×3 convolutions and, where the map changes, a 1×1 shortcut; none has a bias."""

    def __init__(self, n_in: int, n_out: int, *, stride: int, eps: float) -> None:
        super().__init__()
        # The shortcut comes first: statistics and effective weights follow the order of modules().
        self.shortcut = None
        if stride != 1 or n_in != n_out:
            self.shortcut = ScaleShiftConv2d(
                n_in, n_out, 1, stride=stride, bias=False, norm=ChannelNorm2d(n_out, eps=eps)
            )
        self.convs = nn.ModuleList(
            ScaleShiftConv2d(
                width, n_out, 3, stride=s, padding=1, bias=False, norm=ChannelNorm2d(n_out, eps=eps)
            )
            for width, s in ((n_in, stride), (n_out, 1))
        )


class ResNet25(Encoder):
    """Stem, stages of four basic blocks, global mean: [N, 3, H, W] of any size → [N, widths[-1]].

    The stem is a 3×3 convolution with bias to ``widths[0] // 2`` channels. Activations are ReLUs; a block's last one
    follows the addition. Φ reaches every convolution, the 1×1 shortcuts too.

    The native CPU kernels have stride 1 only: the first block of each stage runs on ``torch``
    (``why("ss_block", convs=…)`` says so), the others take what there is.

    Args:
        widths: output channels of the stages; the first block of each halves the map.
        n_blocks: basic blocks a stage.
        dropout: probability after each block, in training mode (pre-training) only.
        eps: of the norms.
    """

    def __init__(
        self,
        widths: Sequence[int] = (160, 320, 640),
        *,
        n_blocks: int = 4,
        dropout: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.epilogue = Epilogue("after_residual", slope=0.0)
        self.feature_dim = widths[-1]
        n_stem = max(1, widths[0] // 2)
        self.stem = ScaleShiftConv2d(3, n_stem, 3, padding=1, norm=ChannelNorm2d(n_stem, eps=eps))
        self.stages = nn.ModuleList(
            nn.ModuleList(
                BasicBlock(n_out if i else n_in, n_out, stride=1 if i else 2, eps=eps)
                for i in range(n_blocks)
            )
            for n_in, n_out in zip((n_stem, *widths[:-1]), widths, strict=True)
        )

    def blocks(self) -> list[nn.Module]:
        """The stages: Θ4 of the ablations is the last of them."""
        return list(self.stages)

    def embed(
        self,
        images: Tensor,
        *,
        n_groups: int = 0,
        mask: Tensor | None = None,
        weights: Sequence[EffectiveWeights | None] | None = None,
    ) -> Embeddings:
        operands = self._operands(weights)
        if mask is not None:
            images = images.where(mask.view(-1, 1, 1, 1), 0)  # a weight's gradient would be 0·NaN
        out = normalised_conv(
            images,
            next(operands),
            epilogue=self.epilogue,
            **self._options(n_groups, mask),
        )
        x, statistics = out.output, Statistics(out.statistics)
        for block in (module for module in self.modules() if isinstance(module, BasicBlock)):
            shortcut = None if block.shortcut is None else next(operands)
            out = ss_block(
                x,
                [next(operands) for _ in block.convs],
                shortcut,
                epilogue=self.epilogue,
                **self._options(n_groups, mask),
            )
            statistics.extend(out.statistics)
            x = self._dropout(out.output)
        return Embeddings(x.mean(dim=(2, 3)), statistics)

    def _operands(self, weights: Sequence[EffectiveWeights | None] | None) -> Iterator[ConvOperands]:
        """Those of all convolutions, in order."""
        for i, conv in enumerate(self.convs()):
            yield conv.operands(None if weights is None else weights[i])
