from __future__ import annotations

import pytest
import torch

from mtl_fast.data import ImageStore


def images(n: int, height: int = 2, width: int = 3) -> torch.Tensor:
    return torch.arange(n * height * width * 3).reshape(n, height, width, 3).to(torch.uint8)


def test_rows_of_each_class():
    store = ImageStore(images(7), torch.tensor([2, 0, 1, 0, 2, 2, 0]), ("a", "b", "c"), name="birds")
    assert store.class_counts.tolist() == [3, 1, 3]
    assert store.class_index.tolist() == [[1, 3, 6], [2, -1, -1], [0, 4, 5]]
    assert (store.n_images, store.n_classes, store.image_size) == (7, 3, (2, 3))
    assert repr(store) == "ImageStore(birds: 7 images 2x3, 3 classes of 1..3, cpu)"


@pytest.mark.parametrize(("n_classes", "extra"), [(1, 0), (1, 4), (13, 0), (13, 200)])
def test_table_against_a_loop(n_classes, extra):
    generator = torch.Generator().manual_seed(0)
    more = torch.randint(n_classes, (extra,), generator=generator)
    labels = torch.cat([torch.arange(n_classes), more])[
        torch.randperm(n_classes + extra, generator=generator)
    ]
    store = ImageStore(images(len(labels)), labels, [str(i) for i in range(n_classes)])
    for label, row in enumerate(store.class_index.tolist()):
        own = [i for i, other in enumerate(labels.tolist()) if other == label]
        assert row == own + [-1] * (store.class_index.shape[1] - len(own))
        assert store.class_counts[label] == len(own)
    assert store.class_names == tuple(str(i) for i in range(n_classes))


def test_to_moves_all_tensors_and_leaves_the_original():
    store = ImageStore(images(2), torch.tensor([0, 1]), ("a", "b"), ("x", "y"))
    assert store.to("cpu") is store
    moved = store.to("meta")
    for name in ("images", "labels", "class_counts", "class_index"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(store, name).device.type == "cpu"
    assert moved.super_class_names == ("x", "y")
    assert moved.class_index.shape == store.class_index.shape


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": images(3).float()}, TypeError, "images: expected uint8, got torch.float32"),
        ({"images": images(3, 2, 5).permute(0, 3, 1, 2)}, ValueError, r"\[N, H, W, 3\], got \[3, 3, 2, 5\]"),
        ({"images": images(3)[..., 0]}, ValueError, r"\[3, 2, 3\]"),
        ({"images": images(0), "labels": torch.empty(0, dtype=torch.int64)}, ValueError, "non-empty"),
        ({"labels": torch.tensor([0, 1, 1], dtype=torch.int32)}, TypeError, "labels: expected int64"),
        ({"labels": torch.tensor([0, 1])}, ValueError, r"labels: expected \[3\].*got \[2\]"),
        ({"labels": torch.tensor([0, 1, 2])}, ValueError, r"labels: 0\.\.2 do not fit 0\.\.1"),
        ({"labels": torch.tensor([0, 1, -1])}, ValueError, r"labels: -1\.\.1 do not fit"),
        ({"labels": torch.tensor([0, 0, 0])}, ValueError, r"class 1 \('b'\) of 2 has no image"),
        ({"labels": torch.zeros(3, dtype=torch.int64, device="meta")}, ValueError, "labels are on meta"),
        ({"super_class_names": ("x",)}, ValueError, "1 names for 2 classes"),
    ],
)
def test_what_does_not_fit_is_named(change, error, message):
    good = {"images": images(3, 2, 5), "labels": torch.tensor([0, 1, 1]), "class_names": ("a", "b")}
    ImageStore(**good)
    with pytest.raises(error, match=message):
        ImageStore(**(good | change))
