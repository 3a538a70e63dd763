"""Any torch network as an encoder of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..kernels.contracts import EffectiveWeights, Granularity
from .encoder import Embeddings, Encoder, Statistics


class NetworkEncoder(Encoder):
    """A network that maps images [N, 3, H, W] to features [N, feature_dim], with its stored statistics.

    What requires a gradient is what the engine trains: Φ after `convert`, the weights of a plain network. The
    network stays in evaluation mode, whatever `train` asks for: its norms use the statistics of pre-training
    (`frozen`, the only norm mode it has) and its dropout is off.

    Args:
        network: usually ``convert(model)``, its classifier taken off (``model.fc = nn.Identity()``).
        feature_dim: D.

    Raises:
        ValueError: a batch norm without running statistics: a feature would depend on the other images.
    """

    _contiguous = False  # whether it has asked for images that lie by rows of one channel

    def __init__(self, network: nn.Module, feature_dim: int) -> None:
        super().__init__()
        for name, module in network.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
                raise ValueError(
                    f"network: {name or 'it'} has no running statistics; batch norms need track_running_stats"
                )
        self.network = network
        self.feature_dim = feature_dim
        self.eval()

    @property  # of other encoders a plain attribute
    def backend(self) -> str:
        """Of the network's scale-and-shift convolutions; setting it sets theirs."""
        return next((conv.backend for conv in self.convs()), "auto")

    @backend.setter
    def backend(self, backend: str) -> None:
        for conv in self.convs():
            conv.backend = backend

    def train(self, mode: bool = True) -> NetworkEncoder:
        """Stays in evaluation mode."""
        return super().train(False)

    def enable_scale_shift(
        self,
        granularity: Granularity = "kernel",
        *,
        last_block_only: bool = False,
        shift: Literal["every", "biased"] = "every",
    ) -> None:
        """Starts Φ anew; see `Encoder.enable_scale_shift`. The network must be a converted one."""
        if not self.convs():
            raise ValueError(
                "network: has no scale-and-shift convolutions; give NetworkEncoder(convert(model), …)"
            )
        super().enable_scale_shift(granularity, last_block_only=last_block_only, shift=shift)

    def refresh(
        self, *, fold: bool = True, dtype: torch.dtype | None = None
    ) -> tuple[EffectiveWeights | None, ...]:
        """None of every layer: the network calls its convolutions itself, and they read their own Φ."""
        return (None,) * len(self.convs())

    def embed(
        self,
        images: Tensor,
        *,
        n_groups: int = 0,
        mask: Tensor | None = None,
        weights: Sequence[EffectiveWeights | None] | None = None,
    ) -> Embeddings:
        """Features of the images, see `Encoder.embed`; `weights` hold nothing here.

        Raises:
            ValueError: batch statistics are asked for, or the network's output is not [N, feature_dim].
        """
        if n_groups != 0 or mask is not None:
            raise ValueError(
                "n_groups, mask: a NetworkEncoder has stored statistics only; use norm 'frozen', or an encoder "
                "of this package for batch statistics"
            )
        features = self._output(images)
        expected = (len(images), self.feature_dim)
        if not isinstance(features, Tensor) or features.shape != expected:
            got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"network: gives {got} for images {list(images.shape)}, expected {list(expected)}; let it end with "
                "its features, pooled and flattened, and name their width"
            )
        return Embeddings(features, Statistics())

    def _output(self, images: Tensor) -> Any:
        """The network's output; it gets channels-last images, or contiguous ones where it asks for those."""
        if not self._contiguous:
            try:
                return self.network(images)
            except RuntimeError as error:
                if "view size is not compatible" not in str(error):
                    raise
                # It ends with `x.view(len(x), -1)`, as Conv-4 is often written.
                self._contiguous = True
        return self.network(images.contiguous())
