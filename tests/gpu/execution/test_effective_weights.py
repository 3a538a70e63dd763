"""The PTX of the refresh of all layers' weights, executed, against float64."""

from __future__ import annotations

import pytest
import torch

from mtl_fast.kernels.reference.effective_weights import effective_weights
from mtl_fast.kernels.triton.effective_weights import refresh
from tests.conv_cases import Random
from tests.gpu.conv_backward_cases import assert_within
from tests.gpu.execution.cases import EPS32, TYPES, by_chip, rounded
from tests.gpu.ptx.launcher import emulated
from tests.native_cases import double

pytestmark = pytest.mark.proof
DTYPES = TYPES | {"fp32": torch.float32}


@by_chip
@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("fold", [True, False], ids=["folded", "not folded"])
def test_all_layers_in_one_launch(chip: str, kind: str, fold: bool) -> None:
    random = Random(1, torch.float32)
    layers = [
        random.conv(3, 64, granularity="kernel"),
        random.conv(3, 65, 1, granularity=None),
        random.conv(37, 71, granularity="filter", bias=False),
        random.conv(16, 1, granularity="kernel", norm=None),
        random.conv(160, 320, 1, granularity="kernel"),
    ]
    dtype = DTYPES[kind]
    with emulated(chip) as launches:
        got = refresh(layers, dtype, fold)
    assert len(launches) == 1
    for conv, (forward, rotated, shift) in zip(layers, got, strict=True):
        expected = effective_weights(double(conv), fold=fold and conv.norm is not None)
        weight, n_in = expected.weight, expected.weight.shape[1]
        # Six roundings of factors in float32, then one to the dtype.
        bound = 6 * EPS32 * weight.abs() + rounded(weight, dtype)
        assert_within(forward[..., :n_in].permute(0, 3, 1, 2), weight, bound, "forward")
        assert not forward[..., n_in:].any(), "padding"
        assert_within(rotated.permute(3, 0, 1, 2).flip(2, 3), weight, bound, "rotated")
        parts = [1.0 if t is None else t.double().abs() for t in (conv.filters.bias, conv.shift)]
        size = sum(parts) + 1.0
        if expected.folded:
            norm = conv.norm
            factor = norm.weight.double() / (norm.var.double() + norm.eps).sqrt()
            size = (size + norm.mean.double().abs()) * factor.abs() + norm.bias.double().abs()
        assert_within(shift, expected.shift, 8 * EPS32 * size, "shift")
