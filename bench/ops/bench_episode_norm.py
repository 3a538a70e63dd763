"""Batch statistics of each task's split: `pytest bench/ops/bench_episode_norm.py`.

The peer is PyTorch's batch_norm, one group after the other, and what follows it. `torch` is the definition,
`episode_norm` what runs by default (the native backend where it is built), `masked` the same with all images counted.
Every row is checked against the peer in float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.accuracy import EPS, Expected, behind_kinks, mismatch
from mtl_fast.ops import ChannelNorm, Epilogue, episode_norm

# images a group, channels, pixels
SHAPE = (80, 64, 16)
EPILOGUE = Epilogue("after_residual", 0.1, pool=True)
Run = Callable[[Tensor, ChannelNorm, int], Tensor]


def problem(n_groups: int, dtype: torch.dtype) -> tuple[Tensor, ChannelNorm, int]:
    per_group, channels, pixels = SHAPE
    g = torch.Generator().manual_seed(n_groups)
    z = torch.randn(n_groups * per_group, channels, pixels, pixels, generator=g).to(dtype)
    weight, bias = (torch.randn(channels, generator=g).to(dtype) for _ in range(2))
    return z.contiguous(memory_format=torch.channels_last), ChannelNorm(None, None, weight, bias), n_groups


def group_by_group(z: Tensor, norm: ChannelNorm, n_groups: int) -> Tensor:
    y = torch.cat(
        [F.batch_norm(part, None, None, norm.weight, norm.bias, training=True) for part in z.chunk(n_groups)]
    )
    return F.max_pool2d(F.leaky_relu(y, 0.1), 2)


def ours(z: Tensor, norm: ChannelNorm, n_groups: int, backend: str = "auto") -> Tensor:
    return episode_norm(z, norm, n_groups=n_groups, epilogue=EPILOGUE, backend=backend).output


def masked(z: Tensor, norm: ChannelNorm, n_groups: int) -> Tensor:
    mask = torch.ones(len(z), dtype=torch.bool)
    return episode_norm(z, norm, n_groups=n_groups, mask=mask, epilogue=EPILOGUE).output


WAYS: dict[str, Run] = {
    "peer_group_by_group": group_by_group,
    "torch": partial(ours, backend="torch"),
    "episode_norm": ours,
    "masked": masked,
}
by_way = pytest.mark.parametrize("name", WAYS)
by_groups = pytest.mark.parametrize("n_groups", [1, 4])


def forward(way: Run, z: Tensor, norm: ChannelNorm, n_groups: int) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"y": way(z, norm, n_groups)}


def with_gradient(way: Run, z: Tensor, norm: ChannelNorm, n_groups: int) -> dict[str, Tensor]:
    z = z.detach().requires_grad_()
    y = way(z, norm, n_groups)
    return {"y": y.detach(), "z": torch.autograd.grad(y, z, y.detach().sin())[0]}


def check(run: Callable[..., dict[str, Tensor]], name: str, n_groups: int) -> None:
    """Against the peer in float64: the rounding of a sum over the values of a channel, a rectifier and a pooling."""
    exact = run(group_by_group, *problem(n_groups, torch.float64))
    bound = 4 * EPS * (SHAPE[0] * SHAPE[2] ** 2) ** 0.5
    expected = {k: Expected(v, bound) if k == "y" else behind_kinks(v, bound, 2) for k, v in exact.items()}
    assert not mismatch(run(WAYS[name], *problem(n_groups, torch.float32)), expected)


@by_groups
@by_way
def test_forward(benchmark: Any, name: str, n_groups: int) -> None:
    benchmark.group = f"forward, {n_groups} × {SHAPE}, float32, {torch.get_num_threads()} threads"
    check(forward, name, n_groups)
    args = (WAYS[name], *problem(n_groups, torch.float32))
    benchmark.pedantic(forward, args=args, rounds=7, warmup_rounds=1)


@by_groups
@by_way
def test_with_gradient(benchmark: Any, name: str, n_groups: int) -> None:
    benchmark.group = f"forward and gradient, {n_groups} × {SHAPE}, {torch.get_num_threads()} threads"
    check(with_gradient, name, n_groups)
    args = (WAYS[name], *problem(n_groups, torch.float32))
    benchmark.pedantic(with_gradient, args=args, rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-q"]))
