"""When the Triton backend of `ss_conv` and `ss_block` is taken, told where there is no GPU.

What it computes is tested where it can run: `tests/gpu`.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mtl_fast.kernels.contracts import ChannelNorm, ConvOperands, Epilogue, FrozenFilters
from mtl_fast.kernels.triton import interpreted
from mtl_fast.ops import ss_block, ss_conv
from mtl_fast.ops.backend import why
from tests.conv_cases import Random

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(interpreted(), reason="interpreted kernels take tensors of the CPU")

LEAKY = Epilogue("after_residual", 0.1, pool=True)


def conv(n_in: int, n_out: int, k: int) -> ConvOperands:
    """On a CUDA device that need not be there."""
    vectors = [torch.empty(n_out, device="cuda") for _ in range(6)]
    filters = FrozenFilters(torch.empty(n_out, n_in, k, k, device="cuda"), vectors[4], padding=k // 2)
    return ConvOperands(filters, vectors[5].view(n_out, 1, 1, 1), vectors[5], ChannelNorm(*vectors[:4]))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
def test_tensors_of_a_gpu_take_it(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        x, convs = torch.empty(2, 3, 7, 6, device="cuda", dtype=dtype), [conv(n, 5, 3) for n in (3, 5, 5)]
        assert why("ss_conv", x=x, conv=convs[0], epilogue=LEAKY).startswith("triton: Triton ")
        facts = {"x": x, "convs": convs, "shortcut": conv(3, 5, 1), "epilogue": LEAKY}
        assert why("ss_block", **facts).startswith("triton: Triton ")
        assert why("ss_block", **facts, n_groups=2, fold=False).startswith("triton: Triton ")


def test_what_it_has_not_goes_to_torch() -> None:
    with FakeTensorMode():
        x, layer = torch.empty(2, 3, 7, 6, device="cuda"), conv(3, 5, 3)
        for changed, words in (
            ({"x": x.double()}, "float64"),
            ({"fold": False}, "fold=False"),
            (
                {"conv": replace(layer, filters=replace(layer.filters, stride=2))},
                "stride 2; the Triton kernel",
            ),
            ({"epilogue": Epilogue("after_residual", -0.1)}, "slope -0.1"),
            ({"residual": x.half()}, "the residual"),
        ):
            text = why("ss_conv", **{"x": x, "conv": layer, **changed})
            assert text.startswith("torch: not triton: ")
            assert words in text


def test_exact_float32_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "conv", SimpleNamespace(fp32_precision="ieee"))
    with FakeTensorMode():
        x, layer = torch.empty(2, 3, 7, 6, device="cuda"), conv(3, 5, 3)
        assert "not triton: float32 without TF32" in why("ss_conv", x=x, conv=layer)
        assert why("ss_conv", x=x.half(), conv=layer).startswith("triton: ")


def test_on_a_cpu_it_is_silent_unless_asked_for() -> None:
    random = Random(0, torch.float32)
    x, layer = random.images(1, 3, 4, 4), random.conv(3, 4)
    assert "triton" not in why("ss_conv", x=x.double(), conv=layer).lower()
    with pytest.raises(
        RuntimeError, match=r"ss_conv: backend='triton' cannot run this call: a tensor is on cpu$"
    ):
        ss_conv(x, layer, backend="triton")
    with pytest.raises(
        RuntimeError, match=r"ss_block: backend='triton' cannot run this call: a tensor is on cpu$"
    ):
        ss_block(x, [layer], random.conv(3, 4, 1), epilogue=LEAKY, backend="triton")
