"""A batch of 160 images from a store in memory to network input: `pytest bench/ops/bench_images.py`.

The peer is a loop over images in PyTorch. Every row is checked to the bit before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from mtl_fast.ops.images import images

N_STORE, BATCH = 2000, 160
MEAN, STD = torch.tensor([125.3, 123.0, 113.9]), torch.tensor([63.0, 62.1, 66.7])


def one_image_at_a_time(
    store: Tensor,
    index: Tensor,
    *,
    crop: Tensor | None = None,
    size: tuple[int, int] | None = None,
    padding: int = 0,
    flip: Tensor | None = None,
) -> Tensor:
    mean, std = MEAN.view(3, 1, 1), STD.view(3, 1, 1)
    h, w = size or tuple(store.shape[1:3])
    out = []
    for b, row in enumerate(index.tolist()):
        image = pad(store[row].permute(2, 0, 1), (padding,) * 4)
        top, left = crop[b].tolist() if crop is not None else (0, 0)
        image = image[:, top : top + h, left : left + w]
        image = image.flip(2) if flip is not None and flip[b] else image
        out.append((image.float() - mean) / std)
    return torch.stack(out).contiguous(memory_format=torch.channels_last)


def gathered(store: Tensor, index: Tensor, **options: Any) -> Tensor:
    return images(store, index, mean=MEAN, std=STD, **options)


WAYS: dict[str, Callable[..., Tensor]] = {"peer_one_image_at_a_time": one_image_at_a_time, "images": gathered}


@pytest.mark.parametrize("pixels", [32, 84])
@pytest.mark.parametrize("augmented", [False, True], ids=["whole", "augmented"])
@pytest.mark.parametrize("name", WAYS)
def test_images(benchmark: Any, name: str, augmented: bool, pixels: int) -> None:
    what = "padding 4, crop, flip" if augmented else "whole images"
    benchmark.group = f"{BATCH} images of {pixels}×{pixels}, {what}, {torch.get_num_threads()} threads"
    g = torch.Generator().manual_seed(0)
    store = torch.randint(256, (N_STORE, pixels, pixels, 3), dtype=torch.uint8, generator=g)
    index = torch.randint(N_STORE, (BATCH,), generator=g)
    options: dict[str, Any] = {}
    if augmented:
        crop = torch.randint(9, (BATCH, 2), generator=g)
        options = {
            "padding": 4,
            "size": (pixels, pixels),
            "crop": crop,
            "flip": torch.rand(BATCH, generator=g) < 0.5,
        }
    assert torch.equal(WAYS[name](store, index, **options), one_image_at_a_time(store, index, **options))
    benchmark.pedantic(WAYS[name], args=(store, index), kwargs=options, rounds=7, warmup_rounds=1)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-q"]))
