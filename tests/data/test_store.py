from __future__ import annotations

import pytest
import torch

from mtl_fast.data import ImageStore
from mtl_fast.episodes import EpisodeSampler
from mtl_fast.errors import InputError


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


def test_from_arrays_makes_a_class_of_each_label():
    floating = images(4).permute(0, 3, 1, 2) / 255
    store = ImageStore.from_arrays(floating, ["wren", "tit", "wren", "jay"], layout="CHW", name="birds")
    assert torch.equal(store.images, images(4))
    assert store.class_names == ("jay", "tit", "wren")
    assert store.labels.tolist() == [2, 1, 2, 0]
    assert repr(store) == "ImageStore(birds: 4 images 2x3, 3 classes of 1..2, cpu)"
    assert ImageStore.from_arrays(images(2, 5, 5), [30, 4]).class_names == ("4", "30")


def test_from_arrays_with_names_takes_labels_as_numbers_of_names():
    store = ImageStore.from_arrays(images(3, 5, 5), torch.tensor([1, 0, 1]), ["b", "a"])
    assert store.labels.tolist() == [1, 0, 1]
    assert store.class_names == ("b", "a")
    with pytest.raises(InputError, match="labels: 'a' is no number of one of the 2 class_names"):
        ImageStore.from_arrays(images(2, 5, 5), ["a", "b"], ["a", "b"])
    with pytest.raises(ValueError, match=r"labels: 0\.\.2 do not fit 0\.\.1"):
        ImageStore.from_arrays(images(2, 5, 5), [0, 2], ["a", "b"])
    with pytest.raises(ValueError, match=r"labels: expected \[3\].*got \[2\]"):
        ImageStore.from_arrays(images(3, 5, 5), [0, 1])


def test_from_arrays_puts_labels_where_the_images_are():
    # They get as far as having their values counted, which meta has none of.
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        ImageStore.from_arrays(images(2, 5, 5).to("meta"), [0, 1])


def test_from_dataset_is_from_arrays_of_its_items():
    dataset = torch.utils.data.TensorDataset(images(4, 5, 5), torch.tensor([7, 3, 7, 3]))
    store = ImageStore.from_dataset(dataset, name="digits")
    assert torch.equal(store.images, images(4, 5, 5))
    assert store.labels.tolist() == [1, 0, 1, 0]
    assert (store.class_names, store.name) == (("3", "7"), "digits")


@pytest.mark.parametrize("kind", ["arrays", "dataset"])
def test_a_sampler_draws_tasks_from_either(kind):
    labels = [f"c{i % 4}" for i in range(20)]
    pixels = images(20, 5, 5)
    store = (
        ImageStore.from_arrays(pixels, labels)
        if kind == "arrays"
        else ImageStore.from_dataset([(image, label) for image, label in zip(pixels, labels, strict=True)])
    )
    episodes = EpisodeSampler(store, 3, 2, 3, torch.Generator().manual_seed(0)).sample(5)
    for task in range(5):
        for rows, codes in (
            (episodes.support, episodes.support_labels),
            (episodes.query, episodes.query_labels),
        ):
            classes = episodes.classes[task][codes[task]]
            assert [labels[row] for row in rows[task]] == [store.class_names[c] for c in classes]
