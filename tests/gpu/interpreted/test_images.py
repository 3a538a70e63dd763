"""The Triton kernel of `images`, interpreted: equal to the bit to the reference, and nothing read beside the store."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_fast.kernels.triton import images as kernels
from mtl_fast.kernels.triton.launch import observed
from mtl_fast.ops.backend import why
from mtl_fast.ops.images import images
from tests.ops.test_images import MEAN, SHAPES, STD, arguments, make

by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])


def run(store: Tensor, index: Tensor, backend: str = "triton", **options: Any) -> Tensor:
    return images(store, index, mean=MEAN, std=STD, backend=backend, **options)


@pytest.mark.parametrize("shape", list(SHAPES.values())[:3], ids=list(SHAPES)[:3])
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("crop", [False, True], ids=["centre", "crop"])
@pytest.mark.parametrize("flip", [False, True], ids=["straight", "flip"])
@pytest.mark.parametrize("smaller", [0, 1, 5])
def test_equal_to_the_bit_to_the_reference(
    shape: tuple[int, int, int], padding: int, crop: bool, flip: bool, smaller: int
) -> None:
    store = make(*shape)
    size = (max(shape[1] - smaller, 1), max(shape[2] - smaller // 2, 1)) if smaller else None
    index = torch.randint(shape[0], (3,), generator=torch.Generator().manual_seed(1))
    options = arguments(store, 3, size, padding, crop, flip)
    actual = run(store, index, **options)
    assert torch.equal(actual, run(store, index, "torch", **options))
    assert actual.is_contiguous(memory_format=torch.channels_last)


@by_dtype
def test_an_image_of_several_pieces_is_rounded_once(dtype: torch.dtype) -> None:
    store = make(3, 23, 31)
    index = torch.tensor([2, 0])
    options = arguments(store, 2, (22, 29), 3, True, True)
    assert kernels.CONFIG.block < 22 * 29 * 3
    actual = run(store, index, dtype=dtype, **options)
    assert torch.equal(actual, run(store, index, "torch", dtype=dtype, **options))


def test_nothing_beside_the_store_is_read() -> None:
    """A store in the middle of a buffer, its first and last rows, windows that reach over every edge."""
    store = make(3, 5, 7)
    buffer = torch.full((store.numel() + 512,), 255, dtype=torch.uint8)
    middle = buffer[256 : 256 + store.numel()].view(store.shape)
    middle.copy_(store)
    index = torch.tensor([0, 2, 0, 2])
    options: dict[str, Any] = {
        "padding": 2,
        "crop": torch.tensor([[0, 0], [4, 4], [0, 4], [4, 0]]),
        "size": (5, 7),
    }
    assert torch.equal(run(middle, index, **options), run(store, index, "torch", **options))


def test_a_row_outside_the_store_is_nan_and_a_window_off_the_image_is_moved_inside() -> None:
    store = make(2, 3, 4)
    index, crop = torch.tensor([-1, 0, 2]), torch.tensor([[0, 0], [-5, 9], [0, 0]])
    out = kernels.images(store, index, MEAN, STD, crop, None, (2, 2), 1, torch.float32)
    assert out[[0, 2]].isnan().all()
    inside = torch.tensor([[0, 4]])
    assert torch.equal(out[1:2], run(store, index[1:2], "torch", crop=inside, size=(2, 2), padding=1))


def test_no_images_no_launch_and_one_launch_otherwise() -> None:
    store = make(2, 3, 4)
    nothing = run(store, torch.zeros(0, dtype=torch.int64))
    assert nothing.shape == (0, 3, 3, 4)
    with observed() as launches:
        run(store, torch.tensor([1, 0]), padding=1)
    assert [launch.name for launch in launches] == ["images_kernel"]


def test_opcheck_and_what_it_takes() -> None:
    store = make(2, 3, 4)
    inputs = (store, torch.tensor([1]), MEAN, STD, None, torch.tensor([True]), (2, 2), 0, torch.float16)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.mtl_fast.triton_images.default, inputs, test_utils=checks)
    assert why("images", store=store, dtype=torch.float16).startswith("triton: ")
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(RuntimeError, match=str(dtype).removeprefix("torch.")):
            why("images", "triton", store=store, dtype=dtype)


def test_planted_out_of_range_row() -> None:
    """A store that is said to be one row longer: the check that such an image is NaN sees what was read instead."""
    store = make(4, 5, 7)
    shorter, index = store[:3], torch.tensor([0, 3])
    with observed() as launches:
        kernels.images(shorter, index, MEAN, STD, None, None, (5, 7), 0, torch.float32)
    (launch,) = launches
    out = launch.arguments["p_out"]
    assert isinstance(out, Tensor)
    launch.run()
    assert out[1].isnan().all()
    replace(launch, arguments=launch.arguments | {"n_stored": 4}).run()
    assert not out[1].isnan().all()
