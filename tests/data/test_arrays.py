"""Images in every form that people hold them in, against the same images as bytes; labels of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mtl_fast.data.arrays import code_labels, pairs_of, uint8_images
from mtl_fast.errors import InputError

BYTES = torch.randint(256, (3, 4, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
GREY = BYTES[..., :1].expand(3, 4, 5, 3)
FORMS: dict[str, Any] = {
    "bytes": BYTES,
    "channels-first": BYTES.permute(0, 3, 1, 2),
    "numpy": BYTES.numpy(),
    "numpy-backwards": BYTES.flip(2).numpy()[:, :, ::-1],
    "numpy-channels-first": np.ascontiguousarray(BYTES.numpy().transpose(0, 3, 1, 2)),
    "float": BYTES / 255,
    "double": BYTES.double() / 255,
    "foreign": (BYTES.numpy() / 255).astype(">f8"),
    "requires-grad": (BYTES / 255).requires_grad_(),
    "list": list(BYTES.permute(0, 3, 1, 2)),
    "tuple-of-arrays": tuple(BYTES.numpy()),
    "generator": (image for image in BYTES),
    "pil": [Image.fromarray(image) for image in BYTES.numpy()],
}
GREY_FORMS: dict[str, Any] = {
    "grey": BYTES[..., 0],
    "grey-float": BYTES[..., 0] / 255,
    "grey-last": BYTES[..., :1],
    "grey-first": BYTES[:, None, ..., 0],
    "grey-pil": [Image.fromarray(image) for image in BYTES[..., 0].numpy()],
    "palette-pil": [Image.fromarray(image).convert("P") for image in BYTES[..., 0].numpy()],
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_form_gives_the_same_bytes(form: Any) -> None:
    found = uint8_images(form)
    assert found.is_contiguous()
    assert torch.equal(found, BYTES)


@pytest.mark.parametrize("form", GREY_FORMS.values(), ids=GREY_FORMS.keys())
def test_grey_is_repeated(form: Any) -> None:
    found = uint8_images(form)
    assert found.is_contiguous()
    assert torch.equal(found, GREY)


def test_floating_values_are_rounded_to_the_nearest_byte() -> None:
    every_half = torch.arange(0x3C01, dtype=torch.int16).view(torch.half)  # 0..1
    expected = every_half.double().mul(255).round().to(torch.uint8)
    assert torch.equal(uint8_images(every_half.view(1, -1, 1))[0, :, 0, 0], expected)


def test_many_floating_images_are_read_in_parts() -> None:
    images = torch.rand(2500, 1, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uint8_images(images)[..., 0], (255 * images).round().to(torch.uint8))


def test_bytes_are_not_copied_and_read_only_ones_are(tmp_path: Path) -> None:
    array = BYTES.numpy().copy()
    assert uint8_images(array).data_ptr() == array.ctypes.data
    np.save(tmp_path / "images.npy", array)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    assert torch.equal(uint8_images(mapped), BYTES)


def test_a_layout_settles_what_the_shape_leaves_open() -> None:
    square = torch.arange(18, dtype=torch.uint8).view(1, 3, 2, 3)
    with pytest.raises(InputError, match=r"\[1, 3, 2, 3\] can be .*layout='HWC' or 'CHW'"):
        uint8_images(square)
    assert torch.equal(uint8_images(square, "HWC"), square)
    assert torch.equal(uint8_images(square, "CHW"), square.permute(0, 2, 3, 1))


PAIR = [BYTES[0], BYTES[1, :3]]


@pytest.mark.parametrize(
    ("images", "layout", "message"),
    [
        (BYTES.long(), None, "images: are int64; give uint8"),
        (BYTES > 9, None, "images: are bool; give uint8"),
        (BYTES.float(), None, r"floating values are 0\.\.25\d; expected 0\.\.1"),
        (BYTES / 255 - 0.5, None, r"floating values are -0\.5\.\.0\.\d+; expected 0\.\.1"),
        (torch.full((1, 2, 2), torch.nan), None, r"floating values are nan\.\.nan"),
        (BYTES[..., :2], None, r"\[3, 4, 5, 2\] has neither 3 channels \(RGB\) nor 1 \(grey\)"),
        (torch.zeros(2, 5, 5, 4), None, "of RGBA keep three"),
        (BYTES, "CHW", r"\[3, 4, 5, 3\] has neither .* in layout CHW"),
        (BYTES, "NHWC", "layout 'NHWC' is unknown; choose HWC or CHW"),
        (BYTES[0, 0], None, r"\[5, 3\] is no \[N, H, W, C\]"),
        (BYTES[:0], None, r"\[0, 4, 5, 3\] is no \[N, H, W, C\].* with anything in it"),
        ([], None, r"\[0\] is no"),
        (PAIR, None, r"images: 0 is uint8 \[4, 5, 3\], 1 is uint8 \[3, 5, 3\]; resize"),
        ([BYTES[0], BYTES[1] / 255], None, r"1 is float32"),
        (np.array([object()]), None, "images: are of dtype object"),
        (["a.png"], None, "images: a str is no array, tensor or PIL image"),
        ("a.png", None, "images: a str holds none"),
        (7, None, "images: a int holds none"),
        ([Image.new("I;16", (2, 2))], None, r"a PIL image has more than 8 bits a channel \(mode I;16\)"),
    ],
)
def test_images_of_another_kind_are_named(images: Any, layout: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        uint8_images(images, layout)


@pytest.mark.parametrize(
    ("labels", "values", "codes"),
    [
        ([7, 3, 7], (3, 7), [1, 0, 1]),
        (np.array([7, 3, 7], dtype=np.uint8), (3, 7), [1, 0, 1]),
        (torch.tensor([7, 3, 7]), (3, 7), [1, 0, 1]),
        ([torch.tensor(7), np.int64(3), 7], (3, 7), [1, 0, 1]),
        (["b", "a", "b"], ("a", "b"), [1, 0, 1]),
        (np.array(["b", "a", "b"]), ("a", "b"), [1, 0, 1]),
        ([("x", 1), ("x", 0)], (("x", 0), ("x", 1)), [1, 0]),
        ([2, "a", None, 2], (2, "a", None), [0, 1, 2, 0]),
        ([True, False], (False, True), [1, 0]),
        ([], (), []),
    ],
)
def test_labels_of_every_kind(labels: Any, values: tuple[Any, ...], codes: list[int]) -> None:
    coded = code_labels(labels)
    assert coded.values == values
    assert coded.codes.dtype == torch.int64
    assert coded.codes.tolist() == codes


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2, 3), r"labels: expected one an image, \[N\], got \[2, 3\]"),
        ([0, [1]], "labels: a list is no label"),
        ([("x", [1])], "labels: a tuple is no label"),
        ([torch.zeros(2), torch.zeros(2)], "labels: a Tensor is no label"),
        ([0.0, float("nan")], "labels: some are NaN"),
    ],
    ids=["one-hot", "list", "tuple", "tensors", "nan"],
)
def test_what_is_no_label_is_named(labels: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        code_labels(labels)


def test_pairs_of_a_data_set() -> None:
    images, labels = pairs_of(torch.utils.data.TensorDataset(BYTES, torch.tensor([4, 2, 4])))
    assert torch.equal(torch.stack(images), BYTES)
    assert [int(label) for label in labels] == [4, 2, 4]
    with pytest.raises(InputError, match=r"dataset: item 1 is no \(image, label\) pair but a Tensor"):
        pairs_of([(BYTES[0], 1), BYTES[0]])
    with pytest.raises(InputError, match="dataset: is empty"):
        pairs_of([])
