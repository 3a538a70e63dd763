"""Files of features: what `mtl-fast embed` writes, other libraries' files, and what is wrong with one."""

from __future__ import annotations

import errno
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from mtl_fast.data.features import FeatureStore
from mtl_fast.engine import embed_rows
from mtl_fast.errors import InputError
from mtl_fast.nn import LinearHead
from mtl_fast.training import checkpoint, models
from mtl_fast.training.embeddings import embed_split, load_embeddings, save_embeddings
from mtl_fast.training.models import fingerprint, load_model, preprocess_of, weights_of
from tests.training import tiny


@pytest.fixture(autouse=True)
def _tiny_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load_split", lambda source, split, size: tiny.split(split))


def foreign(path: Path, header: dict[str, str] | None = None, **changes: Any) -> Path:
    """A file as another library would write it; a tensor that is None is left out."""
    tensors: dict[str, Tensor | None] = {
        "features": torch.randn(6, 4, generator=torch.Generator().manual_seed(0)),
        "labels": torch.tensor([7, -3, 7, 11, -3, 11]),
    }
    kept = {name: t for name, t in (tensors | changes).items() if t is not None}
    safetensors.torch.save_file(kept, path, header)
    return path


@pytest.mark.parametrize("mirror", [False, True], ids=["plain", "mirrored"])
def test_a_file_holds_the_split_the_head_and_where_they_come_from(
    mirror: bool, meta_trained: Path, tmp_path: Path
) -> None:
    file = tmp_path / "new" / "features.safetensors"
    embed_split(meta_trained, file, mirror=mirror, device="cpu")
    found, model, images = load_embeddings(file), load_model(meta_trained), tiny.split("test")
    rows = torch.arange(images.n_images)
    flip = torch.ones_like(rows, dtype=torch.bool)
    expected = embed_rows(model.encoder, images, rows, preprocess_of(model.config))
    assert torch.equal(found.store.features, expected)
    assert torch.equal(found.store.labels, images.labels)
    assert found.store.class_names == images.class_names
    if mirror:
        mirrored = embed_rows(model.encoder, images, rows, preprocess_of(model.config), mirrored=flip)
        assert found.store.mirrored is not None
        assert torch.equal(found.store.mirrored, mirrored)
        assert not torch.equal(mirrored, expected)
    else:
        assert found.store.mirrored is None
    assert found.head is not None
    assert model.head is not None
    assert torch.equal(found.head.weight, model.head.weight)
    assert torch.equal(found.head.bias, model.head.bias)
    assert found.config == model.config
    meta = found.meta
    assert meta["split"] == "test"
    assert meta["data"]["fingerprint"] == fingerprint({"images": images.images, "labels": images.labels})
    assert meta["model"]["fingerprint"] == fingerprint(weights_of(model.encoder, model.head))
    assert meta["preprocessing"] == {"mean": [127.5] * 3, "std": [64.0] * 3, "image_size": 16}


def test_a_pretrained_model_leaves_no_head(pretrained: Path, tmp_path: Path) -> None:
    embed_split(pretrained, tmp_path / "f.safetensors", split="val", device="cpu")
    found = load_embeddings(tmp_path / "f.safetensors")
    assert found.head is None
    assert (found.meta["split"], found.store.name) == ("val", "val")


def test_features_from_elsewhere_take_two_tensors(tmp_path: Path) -> None:
    found = load_embeddings(foreign(tmp_path / "f.safetensors"))
    assert found.store.labels.tolist() == [1, 0, 1, 2, 0, 2]
    assert found.store.class_names == ("-3", "7", "11")
    assert (found.head, found.meta) == (None, {})
    assert found.store.name == str(tmp_path / "f.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_from_elsewhere_may_be_of_any_floating_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.tensor([0, 1, 2, 0, 1, 2], dtype=torch.int32)
    found = load_embeddings(foreign(tmp_path / "f.safetensors", features=features, labels=labels))
    assert torch.equal(found.store.features, features.to(torch.float32))


def test_all_that_a_file_may_hold_besides(tmp_path: Path) -> None:
    weight, bias, mirrored = torch.randn(2, 4), torch.randn(2), torch.zeros(6, 4)
    file = foreign(
        tmp_path / "f.safetensors",
        {"class_names": json.dumps(["owl", "no image of it", "wren", "tern"])},
        labels=torch.tensor([0, 2, 2, 3, 0, 3]),
        mirrored=mirrored,
        **{"head.weight": weight, "head.bias": bias},
    )
    found = load_embeddings(file)
    assert found.store.class_names == ("owl", "wren", "tern")
    assert found.store.labels.tolist() == [0, 1, 1, 2, 0, 2]
    assert found.head is not None
    assert torch.equal(found.head.weight, weight)
    assert found.store.mirrored is not None


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    store = FeatureStore(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]), ("Möwe", "Star"), name="birds")
    save_embeddings(tmp_path / "f.safetensors", store, LinearHead(3, 2))
    found = load_embeddings(tmp_path / "f.safetensors").store
    assert torch.equal(found.features, store.features)
    assert torch.equal(found.labels, store.labels)
    assert (found.class_names, found.name) == (store.class_names, "birds")


