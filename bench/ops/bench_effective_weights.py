"""The refresh of all layers of ResNet-12, once a meta-step: `pytest bench/ops/bench_effective_weights.py`.

The peer writes the two equations out a layer. Every row is checked against it in float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_fast.nn import ResNet12
from mtl_fast.ops import ConvOperands, effective_weights

WIDTHS = {"slim": (32, 64, 96, 128), "full": (64, 128, 256, 512)}
Pairs = list[tuple[Tensor, Tensor]]


def problem(widths: str, granularity: str, dtype: torch.dtype) -> list[ConvOperands]:
    torch.manual_seed(0)
    encoder = ResNet12(WIDTHS[widths], shortcut_scale_shift=True).to(memory_format=torch.channels_last)
    encoder.enable_scale_shift(granularity)  # type: ignore[arg-type]  # a word of the parametrisation
    with torch.no_grad():
        for parameter in encoder.scale_shift_parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return [conv.operands() for conv in encoder.to(dtype).convs()]


@torch.no_grad()
def written_out(convs: list[ConvOperands]) -> Pairs:
    found = []
    for conv in convs:
        f, norm = conv.filters, conv.norm
        ratio = norm.weight / (norm.var + norm.eps).sqrt()
        weight = f.weight * conv.scale * ratio.view(-1, 1, 1, 1)
        found.append((weight, (f.bias + conv.shift - norm.mean) * ratio + norm.bias))
    return found


def ours(convs: list[ConvOperands]) -> Pairs:
    return [(e.weight, e.shift) for e in effective_weights(convs)]


WAYS: dict[str, Callable[[list[ConvOperands]], Pairs]] = {
    "peer_written_out": written_out,
    "effective_weights": ours,
}


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("granularity", ["kernel", "filter"])
@pytest.mark.parametrize("name", WAYS)
def test_refresh(benchmark: Any, name: str, granularity: str, widths: str) -> None:
    benchmark.group = f"16 layers of {WIDTHS[widths]}, {granularity}, {torch.get_num_threads()} threads"
    convs = problem(widths, granularity, torch.float32)
    exact = written_out(problem(widths, granularity, torch.float64))
    for pair, expected in zip(WAYS[name](convs), exact, strict=True):
        for a, e in zip(pair, expected, strict=True):
            # A handful of roundings a value.
            assert (a - e).abs().max() <= 8 * torch.finfo(torch.float32).eps * e.abs().max()
    benchmark.pedantic(WAYS[name], args=(convs,), rounds=15, warmup_rounds=2)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-q"]))
