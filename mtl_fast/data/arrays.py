"""Images and labels as people hold them in memory, brought into the form of the image store."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtl_fast.errors import InputError

Layout = Literal["HWC", "CHW"]

_CHUNK = 1024  # images whose floating values are in memory twice


def uint8_images(images: Any, layout: Layout | None = None) -> Tensor:
    """uint8 [N, H, W, 3] of images in another form.

    Args:
        images: an array or a tensor, or a sequence of arrays, tensors or PIL images of one size:
            uint8, or floating in 0..1 (then 255·x, rounded); [N, H, W, C] or [N, C, H, W] with C 3 (RGB) or 1,
            or [N, H, W]. Grey is repeated.
        layout: ``HWC`` or ``CHW``; None reads it off the shape.

    Returns:
        Dense, on the device of `images`. May share its memory.

    Raises:
        InputError: no images; sizes or dtypes that differ; values of another kind or range; a shape that is
            neither layout or both, where `layout` is None; one line that says which.
    """
    if layout not in (None, "HWC", "CHW"):
        raise InputError(f"layout {layout!r} is unknown; choose HWC or CHW")
    batch = _batch(images)
    if batch.ndim == 3:
        batch = batch[..., None]
    elif batch.ndim == 4:
        batch = batch if _channels_are_last(batch, layout) else batch.permute(0, 2, 3, 1)
    if batch.ndim != 4 or 0 in batch.shape:
        raise InputError(
            f"images: {list(batch.shape)} is no [N, H, W, C], [N, C, H, W] or [N, H, W] with anything in it"
        )
    if batch.dtype.is_floating_point:
        batch = torch.cat([_bytes(part) for part in batch.split(_CHUNK)])
    elif batch.dtype != torch.uint8:
        raise InputError(
            f"images: are {_name(batch.dtype)}; give uint8 (0..255) or floating ones (0..1), "
            "such as images.astype('uint8')"
        )
    return batch.expand(*batch.shape[:3], 3).contiguous()


class CodedLabels(NamedTuple):
    """The distinct labels, C of them, and of each of N examples the place of its own: int64 [N] in 0..C-1."""

    values: tuple[Hashable, ...]
    codes: Tensor


def code_labels(labels: Any) -> CodedLabels:
    """Numbers classes of any kind.

    Args:
        labels: N numbers, strings or other hashable values: a sequence, a one-dimensional array or tensor.

    Returns:
        Distinct values in ascending order (in order of appearance where they have none); codes on the CPU.

    Raises:
        InputError: labels that are not one value an example, cannot be told apart (NaN) or are not hashable.
    """
    if isinstance(labels, (Tensor, np.ndarray)):
        if labels.ndim != 1:
            raise InputError(f"labels: expected one an image, [N], got {list(labels.shape)}")
        values = labels.tolist()
    else:
        values = [v.item() if isinstance(v, (Tensor, np.generic)) and v.ndim == 0 else v for v in labels]
    for value in values:
        if isinstance(value, Tensor) or not _is_hashable(value):  # tensors hash by identity
            raise InputError(f"labels: a {type(value).__name__} is no label; give numbers, strings or tuples")
    distinct: list[Any] = list(dict.fromkeys(values))
    if any(value != value for value in distinct):
        raise InputError("labels: some are NaN; leave those examples out or name their class")
    with contextlib.suppress(TypeError):  # of kinds that do not compare: as they appear
        distinct = sorted(distinct)
    place = {value: code for code, value in enumerate(distinct)}
    return CodedLabels(tuple(distinct), torch.tensor([place[v] for v in values], dtype=torch.int64))


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:  # also a tuple that holds a list
        return False
    return True


def pairs_of(dataset: Any) -> tuple[list[Any], list[Any]]:
    """Images and labels of a map-style torch data set, whose items are (image, label).

    Raises:
        InputError: it is empty, or an item is no such pair.
    """
    images, labels = [], []
    for i in range(len(dataset)):
        item = dataset[i]
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise InputError(f"dataset: item {i} is no (image, label) pair but a {type(item).__name__}")
        images.append(item[0])
        labels.append(item[1])
    if not images:
        raise InputError("dataset: is empty; give one with images")
    return images, labels


def _batch(images: Any) -> Tensor:
    """[N, ...] of any of the forms that `uint8_images` takes."""
    if isinstance(images, (Tensor, np.ndarray)):
        return as_tensor(images)
    if isinstance(images, (str, bytes)) or not isinstance(images, Iterable):
        raise InputError(f"images: a {type(images).__name__} holds none; give an array, a tensor or a list")
    each = [as_tensor(image) for image in images]
    for i, image in enumerate(each):
        if (image.shape, image.dtype) != (each[0].shape, each[0].dtype):
            raise InputError(
                f"images: 0 is {_name(each[0].dtype)} {list(each[0].shape)}, {i} is {_name(image.dtype)} "
                f"{list(image.shape)}; resize or convert them to one size and kind"
            )
    return torch.stack(each) if each else torch.empty(0)


def as_tensor(image: Any) -> Tensor:
    """A tensor of an array, a tensor or a PIL image; without a copy where that is possible."""
    if isinstance(image, Tensor):
        return image.detach()
    if not isinstance(image, np.ndarray):
        from PIL import Image

        from mtl_fast.data.pixels import to_rgb

        if not isinstance(image, Image.Image):
            raise InputError(f"images: a {type(image).__name__} is no array, tensor or PIL image")
        try:
            image = np.array(to_rgb(image))
        except InputError as error:
            raise InputError(f"images: a PIL image {error}") from None
    if image.dtype.kind not in "buif":
        raise InputError(f"images: are of dtype {image.dtype}; give numbers, all images of one size")
    # PyTorch takes no read-only memory, backward strides or foreign byte order.
    native = image.dtype.newbyteorder("=")
    return torch.from_numpy(np.require(image, native, ["C", "W"]))


def _channels_are_last(batch: Tensor, layout: Layout | None) -> bool:
    shape = list(batch.shape)
    last, first = shape[3] in (1, 3), shape[1] in (1, 3)
    if layout is not None:
        if not (last if layout == "HWC" else first):
            raise InputError(f"images: {shape} has neither 3 channels (RGB) nor 1 (grey) in layout {layout}")
        return layout == "HWC"
    if last and first:
        raise InputError(
            f"images: {shape} can be [N, H, W, C] and [N, C, H, W]; say which with layout='HWC' or 'CHW'"
        )
    if not last and not first:
        raise InputError(
            f"images: {shape} has neither 3 channels (RGB) nor 1 (grey), last or first; of RGBA keep three"
        )
    return last


def _bytes(images: Tensor) -> Tensor:
    """255·x of floating images in 0..1, rounded, as uint8."""
    low, high = (float(value) for value in images.aminmax())
    if not (low >= 0 and high <= 1):  # NaN too
        raise InputError(
            f"images: floating values are {low:g}..{high:g}; expected 0..1, or uint8 for 0..255 (normalisation "
            "comes later, with Preprocess)"
        )
    return images.to(torch.float32).mul(255).round().to(torch.uint8)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
