"""The encoder without gradient, ResNet-12, `frozen` norm: ours beside networks whose norm and Φ are folded by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .accuracy import Expected, convolution_bound
from .harness import Against, Case, Contender, Measurable, Row, Target
from .networks import (
    FULL,
    N_CONVS_DEEP,
    SLIM,
    direct_flops,
    images,
    layers_of,
    native_backend,
    trained_resnet12,
)
from .peers.meta_step import FoldedLayer, FrozenLayer, effective
from .peers.resnet12 import folded_resnet12

PEERS = ("NCHW", "channels-last", "channels-last, compiled")
IMAGES_AT_ONCE = 8  # in float64


def rows(quick: bool) -> Sequence[Measurable]:
    batch = 8 if quick else 80
    return [
        Row(
            f"encoder, forward, ResNet-12 @ {pixels}, batch {batch}",
            lambda pixels=pixels: _case(pixels, batch, quick),
        )
        for pixels in ((32,) if quick else (84, 32))
    ]


def _case(pixels: int, batch: int, quick: bool) -> Case:
    widths = SLIM if quick else FULL
    encoder = trained_resnet12(widths, pixels)
    weights = encoder.refresh()
    x = images(batch, pixels)

    def ours() -> Mapping[str, Tensor]:
        with torch.no_grad():
            return {"features": encoder.embed(x, weights=weights).features}

    exact = folded_network(layers_of(encoder, torch.float64), torch.contiguous_format)
    features = torch.cat([exact(part.double()) for part in x.split(IMAGES_AT_ONCE)])
    peers = []
    for name in PEERS:
        memory_format = torch.contiguous_format if name == "NCHW" else torch.channels_last
        run = folded_network(layers_of(encoder), memory_format, compiled="compiled" in name)
        y = x.contiguous(memory_format=memory_format)
        peers.append(Contender(name, lambda run=run, y=y: {"features": run(y)}))
    return Case(
        ours=Contender("ours", ours),
        peers=tuple(peers),
        against=(Against(PEERS, Target(2, 3)),),
        expected={"features": Expected(features, convolution_bound(9 * widths[-1], N_CONVS_DEEP))},
        flops=batch * direct_flops(widths, pixels),
        why_not_native=native_backend()[1],
    )


def folded_network(
    layers: Sequence[FrozenLayer], memory_format: torch.memory_format, *, compiled: bool = False
) -> Callable[[Tensor], Tensor]:
    """Images [N, 3, H, W] of that memory format → features [N, D], norm and Φ folded in once, without gradient."""
    folded = effective([FoldedLayer.of(layer, memory_format) for layer in layers])
    embed = torch.compile(folded_resnet12, dynamic=False) if compiled else folded_resnet12

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return embed(x, folded)

    return run
