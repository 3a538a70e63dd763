"""The one door to data: what a source's name leads to, and the options that go with it."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mtl_fast.data import ImageStore, load_split
from mtl_fast.data.pixels import resize_and_crop
from mtl_fast.errors import InputError
from tests.data.cases import error_of, picture, two_classes


def test_load_split_finds_the_embedded_set(monkeypatch):
    calls = []

    def load_glyphs(split: str, difficulty: str = "mid", seed: int = 0) -> ImageStore:
        calls.append((split, difficulty, seed))
        return ImageStore(
            torch.from_numpy(picture(8, 8)[None]), torch.tensor([0]), ("a",), ("x",), name="glyphs"
        )

    fake = types.ModuleType("mtl_fast.data.glyphs")
    fake.load_glyphs = load_glyphs
    monkeypatch.setitem(sys.modules, "mtl_fast.data.glyphs", fake)
    assert load_split("glyphs", "train").image_size == (8, 8)
    load_split("glyphs:soft", "val", image_size=8, seed=3)
    assert calls == [("train", "mid", 0), ("val", "soft", 3)]
    small = load_split("glyphs", "test", image_size=5)
    expected = np.asarray(resize_and_crop(Image.fromarray(picture(8, 8)), 5))
    assert np.array_equal(small.images[0].numpy(), expected)
    assert (small.name, small.super_class_names) == ("glyphs", ("x",))
    assert len(calls) == 3
    # A path is a path, whatever its name.
    for folder in (Path("glyphs"), "./glyphs"):
        with pytest.raises(InputError, match="no such folder"):
            load_split(folder, "train")
    assert len(calls) == 3


@pytest.mark.parametrize("option", [{"channel_order": "bgr"}, {"crop_to_box": True}])
def test_glyphs_take_no_options_of_files(option):
    assert error_of("glyphs", "train", **option).startswith("glyphs: takes neither a channel order nor boxes")


def test_options_that_do_not_fit_the_format_are_errors(tmp_path):
    two_classes(tmp_path)
    told = error_of(tmp_path, "train", channel_order="rgb")
    assert (
        told
        == f"{tmp_path}: files of class folders tell their channel order; leave data.channel_order at auto"
    )
    told = error_of(tmp_path, "train", crop_to_box=True)
    assert told == f"{tmp_path}: class folders has no boxes to crop to; leave data.crop_to_box out"
