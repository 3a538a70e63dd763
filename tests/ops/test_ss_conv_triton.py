"""When the Triton backend of `ss_conv` and `ss_block` is taken, told where there is no GPU.

What it computes is tested where it can run: `tests/gpu`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mtl_fast.kernels.contracts import ChannelNorm, ConvOperands, Epilogue, FrozenFilters
from mtl_fast.kernels.triton import interpreted, takes_tf32
from mtl_fast.ops import routes, ss_block, ss_conv
from mtl_fast.ops.backend import why
from tests.conv_cases import Random, convolutions_take

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


def test_the_reason_names_the_route_of_each_layer_and_where_it_comes_from() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, 7, 6, device="cuda", dtype=torch.bfloat16)
        convs, shortcut = [conv(n, 320, 3) for n in (3, 320, 320)], conv(3, 320, 1)
        alone = why("ss_conv", x=x, conv=conv(3, 64, 3))
        with routes.forced("triton"):
            block = why("ss_block", x=x, convs=convs, shortcut=shortcut)
        by_default = why("ss_block", x=x, convs=convs, shortcut=shortcut)
        assert "route" not in why("ss_conv", conv=convs[0])
        assert "route" not in why("episode_norm", z=x, norm=ChannelNorm(None, None))
    rule = "by default: at most 160 channels"
    assert alone.endswith(f"; route triton ({rule}) of 3→64@7×6, 3×3, bfloat16")
    layers = "3→320@7×6, 3×3, bfloat16 and of 320→320@7×6, 3×3, bfloat16 and of 3→320@7×6, 1×1, bfloat16"
    assert block.endswith(f"; route triton (forced) of {layers}")
    assert by_default.endswith(f"; route cudnn (by default: more than 160 channels) of {layers}")


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


def test_exact_float32_goes_to_torch() -> None:
    with convolutions_take("ieee"), FakeTensorMode():
        x, layer = torch.empty(2, 3, 7, 6, device="cuda"), conv(3, 5, 3)
        assert "not triton: float32 without TF32" in why("ss_conv", x=x, conv=layer)
        assert why("ss_conv", x=x.half(), conv=layer).startswith("triton: ")


def test_a_compiled_program_asks_for_tf32_once() -> None:
    """The compiler cannot read PyTorch's switch: what is compiled keeps what it was compiled with."""

    def asking(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if takes_tf32() else x - 1

    for precision, expected in (("tf32", 1.0), ("ieee", -1.0)):
        torch.compiler.reset()
        with convolutions_take(precision):
            compiled = torch.compile(asking, fullgraph=True, backend="eager")
            assert compiled(torch.zeros(1)).item() == expected


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
