"""Augmentation against plain per-image references."""

from __future__ import annotations

import colorsys
import itertools
import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mtl_fast.config import PretrainConfig
from mtl_fast.engine.inputs import Preprocess
from mtl_fast.training.augment import augmented, colour_jitter, resized_crop
from tests.read_back import NothingReadBack
from tests.training import tiny

PREPROCESS = Preprocess((120.0, 110.0, 100.0), (60.0, 50.0, 40.0))
PLAIN = PretrainConfig(crop="none", flip=False, jitter=0.0)
STORE = tiny.a_store("augmented", 4, n_images=5, size=17)
ROWS = torch.tensor([3, 0, 34, 3, 17, 8, 21])


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normalised(image: Tensor) -> Tensor:
    """[3, H, W] in 0..255 → network input."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PREPROCESS.mean, PREPROCESS.std))
    return (image - mean) / std


def originals() -> Tensor:
    return STORE.images[ROWS].permute(0, 3, 1, 2).float()


def run(config: PretrainConfig, seed: int = 0) -> Tensor:
    return augmented(STORE, ROWS, PREPROCESS, config, stream(seed))


def test_nothing_asked_for_is_the_image() -> None:
    x = run(PLAIN)
    assert x.shape == (7, 3, 17, 17)
    assert x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x, normalised(originals()), rtol=1e-6, atol=1e-6)


def test_about_half_of_the_images_are_mirrored() -> None:
    config = replace(PLAIN, flip=True)
    rows = torch.arange(35).repeat(12)
    x = augmented(STORE, rows, PREPROCESS, config, stream())
    images = normalised(STORE.images[rows].permute(0, 3, 1, 2).float())
    as_is = (x - images).flatten(1).abs().amax(1) < 1e-5
    mirrored = (x - images.flip(3)).flatten(1).abs().amax(1) < 1e-5
    assert bool((as_is ^ mirrored).all())
    # 420 fair coins: 5 standard deviations are 51.
    assert abs(int(mirrored.sum()) - 210) < 52


def test_a_shift_moves_by_up_to_an_eighth_and_fills_with_black() -> None:
    config = replace(PLAIN, crop="shift")
    rows = torch.full((400,), 3)
    x = augmented(STORE, rows, PREPROCESS, config, stream())
    image, seen = STORE.images[3].permute(2, 0, 1).float(), set()
    candidates = {}
    for dy, dx in itertools.product(range(-2, 3), repeat=2):  # 17 // 8 = 2
        moved = torch.zeros(3, 17, 17)
        for i, j in itertools.product(range(17), repeat=2):
            if 0 <= i + dy < 17 and 0 <= j + dx < 17:
                moved[:, i, j] = image[:, i + dy, j + dx]
        candidates[dy, dx] = normalised(moved)
    for one in x:
        (found,) = [key for key, moved in candidates.items() if torch.allclose(one, moved, atol=1e-5)]
        seen.add(found)
    assert seen == candidates.keys()  # each of 25 has 16 expected hits


def bilinear(image: Tensor, y: float, x: float) -> Tensor:
    """[3, H, W] at a point in pixel centres' coordinates; outside, the border goes on."""
    height, width = image.shape[1:]
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    fy, fx = y - top, x - left
    upper = image[:, top, left] * (1 - fx) + image[:, top, right] * fx
    lower = image[:, bottom, left] * (1 - fx) + image[:, bottom, right] * fx
    return upper * (1 - fy) + lower * fy


def test_a_resized_crop_is_the_box_brought_back_to_full_size() -> None:
    images = originals()[:4] / 255
    x = resized_crop(images, torch.rand(4, 4, generator=stream(5)))
    u = torch.rand(4, 4, generator=stream(5)).tolist()
    for image, out, (a, b, c, d) in zip(images, x, u, strict=True):
        area, aspect = 0.08 + 0.92 * a, (3 / 4) * (16 / 9) ** b
        wide, high = min(1.0, math.sqrt(area * aspect)), min(1.0, math.sqrt(area / aspect))
        left, top = 17 * (1 - wide) * c, 17 * (1 - high) * d
        for i, j in itertools.product(range(17), repeat=2):
            y, z = top + 17 * high * (i + 0.5) / 17 - 0.5, left + 17 * wide * (j + 0.5) / 17 - 0.5
            torch.testing.assert_close(out[:, i, j], bilinear(image, y, z), rtol=0, atol=2e-5)


