"""`mtl-fast tune`: measures on this card which convolution each layer of ResNet-12 takes, and stores the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import torch

from .errors import InputError
from .kernels import triton as kernels
from .ops import ConvOperands, Epilogue, FrozenFilters, routes, ss_conv
from .ops.routes import ROUTES, LayerShape, Route
from .text_table import grid

N_WARM_UP, N_SAMPLES = 5, 20
# Seconds of a layer by a route: (layer, route, images, device).
Measure = Callable[[LayerShape, Route, int, torch.device], float]


def tune(
    *,
    widths: Sequence[int],
    image_sizes: Sequence[int],
    precisions: Sequence[str],
    n_images: int,
    device: str,
) -> Path:
    """Measures every layer by both routes, prints the table and stores it.

    Args:
        widths: output channels of the blocks.
        image_sizes: height and width of the images.
        precisions: ``bf16``, ``fp16`` or ``fp32``.
        n_images: in one batch.
        device: a CUDA device.

    Returns:
        The file of the table.

    Raises:
        InputError: no such GPU, or Triton is missing.
    """
    card = require_gpu(device)
    layers = list(layers_of(widths, image_sizes, precisions))
    seconds = measure_all(layers, n_images, card, seconds_of)
    print(text(seconds))
    return routes.store(card, seconds)


def require_gpu(device: str) -> torch.device:
    """The device, which there is and which Triton compiles for.

    Raises:
        InputError: there is none; the message says why.
    """
    if not torch.cuda.is_available():
        reason = "this torch was built without CUDA" if torch.version.cuda is None else "no driver or no card"
        raise InputError(f"an NVIDIA GPU is needed, and torch finds none ({reason})")
    try:
        card = torch.device(device)
        torch.cuda.get_device_name(card)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(f"device {device!r}: {str(error).partition(chr(10))[0]}") from error
    can, reason = kernels.load()
    if not can:
        raise InputError(reason)
    return card


def layers_of(
    widths: Sequence[int], image_sizes: Sequence[int], precisions: Sequence[str]
) -> Iterator[LayerShape]:
    """The 3×3 convolutions and the shortcuts of ResNet-12, each once."""
    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    seen = set()
    for precision in precisions:
        for pixels in image_sizes:
            for block, (n_in, n_out) in enumerate(zip((3, *widths), widths, strict=False)):
                side = pixels >> block
                for channels, taps in ((n_in, 3), (n_out, 3), (n_in, 1)):
                    layer = LayerShape(channels, n_out, side, side, taps, names[precision])
                    if side and layer not in seen:
                        seen.add(layer)
                        yield layer


def measure_all(
    layers: Sequence[LayerShape], n_images: int, card: torch.device, measure: Measure
) -> dict[LayerShape, dict[Route, float]]:
    """Seconds of each layer by each route."""
    return {layer: {name: measure(layer, name, n_images, card) for name in ROUTES} for layer in layers}


def text(seconds: dict[LayerShape, dict[Route, float]]) -> str:
    """A line a layer: both times and what is taken."""
    rows = [
        [str(layer), *(f"{by[name] * 1e6:.0f}" for name in ROUTES), min(by, key=lambda name: by[name])]
        for layer, by in seconds.items()
    ]
    return grid(["layer", *(f"{name}, µs" for name in ROUTES), "takes"], rows, "plain")


def seconds_of(layer: LayerShape, name: Route, n_images: int, card: torch.device) -> float:
    """Median of a forward and a backward pass with activation and gradients of x, Φ_S1 and Φ_S2."""
    step = training_step(layer, n_images, card)
    samples = []
    with routes.forced(name):
        for i in range(N_WARM_UP + N_SAMPLES):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            if i >= N_WARM_UP:
                samples.append(start.elapsed_time(end) / 1e3)
    return median(samples)


def training_step(
    layer: LayerShape, n_images: int, device: torch.device, backend: str = "triton"
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """What is measured, on random images, as one call that returns the gradients of x, Φ_S1 and Φ_S2."""
    dtype = getattr(torch, layer.dtype)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    n_in, n_out, height, width, taps, _ = layer
    x = draw(n_images, n_in, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = draw(n_out, n_in, taps, taps).div_((taps * taps * n_in) ** 0.5)
    scale, shift = torch.ones(n_out, n_in, 1, 1, device=device), torch.zeros(n_out, device=device)
    leaves = tuple(t.requires_grad_() for t in (x, scale, shift))
    filters = FrozenFilters(weight.contiguous(memory_format=torch.channels_last), padding=taps // 2)
    conv = ConvOperands(filters, scale, shift)
    cotangent = draw(n_images, n_out, height, width, dtype=dtype).contiguous(
        memory_format=torch.channels_last
    )

    def step() -> tuple[torch.Tensor, ...]:
        y = ss_conv(x, conv, epilogue=Epilogue("after_residual"), backend=backend)
        return torch.autograd.grad(y, leaves, cotangent)

    return step
