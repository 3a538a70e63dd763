"""The end of a residual block as one launch, in the interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

from mtl_fast.kernels.contracts import Epilogue
from mtl_fast.kernels.triton import block_end
from mtl_fast.kernels.triton.launch import observed
from tests.gpu.conv_backward_cases import assert_within
from tests.gpu.conv_forward_cases import DTYPES, Layer, assert_epilogue, by_epilogue, packed

pytestmark = pytest.mark.proof

# N, channels of the last convolution's input, O, H, W, channels of the block's input
SHAPES = {
    "first block": (2, 8, 5, 5, 6, 3),
    "later block": (1, 12, 7, 3, 7, 20),
    "two accumulators": (1, 32, 160, 2, 3, 16),
    "chunks of both": (1, 70, 16, 3, 2, 70),
}
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Layer, Layer]:
    """The last convolution and the shortcut."""
    n, n_in, n_out, height, width, n_block = shape
    last = Layer((n, n_in, n_out, height, width, 3), 1, dtype, seed=1)
    return last, Layer((n, n_block, n_out, height, width, 1), 0, dtype, seed=2)


@DTYPES
@pytest.mark.parametrize("save", [True, False], ids=["training", "evaluation"])
@by_epilogue
@by_shape
def test_block_end(shape: tuple[int, ...], epilogue: Epilogue, save: bool, dtype: torch.dtype) -> None:
    last, shortcut = operands(shape, dtype)
    output, codes, residual = block_end.forward(
        last.x,
        packed(last.weight),
        last.shift,
        shortcut.x,
        packed(shortcut.weight),
        shortcut.shift,
        epilogue=epilogue,
        save=save,
    )
    added = shortcut.sum()
    if residual is not None:
        assert_within(
            residual,
            added.value,
            added.bound + torch.finfo(dtype).eps * (added.value.abs() + added.bound),
            "residual",
        )
        # What was kept is what was added.
        added = added._replace(value=residual.double())
    assert (residual is not None) == (save and epilogue.activation == "before_residual")
    assert_epilogue(output, codes, last.sum(), epilogue, added, save=save)


@pytest.mark.parametrize(
    ("activation", "save", "expected"),
    [
        ("after_residual", True, 1),
        ("after_residual", False, 1),
        ("before_residual", True, 2),
        ("before_residual", False, 1),
    ],
)
def test_launches(activation: str, save: bool, expected: int) -> None:
    last, shortcut = operands(SHAPES["first block"], torch.float32)
    with observed() as launches:
        block_end.forward(
            last.x,
            packed(last.weight),
            last.shift,
            shortcut.x,
            packed(shortcut.weight),
            shortcut.shift,
            epilogue=Epilogue(activation, 0.1, pool=True),
            save=save,
        )
    assert len(launches) == expected


def test_shipped_launches_say_their_work() -> None:
    launches = dict(block_end.shipped())
    launch = launches["end/64-128-128@42 3x3 after_residual training bf16"]
    pixels = 80 * 42 * 42
    assert launch.work.flop == 2 * pixels * 128 * (9 * 128 + 64)
    assert launch.work.read == 2 * (pixels * (128 + 64) + 128 * (9 * 128 + 64)) + 2 * 4 * 128
    assert launch.work.written == (2 + 1) * pixels // 4 * 128
    # The odd last row and column of 21 are not computed.
    odd = launches["end/128-256-256@21 3x3 after_residual evaluation bf16"]
    assert odd.work.flop == 2 * 80 * 20 * 20 * 256 * (9 * 256 + 128)
    assert "shortcut/3-64-64@32 3x3 before_residual training fp16" in launches
