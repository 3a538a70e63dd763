"""The convolutions of the encoders that kernels are shipped for: ResNet-12 in both widths, at both input sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

WIDTHS = ((64, 128, 256, 512), (64, 160, 320, 640))
SIZES = (84, 32)
N_IMAGES = 80
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Layer(NamedTuple):
    """One convolution without stride whose output is as large as its input.

    Attributes:
        n_in, n_out: I and O.
        size: height and width of its maps.
        n_taps: k, 3 or 1.
        last: whether the block's end follows: residual and pooling.
    """

    n_in: int
    n_out: int
    size: int
    n_taps: int
    last: bool

    @property
    def name(self) -> str:
        """Such as ``64-128@42 3x3``."""
        return f"{self.n_in}-{self.n_out}@{self.size} {self.n_taps}x{self.n_taps}"

    def images(self, n_channels: int, dtype: torch.dtype, *, size: int | None = None) -> Tensor:
        """Images [N, n_channels, size, size] of the meta device, channels-last."""
        size = self.size if size is None else size
        return torch.empty(
            N_IMAGES,
            n_channels,
            size,
            size,
            dtype=dtype,
            device="meta",
            memory_format=torch.channels_last,
        )


def encoder_layers() -> Iterator[Layer]:
    """Each once, in the order of size and depth: a block's first convolution, its shortcut, its later ones."""
    seen = set()
    for input_size in SIZES:
        for widths in WIDTHS:
            size, n_in = input_size, 3
            for n_out in widths:
                for layer in (
                    Layer(n_in, n_out, size, 3, False),
                    Layer(n_in, n_out, size, 1, False),
                    Layer(n_out, n_out, size, 3, False),
                    Layer(n_out, n_out, size, 3, True),
                ):
                    if layer not in seen:
                        seen.add(layer)
                        yield layer
                size, n_in = size // 2, n_out
