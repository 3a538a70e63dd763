"""`images` against a loop over images in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtl_fast.ops.images import images

MEAN, STD = torch.tensor([125.3, 123.0, 113.9]), torch.tensor([63.0, 62.1, 66.7])
SHAPES = {"one": (1, 1, 1), "prime": (5, 7, 11), "tall": (3, 13, 2), "usual": (40, 32, 32)}


def make(n: int, h: int, w: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (n, h, w, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def loop(
    store: Tensor,
    index: Tensor,
    *,
    crop: Tensor | None = None,
    size: tuple[int, int] | None = None,
    padding: int = 0,
    flip: Tensor | None = None,
    dtype: type = np.float64,
) -> np.ndarray:
    """One image at a time: pad, cut, mirror, normalise."""
    out = []
    for position, row in enumerate(index.tolist()):
        image = np.pad(store[row].numpy(), ((padding, padding), (padding, padding), (0, 0)))
        h, w = size or tuple(store.shape[1:3])
        top, left = (image.shape[0] - h) // 2, (image.shape[1] - w) // 2
        if crop is not None:
            top, left = crop[position].tolist()
        image = image[top : top + h, left : left + w]
        if flip is not None and flip[position]:
            image = image[:, ::-1]
        out.append((image.astype(dtype) - MEAN.numpy().astype(dtype)) / STD.numpy().astype(dtype))
    return np.stack(out).transpose(0, 3, 1, 2)


def arguments(
    store: Tensor, b: int, size: tuple[int, int] | None, padding: int, crop: bool, flip: bool
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(b)
    h, w = size or tuple(store.shape[1:3])
    options: dict[str, Any] = {"size": size, "padding": padding}
    if crop:
        last = store.shape[1] + 2 * padding - h, store.shape[2] + 2 * padding - w
        options["crop"] = torch.stack([torch.randint(end + 1, (b,), generator=g) for end in last], 1)
    if flip:
        options["flip"] = torch.rand(b, generator=g) < 0.5
    return options


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("crop", [False, True], ids=["centre", "crop"])
@pytest.mark.parametrize("flip", [False, True], ids=["straight", "flip"])
@pytest.mark.parametrize("smaller", [0, 1, 5])
def test_equal_to_the_bit_to_a_loop_over_images(
    shape: tuple[int, int, int], padding: int, crop: bool, flip: bool, smaller: int
) -> None:
    store = make(*shape)
    size = (max(shape[1] - smaller, 1), max(shape[2] - smaller // 2, 1)) if smaller else None
    index = torch.randint(shape[0], (13,), generator=torch.Generator().manual_seed(1))
    options = arguments(store, 13, size, padding, crop, flip)
    for dtype, np_dtype in ((torch.float64, np.float64), (torch.float32, np.float32)):
        actual = images(store, index, mean=MEAN, std=STD, dtype=dtype, **options)
        expected = loop(store, index, dtype=np_dtype, **options)
        assert actual.dtype == dtype
        assert np.array_equal(actual.numpy(), expected)
        assert actual.is_contiguous(memory_format=torch.channels_last)


def test_float32_is_two_roundings_from_float64() -> None:
    """A subtraction and a division: at most one unit in the last place of the larger operand each."""
    store = make(4, 16, 16)
    index = torch.arange(4)
    single, double = (
        images(store, index, mean=MEAN, std=STD, dtype=dtype) for dtype in (torch.float32, torch.float64)
    )
    eps = torch.finfo(torch.float32).eps
    assert (single - double).abs().max() <= eps * (256 / STD.min() + double.abs().max())


def test_a_crop_corner_by_hand() -> None:
    store = torch.arange(2 * 2 * 3 * 3, dtype=torch.uint8).view(2, 2, 3, 3)
    out = images(
        store,
        torch.tensor([1, 1]),
        mean=torch.zeros(3),
        std=torch.ones(3),
        padding=1,
        size=(2, 2),
        crop=torch.tensor([[0, 0], [2, 3]]),
        flip=torch.tensor([True, False]),
    )
    assert out[:, 0].tolist() == [[[0, 0], [18, 0]], [[33, 0], [0, 0]]]


def test_padding_is_black_before_normalisation() -> None:
    out = images(make(1, 2, 2), torch.tensor([0]), mean=MEAN, std=STD, padding=2, size=(6, 6))
    assert torch.equal(out[0, :, 0, 0], -MEAN / STD)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_rounded_once(dtype: torch.dtype) -> None:
    store, index = make(3, 8, 8), torch.arange(3)
    expected = images(store, index, mean=MEAN, std=STD).to(dtype)
    assert torch.equal(images(store, index, mean=MEAN.double(), std=STD, dtype=dtype), expected)


def test_the_store_is_not_written_to_and_no_images_are_fine() -> None:
    store = make(3, 8, 8)
    before = store.clone()
    images(store, torch.arange(3), mean=MEAN, std=STD, padding=1)
    assert torch.equal(store, before)
    nothing = torch.zeros(0, dtype=torch.int64)
    assert images(store, nothing, mean=MEAN, std=STD).shape == (0, 3, 8, 8)
    assert images(store, nothing, mean=MEAN, std=STD, padding=1, size=(4, 4)).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"store": make(3, 8, 8).float()}, TypeError, "store: .*uint8.*float32"),
        ({"store": make(3, 8, 8).permute(0, 3, 1, 2)}, ValueError, r"store: .*\[3, 3, 8, 8\]"),
        ({"store": make(3, 8, 8).transpose(1, 2)}, ValueError, "store: .*not dense"),
        ({"index": torch.zeros(2, 2).long()}, ValueError, r"index: .*\[2, 2\]"),
        ({"index": torch.zeros(2)}, TypeError, "index: .*int64.*float32"),
        ({"index": torch.tensor([0, 3])}, ValueError, r"index: 0\.\.3 .*0\.\.2"),
        ({"index": torch.tensor([-1, 0])}, ValueError, r"index: -1\.\.0"),
        ({"index": torch.zeros(2, device="meta").long()}, ValueError, "index: is on meta"),
        ({"mean": torch.zeros(1)}, ValueError, r"mean: .*\[3\].*\[1\]"),
        ({"std": torch.ones(3, 1)}, ValueError, r"std: .*\[3\].*\[3, 1\]"),
        ({"crop": torch.zeros(3, 2).long()}, ValueError, r"crop: .*\[2, 2\].*\[2\].*\[3, 2\]"),
        ({"crop": torch.zeros(2, 2)}, TypeError, "crop: .*int64"),
        ({"crop": torch.tensor([[0, 0], [3, 2]])}, ValueError, r"crop: .*\(2, 2\).*\[3, 2\]"),
        ({"crop": torch.tensor([[0, 0], [0, -1]])}, ValueError, r"crop: .*\[0, -1\]"),
        ({"flip": torch.ones(3).bool()}, ValueError, r"flip: .*\[2\].*\[3\]"),
        ({"flip": torch.ones(2)}, TypeError, "flip: .*bool"),
        ({"size": (9, 6)}, ValueError, "size: .*9×6.*8×8"),
        ({"size": (6, 0)}, ValueError, "size: .*6×0"),
        ({"padding": -1}, ValueError, "padding: .*-1"),
        ({"dtype": torch.uint8}, TypeError, "dtype: .*uint8"),
        ({"backend": "none"}, ValueError, "images: .*'none'"),
    ],
)
def test_a_broken_contract_names_the_argument(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    options: dict[str, Any] = {
        "store": make(3, 8, 8),
        "index": torch.tensor([0, 2]),
        "mean": MEAN,
        "std": STD,
        "size": (6, 6),
    }
    with pytest.raises(error, match=message):
        images(**(options | change))
