"""The scale-and-shift convolution: rows of `python -m bench ops`, and `pytest bench/ops/bench_ss_conv.py`.

The rows are the convolutions of ResNet-12 that keep their channels, forward and all gradients, beside conv2d with the
scale multiplied onto the weight; that of a filter also onto the output, which saves the weight's gradient. The tests
under pytest-benchmark add what surrounds a convolution (norm, activation, pooling, effective weights at hand), a slim
network's size and a small one of the full network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.accuracy import Expected, behind_kinks, convolution_bound, mismatch
from bench.harness import Against, Case, Contender, Family, Row, Target
from bench.networks import native_backend
from mtl_fast.ops import ChannelNorm, ConvOperands, Epilogue, FrozenFilters, effective_weights, ss_conv

# channels, pixels of the maps
ROWS = ((64, 84), (128, 42), (256, 21), (512, 10), (64, 32), (128, 16), (256, 8), (512, 4))
QUICK_ROWS = ((8, 12), (16, 6))
TARGETS = {"kernel": Target(2.2, 3.5), "filter": Target(3, 5)}
FORMATS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
IMAGES_AT_ONCE = 8  # in float64

Convolve = Callable[[Tensor, ConvOperands], Tensor]


def operands(
    channels: int, granularity: str, normal: Callable[..., Tensor], norm: ChannelNorm | None = None
) -> ConvOperands:
    weight = normal(channels, channels, 3, 3) / (9 * channels) ** 0.5
    scale = 1 + 0.1 * normal(channels, channels if granularity == "kernel" else 1, 1, 1)
    filters = FrozenFilters(weight.contiguous(memory_format=torch.channels_last), normal(channels), padding=1)
    return ConvOperands(filters, scale, normal(channels), norm)


def rows(quick: bool) -> Sequence[Row]:
    shapes, batch = (QUICK_ROWS, 4) if quick else (ROWS, 80)
    return [
        Row(
            f"ss_conv, {granularity}, {channels} @ {pixels}, batch {batch}",
            lambda g=granularity, c=channels, p=pixels: conv_case(g, batch, c, p),
            family,
        )
        for granularity in TARGETS
        for family in [Family(f"ss_conv, {granularity}", len(shapes), TARGETS[granularity])]
        for channels, pixels in shapes
    ]


def conv_case(granularity: str, batch: int, channels: int, pixels: int, ours: Convolve | None = None) -> Case:
    """Forward, dx, dscale and dshift in float32; `ours` stands in for `ss_conv`, to see a wrong one refused."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    conv = operands(channels, granularity, normal)
    x, cotangent = (
        normal(batch, channels, pixels, pixels).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    backend, note = native_backend()

    def native(x: Tensor, conv: ConvOperands) -> Tensor:
        return ss_conv(x, conv, backend=backend)

    def contender(name: str, way: Convolve, memory_format: torch.memory_format) -> Contender:
        made = _converted(conv, torch.float32, memory_format)
        inputs = [t.contiguous(memory_format=memory_format) for t in (x, cotangent)]
        return Contender(name, lambda: _all_gradients(way, made, *inputs))

    bounds = dict.fromkeys(("y", "dx"), convolution_bound(9 * channels))
    bounds |= dict.fromkeys(("dscale", "dshift"), convolution_bound(9 * batch * pixels**2))
    exact = _exact(conv, x, cotangent)
    ways = {name: (bare, memory_format) for name, memory_format in FORMATS.items()}
    if granularity == "filter":
        ways |= {
            f"output scaled, {name}": (output_scaled, memory_format)
            for name, memory_format in FORMATS.items()
        }
    return Case(
        ours=contender("ours", ours or native, torch.channels_last),
        peers=tuple(contender(name, *way) for name, way in ways.items()),
        against=(Against(tuple(ways)),),
        expected={name: Expected(value, bounds[name]) for name, value in exact.items()},
        # Forward, the images' gradient and the weight's: a multiplication and an addition each.
        flops=3 * 2 * 9 * batch * channels**2 * pixels**2,
        why_not_native=note,
    )


def bare(x: Tensor, conv: ConvOperands) -> Tensor:
    """Equation 3 as it stands, nothing around it."""
    f = conv.filters
    return F.conv2d(x, f.weight * conv.scale, f.bias + conv.shift, padding=1)


def output_scaled(x: Tensor, conv: ConvOperands) -> Tensor:
    """The same with the scale of a filter on what it gives: no gradient of a weight."""
    f = conv.filters
    return torch.addcmul(
        (f.bias + conv.shift).view(-1, 1, 1), F.conv2d(x, f.weight, padding=1), conv.scale.view(-1, 1, 1)
    )


def _converted(conv: ConvOperands, dtype: torch.dtype, memory_format: torch.memory_format) -> ConvOperands:
    f = conv.filters
    weight = f.weight.to(dtype).contiguous(memory_format=memory_format)
    filters = FrozenFilters(weight, f.bias.to(dtype), padding=1)
    return ConvOperands(filters, conv.scale.to(dtype), conv.shift.to(dtype))


def _all_gradients(way: Convolve, conv: ConvOperands, x: Tensor, cotangent: Tensor) -> Mapping[str, Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, conv.scale, conv.shift)]
    y = way(leaves[0], replace(conv, scale=leaves[1], shift=leaves[2]))
    gradients = torch.autograd.grad(y, leaves, cotangent)
    return {"y": y.detach()} | dict(zip(("dx", "dscale", "dshift"), gradients, strict=True))