def test_boxes_stay_inside_and_within_their_bounds() -> None:
    """A ramp tells where each output pixel was read."""
    n, size = 3000, 32
    ramp = torch.arange(size, dtype=torch.float64)
    coordinates = torch.stack([ramp.view(-1, 1).expand(size, size), ramp.expand(size, size)])
    x = resized_crop(coordinates.expand(n, 2, size, size), torch.rand(n, 4, generator=stream(1)))
    rows, columns = x[:, 0, :, 0], x[:, 1, 0, :]
    assert float(x.min()) >= 0
    assert float(x.max()) <= size - 1
    # Away from the border, where the reading is cut, neighbours are (box / size) apart.
    high, wide = ((part[:, 20] - part[:, 12]) / 8 for part in (rows, columns))
    area = high * wide
    assert 0.08 - 1e-6 <= float(area.min()) < 0.085
    assert 0.97 < float(area.max()) <= 1 + 1e-6
    uncut = (high < 1 - 1e-6) & (wide < 1 - 1e-6)
    aspect = (wide / high)[uncut]
    assert 3 / 4 - 1e-6 <= float(aspect.min()) < 0.76
    assert 1.32 < float(aspect.max()) <= 4 / 3 + 1e-6
    # The mean area of the boxes is that of 8 to 100 %, less what is cut off.
    assert abs(float(area[uncut].mean()) - 0.5) < 0.08


def test_colour_jitter_is_brightness_contrast_saturation_in_turn() -> None:
    images = originals() / 255
    strength = 0.4
    x = colour_jitter(images, strength, torch.rand(3, 7, generator=stream(2)))
    factors = (1 + strength * (2 * torch.rand(3, 7, 1, 1, 1, generator=stream(2)) - 1)).flatten(1)
    assert bool(((factors > 0.6) & (factors < 1.4)).all())

    def grey(p: Tensor) -> Tensor:
        return 0.299 * p[0] + 0.587 * p[1] + 0.114 * p[2]

    for image, out, (b, c, s) in zip(images, x, factors.T, strict=True):
        one = (image * b).clamp(0, 1)
        middle = grey(one).mean()
        one = (middle + c * (one - middle)).clamp(0, 1)
        one = (grey(one) + s * (one - grey(one))).clamp(0, 1)
        torch.testing.assert_close(out, one, rtol=0, atol=2e-6)
    assert not torch.allclose(x, images, atol=0.02)


def test_a_grey_image_keeps_its_lack_of_colour() -> None:
    images = torch.rand(3, 1, 9, 9, generator=stream(0)).expand(3, 3, 9, 9)
    x = colour_jitter(images, 0.9, torch.rand(3, 3, generator=stream(1)))
    assert float((x - x.mean(dim=1, keepdim=True)).abs().max()) < 1e-6
    assert colorsys.rgb_to_hsv(*x[0, :, 0, 0].tolist())[1] < 1e-5


CENTRED = replace(PREPROCESS, size=11)


def middle(images: Tensor, size: int = 11) -> Tensor:
    edge = (images.shape[2] - size) // 2
    return images[:, :, edge : edge + size, edge : edge + size]


@pytest.mark.parametrize("jitter", [0.0, 1e-7])
def test_of_a_centred_input_the_centre_is_taken(jitter: float) -> None:
    x = augmented(STORE, ROWS, CENTRED, replace(PLAIN, jitter=jitter), stream())
    torch.testing.assert_close(x, normalised(middle(originals())), rtol=1e-5, atol=1e-5)
    assert torch.allclose(x, CENTRED(STORE, ROWS), atol=1e-5)


def test_a_shift_moves_the_centre() -> None:
    """17 pixels, of which 11 are taken, moved by up to 2: never black."""
    config = replace(PLAIN, crop="shift")
    x = augmented(STORE, torch.full((200,), 3), CENTRED, config, stream())
    image = normalised(STORE.images[3].permute(2, 0, 1).float())
    candidates = {
        (dy, dx): image[:, 3 + dy : 14 + dy, 3 + dx : 14 + dx]
        for dy, dx in itertools.product(range(-2, 3), repeat=2)
    }
    found = [[key for key, moved in candidates.items() if torch.allclose(one, moved, atol=1e-5)] for one in x]
    assert all(len(keys) == 1 for keys in found)
    assert {key for keys in found for key in keys} == candidates.keys()


