"""`images`: gather + augment + normalise, from the store of uint8 images to a network's input."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.reference import images as reference
from . import _images_triton as triton
from .backend import choose, register

_IMPLEMENTATIONS = {"torch": reference.images, "triton": triton.images}
register("images", "triton", triton.can_run)


def images(
    store: Tensor,
    index: Tensor,
    *,
    mean: Tensor,
    std: Tensor,
    crop: Tensor | None = None,
    size: tuple[int, int] | None = None,
    padding: int = 0,
    flip: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Rows of the store, cropped, mirrored, normalised.

        output[b, c, i, j] = (padded[index[b]][top_b + i, left_b + j', c] − mean[c])/std[c]
        j' = w − 1 − j where flip[b], else j

    `padded` is the image with `padding` rows and columns of zero bytes (black) on each side, added before the
    normalisation as is common practice: the padding becomes −mean/std, not 0. One gather, no loop.

    Args:
        store: uint8 [N, H, W, 3], dense.
        index: int64 [B], rows of the store, in 0..N-1; repeats are fine.
        mean, std: [3], in units of 0..255; moved to the store's device if elsewhere.
        crop: int64 [B, 2], (top, left) of each window in the padded image; None: the central window (odd
            remainders rounded down).
        size: (h, w) of the output; None: (H, W).
        padding: pixels on each side, at least 0.
        flip: bool [B], mirrors the window left to right; None: no image.
        dtype: floating; half types are computed in float32 and rounded once.
        backend: ``auto`` or a backend's name.

    Returns:
        [B, 3, h, w], channels-last in memory.

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device than above, a window larger than
            the padded image. Values of `crop` and `index` are checked on the CPU, where that needs no
            readback; on a device a window off the padded image is moved inside it, and an `index` outside the store is
            left to the device's own assertion with `torch`, and makes an image of NaN with `triton`.
    """
    if store.ndim != 4 or store.shape[3] != 3 or 0 in store.shape[1:]:
        raise ValueError(f"store: expected [N, H, W, 3], got {list(store.shape)}")
    if store.dtype != torch.uint8:
        raise TypeError(f"store: expected uint8, got {store.dtype}")
    if not store.is_contiguous():
        raise ValueError(
            f"store: {list(store.shape)} is not dense (strides {store.stride()}); call .contiguous() once"
        )
    if index.ndim != 1:
        raise ValueError(f"index: expected [B], got {list(index.shape)}")
    n_images = index.shape[0]
    optional = (("crop", crop, (n_images, 2), torch.int64), ("flip", flip, (n_images,), torch.bool))
    for name, tensor, shape, expected in (("index", index, (n_images,), torch.int64), *optional):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"{name}: expected {list(shape)} for index {list(index.shape)}, got {list(tensor.shape)}"
            )
        if tensor.dtype != expected:
            raise TypeError(f"{name}: expected {expected}, got {tensor.dtype}")
        if tensor.device != store.device:
            raise ValueError(f"{name}: is on {tensor.device}, store is on {store.device}; move one of them")
    for name, tensor in (("mean", mean), ("std", std)):
        if tensor.shape != (3,):
            raise ValueError(f"{name}: expected [3], got {list(tensor.shape)}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating one, got {dtype}")
    if padding < 0:
        raise ValueError(f"padding: expected at least 0, got {padding}")
    _check_window(store, index, crop, size, padding)
    choice = choose("images", backend, store=store, crop=crop, flip=flip, dtype=dtype)
    return _IMPLEMENTATIONS[choice.backend](
        store, index, mean=mean, std=std, crop=crop, size=size, padding=padding, flip=flip, dtype=dtype
    )


def _check_window(
    store: Tensor, index: Tensor, crop: Tensor | None, size: tuple[int, int] | None, padding: int
) -> None:
    height, width = store.shape[1] + 2 * padding, store.shape[2] + 2 * padding
    h, w = size or (store.shape[1], store.shape[2])
    if not (1 <= h <= height and 1 <= w <= width):
        raise ValueError(
            f"size: a window of {h}×{w} does not fit images of {store.shape[1]}×{store.shape[2]} with "
            f"padding {padding} ({height}×{width}); take a smaller size or more padding"
        )
    if store.device.type != "cpu" or index.numel() == 0 or torch.compiler.is_compiling():
        return
    if bool(((index < 0) | (index >= store.shape[0])).any()):
        raise ValueError(
            f"index: {index.min()}..{index.max()} leaves the store's rows 0..{store.shape[0] - 1}"
        )
    if crop is not None and bool(((crop < 0) | (crop > crop.new_tensor([height - h, width - w]))).any()):
        raise ValueError(
            f"crop: (top, left) must lie in (0, 0)..({height - h}, {width - w}) for windows of {h}×{w} in "
            f"{height}×{width}, got {crop.amin(0).tolist()}..{crop.amax(0).tolist()}"
        )