def _exact(conv: ConvOperands, x: Tensor, cotangent: Tensor) -> Mapping[str, Tensor]:
    """In float64, a few images at a time."""
    wide = _converted(conv, torch.float64, torch.contiguous_format)
    parts = [
        _all_gradients(bare, wide, x.double(), c.double())
        for x, c in zip(x.split(IMAGES_AT_ONCE), cotangent.split(IMAGES_AT_ONCE), strict=True)
    ]
    by_image = {name: torch.cat([part[name] for part in parts]) for name in ("y", "dx")}
    return by_image | {name: sum(part[name] for part in parts) for name in ("dscale", "dshift")}


# What follows runs under pytest-benchmark. Images, channels, pixels: one task of 80 images in a slim network; a few
# in the full one.
SIZES = {"slim": (80, 64, 16), "full": (8, 256, 21)}
EPILOGUE = Epilogue("after_residual", 0.1, pool=True)


def problem(size: str, granularity: str, dtype: torch.dtype) -> tuple[Tensor, ConvOperands]:
    n, channels, pixels = SIZES[size]
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    x = normal(n, channels, pixels, pixels).contiguous(memory_format=torch.channels_last)
    norm = ChannelNorm(normal(channels), normal(channels).square() + 0.5, normal(channels), normal(channels))
    return x, operands(channels, granularity, normal, norm)


def plain(x: Tensor, conv: ConvOperands) -> Tensor:
    norm = conv.norm
    z = F.batch_norm(bare(x, conv), norm.mean, norm.var, norm.weight, norm.bias, eps=norm.eps)
    return F.max_pool2d(F.leaky_relu(z, 0.1), 2)


def refreshed(x: Tensor, conv: ConvOperands) -> Tensor:
    """With the meta-step's effective weights at hand, as support images are embedded in first order."""
    (effective,) = effective_weights([conv])
    return ss_conv(x, replace(conv, effective=effective), epilogue=EPILOGUE)


WAYS: dict[str, Convolve] = {
    "peer_plain": plain,
    "unfolded": lambda x, conv: ss_conv(x, conv, epilogue=EPILOGUE, fold=False),
    "folded": lambda x, conv: ss_conv(x, conv, epilogue=EPILOGUE),
    "refreshed": refreshed,
}
by_size = pytest.mark.parametrize("size", SIZES)
by_way = pytest.mark.parametrize("name", WAYS)
by_granularity = pytest.mark.parametrize("granularity", ["kernel", "filter"])


def forward(way: Convolve, x: Tensor, conv: ConvOperands) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"y": way(x, conv)}


def with_gradients(way: Convolve, x: Tensor, conv: ConvOperands) -> dict[str, Tensor]:
    leaves = {"x": x, "scale": conv.scale, "shift": conv.shift}
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    y = way(leaves["x"], replace(conv, scale=leaves["scale"], shift=leaves["shift"]))
    # A cotangent of both signs, cheap to make.
    gradients = torch.autograd.grad(y, list(leaves.values()), y.detach().sin())
    return {"y": y.detach()} | dict(zip(leaves, gradients, strict=True))


def check(run: Callable[..., dict[str, Tensor]], name: str, size: str, granularity: str) -> None:
    """What is timed, against the peer in float64; one rectifier and one pooling lie on the way."""
    n, channels, pixels = SIZES[size]
    bound = convolution_bound(n * pixels**2 + 9 * channels)
    exact = run(plain, *problem(size, granularity, torch.float64))
    expected = {k: Expected(v, bound) if k == "y" else behind_kinks(v, bound, 2) for k, v in exact.items()}
    assert not mismatch(run(WAYS[name], *problem(size, granularity, torch.float32)), expected)


@by_size
@by_granularity
@by_way
def test_forward(benchmark: Any, name: str, granularity: str, size: str) -> None:
    benchmark.group = (
        f"forward, {size} {SIZES[size]}, {granularity}, float32, {torch.get_num_threads()} threads"
    )
    check(forward, name, size, granularity)
    args = (WAYS[name], *problem(size, granularity, torch.float32))
    benchmark.pedantic(forward, args=args, rounds=7, warmup_rounds=1)


@by_size
@by_granularity
@pytest.mark.parametrize("name", ["peer_plain", "unfolded", "folded"])
def test_with_gradients(benchmark: Any, name: str, granularity: str, size: str) -> None:
    benchmark.group = (
        f"forward and gradients, {size} {SIZES[size]}, {granularity}, {torch.get_num_threads()} threads"
    )
    check(with_gradients, name, size, granularity)
    args = (WAYS[name], *problem(size, granularity, torch.float32))
    benchmark.pedantic(with_gradients, args=args, rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-q"]))