@pytest.mark.parametrize(("crop_size", "side"), [(None, 11), (14, 14), (11, 11), (23, 23)])
def test_a_resized_crop_is_a_part_of_the_whole_image_and_its_centre_is_taken(
    crop_size: int | None, side: int
) -> None:
    """As 92 pixels, a random part brought to 88, and the central 80 of it."""
    config = replace(PLAIN, crop="resized", crop_size=crop_size)
    x = augmented(STORE, ROWS, CENTRED, config, stream(5))
    whole = resized_crop(originals() / 255, torch.rand(7, 4, generator=stream(5)), (side, side))
    torch.testing.assert_close(x, normalised(255 * middle(whole)), rtol=1e-5, atol=1e-4)
    assert x.shape == (7, 3, 11, 11)


def test_a_resized_crop_of_another_size_samples_the_same_box() -> None:
    ramp = torch.arange(32, dtype=torch.float64)
    coordinates = torch.stack([ramp.view(-1, 1).expand(32, 32), ramp.expand(32, 32)]).expand(50, 2, 32, 32)
    u = torch.rand(50, 4, generator=stream(1))
    same, double = resized_crop(coordinates, u), resized_crop(coordinates, u, (64, 64))
    # Pairs of finer pixels average to a coarse one, away from the border where reading is cut.
    pairs = double.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5))
    torch.testing.assert_close(pairs[:, :, 8:24, 8:24], same[:, :, 8:24, 8:24], rtol=0, atol=1e-5)


def test_all_together_are_each_in_turn() -> None:
    config = PretrainConfig(crop="resized", flip=True, jitter=0.3)
    g = stream(9)
    flip = torch.rand(7, generator=g) < 0.5
    images = originals() / 255
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)
    images = resized_crop(images, torch.rand(len(images), 4, generator=g))
    images = colour_jitter(images, 0.3, torch.rand(3, len(images), generator=g))
    expected = torch.stack([normalised(image * 255) for image in images])
    out = run(config, 9)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert out.is_contiguous(memory_format=torch.channels_last)
    # The shift is the other way of cropping, with jitter or without.
    shifted = run(replace(config, crop="shift", jitter=0.0), 9)
    nearly = run(replace(config, crop="shift", jitter=1e-7), 9)
    torch.testing.assert_close(shifted, nearly, rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", [PretrainConfig(), PretrainConfig(crop="shift", jitter=0.0), PLAIN])
def test_the_stream_alone_decides(config: PretrainConfig) -> None:
    torch.manual_seed(0)
    first = run(config, 3)
    torch.manual_seed(1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        second = run(config, 3)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first, second)
    assert torch.equal(run(config, 4), first) == (config is PLAIN)


@pytest.mark.parametrize("config", [PretrainConfig(), PretrainConfig(crop="shift", jitter=0.0), PLAIN])
def test_the_parts_of_a_batch_are_the_batch(config: PretrainConfig) -> None:
    parts = [
        augmented(STORE, ROWS, PREPROCESS, config, stream(3), share) for share in (slice(0, 4), slice(4, 7))
    ]
    assert torch.equal(torch.cat(parts), run(config, 3))


def test_the_images_of_the_store_stay() -> None:
    before = STORE.images.clone()
    run(PretrainConfig())
    assert torch.equal(STORE.images, before)


def test_a_stream_goes_on_from_batch_to_batch() -> None:
    """What a resumed run relies on: state after one batch, the second batch from it."""
    g = stream(6)
    augmented(STORE, ROWS, PREPROCESS, PretrainConfig(), g)
    again = torch.Generator()
    again.set_state(g.get_state())
    second = augmented(STORE, ROWS, PREPROCESS, PretrainConfig(), g)
    assert torch.equal(augmented(STORE, ROWS, PREPROCESS, PretrainConfig(), again), second)
    assert not torch.equal(run(PretrainConfig(), 6), second)


@pytest.mark.parametrize("crop", ["none", "shift", "resized"])
@pytest.mark.parametrize("jitter", [0.0, 0.4])
def test_nothing_is_read_back(crop: str, jitter: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # The range of indices is checked on the CPU alone, where nothing waits.
    monkeypatch.setattr(sys.modules["mtl_fast.ops.images"], "_check_window", lambda *_: None)
    settings = replace(PLAIN, crop=crop, flip=True, jitter=jitter)
    with NothingReadBack():
        x = augmented(STORE, ROWS, PREPROCESS, settings, stream())
    assert torch.isfinite(x).all()