@pytest.mark.parametrize(
    ("header", "changes", "says"),
    [
        ({}, {"features": None}, "holds no tensor 'features', only labels; .*features .N, D. and labels .N."),
        ({}, {"labels": None}, "holds no tensor 'labels', only features"),
        ({}, {"features": torch.zeros(6)}, r"features: expected a non-empty \[N, D\], got \[6\]"),
        ({}, {"features": torch.zeros(6, 4).long()}, "features: expected a floating dtype, got torch.int64"),
        ({}, {"features": torch.full((6, 4), math.inf)}, "features: row 0 holds numbers that are not finite"),
        ({}, {"labels": torch.zeros(6)}, "labels: expected integers .N., got torch.float32"),
        ({}, {"labels": torch.zeros(6, 1).long()}, r"labels: expected integers .*\[6, 1\]"),
        ({}, {"labels": torch.zeros(5).long()}, r"labels: expected \[6\] for features \[6, 4\], got \[5\]"),
        ({}, {"mirrored": torch.zeros(6, 5)}, r"mirrored: expected \[6, 4\], got \[6, 5\]"),
        ({}, {"head.weight": torch.zeros(3, 5)}, r"head: expected weight \[C, 4\] .* got \[3, 5\] and \[0\]"),
        ({"class_names": '["a", "b"]'}, {}, r"labels: -3\.\.11 do not fit 0\.\.1 of 2 class names"),
        ({"class_names": "a, b"}, {}, "class_names in its header are no JSON list of strings"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(
    header: dict[str, str], changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    file = foreign(tmp_path / "f.safetensors", header, **changes)
    with pytest.raises(InputError, match=says) as caught:
        load_embeddings(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_named(pretrained: Path, tmp_path: Path) -> None:
    file = tmp_path / "f.safetensors"
    embed_split(pretrained, file, device="cpu")
    payload = bytearray(file.read_bytes())
    file.write_bytes(payload[:-8])
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        load_embeddings(file)
    payload[-5] ^= 1
    file.write_bytes(payload)
    with pytest.raises(InputError, match="do not match its SHA-256"):
        load_embeddings(file)
    file.write_text("no such format")
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        load_embeddings(file)
    with pytest.raises(InputError, match="no such file of embeddings; `mtl-fast embed` makes one"):
        load_embeddings(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no embeddings \(kind 'pretrained'\)"):
        load_embeddings(pretrained / "model.safetensors")


def test_what_exists_is_not_written_over(pretrained: Path) -> None:
    before = (pretrained / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="exists already"):
        embed_split(pretrained, pretrained / "model.safetensors", device="cpu")
    assert (pretrained / "model.safetensors").read_bytes() == before


def test_a_norm_of_whole_tasks_has_no_features_of_one_image(
    meta_trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, meta = checkpoint.load(meta_trained / "model.safetensors")
    meta["config"]["meta"]["norm"] = "episode"
    checkpoint.save(tmp_path / "model.safetensors", tensors, meta)
    with pytest.raises(InputError, match="takes the statistics of each task"):
        embed_split(tmp_path, tmp_path / "f.safetensors", device="cpu")
    assert replace(load_model(tmp_path), head=None).norm == "frozen"


def test_adapted_weights_have_no_features_of_one_image(maml_trained: Path, tmp_path: Path) -> None:
    tensors, meta = checkpoint.load(maml_trained / "model.safetensors")
    meta["config"]["meta"]["norm"] = "frozen"
    checkpoint.save(tmp_path / "model.safetensors", tensors, meta)
    with pytest.raises(InputError, match="its inner loop adapts all weights, so an image has other features"):
        embed_split(tmp_path, tmp_path / "f.safetensors", device="cpu")


def test_a_file_replaced_while_it_is_opened_is_named(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "f.safetensors"
    embed_split(pretrained, file, device="cpu")
    original = torch.UntypedStorage.from_file

    def replaced(name: str, **options: Any) -> torch.UntypedStorage:
        file.write_bytes(file.read_bytes()[:-1])
        return original(name, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", replaced)
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        load_embeddings(file)


def test_a_file_without_permission_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = foreign(tmp_path / "f.safetensors")

    def refused(self: Path, *_: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(InputError, match=r"f\.safetensors: cannot be read \(Permission denied\)$"):
        load_embeddings(file)
