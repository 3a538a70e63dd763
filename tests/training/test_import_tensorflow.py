"""The TensorFlow dictionaries: names, layouts, the shift that replaces the bias, and what the network computes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_fast.errors import InputError
from mtl_fast.training.import_tensorflow import import_tensorflow
from mtl_fast.training.import_weights import import_weights
from mtl_fast.training.models import load_model
from tests.conv_cases import assert_near
from tests.training.foreign_networks import N_WAY, RESNET12, tensorflow_features, tensorflow_files

# Twelve layers of up to 63 terms, and batch statistics of 3·2·2 values at the end.
TOLERANCE = 1000 * 12 * 63**0.5 * torch.finfo(torch.float64).eps


def written(folder: Path, files: dict[str, dict[str, np.ndarray]], *names: str) -> list[Path]:
    """The files as numpy.save writes dictionaries."""
    paths = [folder / f"{name}_15000.npy" for name in names or files]
    for path in paths:
        np.save(path, files[path.stem.removesuffix("_15000")], allow_pickle=True)  # type: ignore[arg-type]
    return paths


@pytest.mark.parametrize("order", [1, -1], ids=["in_order", "reversed"])
def test_a_meta_trained_model_computes_the_same(order: int, tmp_path: Path) -> None:
    files = tensorflow_files()
    import_weights(written(tmp_path, files)[::order], tmp_path / "model.safetensors", image_size=32)
    model = load_model(tmp_path, kind="meta")
    images = torch.rand(3, 32, 32, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = model.encoder.double().embed(images.permute(0, 3, 1, 2), n_groups=1).features
    assert_near(ours, tensorflow_features(files, images, ss=True), TOLERANCE)
    assert model.head is not None
    assert torch.equal(model.head.weight, torch.from_numpy(files["fc_weights"]["w5"].T.copy()))
    assert torch.equal(model.head.bias, torch.from_numpy(files["fc_weights"]["b5"]))
    config = model.config
    assert (config.data.mean, config.data.std, config.data.image_size) == ((0.0,) * 3, (255.0,) * 3, 32)
    assert (config.encoder.form, config.encoder.widths) == ("tensorflow", RESNET12)
    assert (config.meta.norm, model.norm, config.episodes.n_way) == ("episode", "episode", N_WAY)
    assert (config.inner.lr, config.inner.test_steps, config.inner.order) == (0.05, 100, "second")


def test_pretrained_weights_compute_the_same_and_have_no_statistics(tmp_path: Path) -> None:
    files = tensorflow_files()
    imported = import_weights(written(tmp_path, files, "weights"), tmp_path / "model.safetensors")
    assert str(imported).endswith("no running statistics: norm 'episode' only")
    model = load_model(tmp_path, kind="pretrained")
    images = torch.rand(3, 34, 34, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = model.encoder.double().embed(images.permute(0, 3, 1, 2), n_groups=1).features
    assert_near(ours, tensorflow_features(files, images, ss=False), TOLERANCE)
    assert (model.stored_statistics, model.norm, model.image_size) == (False, "episode", 84)


def test_the_shift_is_what_replaced_the_bias_minus_the_bias(tmp_path: Path) -> None:
    files = tensorflow_files()
    random = np.random.default_rng(5)
    for part in ("weights", "ss_weights"):
        files[part]["block2_bias1"] = random.normal(size=5).astype("f4")
    tensors = import_tensorflow(written(tmp_path, files)).tensors
    bias, shift = (tensors[f"encoder.layers.1.convs.0.{key}"].double() for key in ("bias", "shift"))
    wanted = torch.from_numpy(files["ss_weights"]["block2_bias1"]).double()
    assert (
        (bias + shift - wanted).abs() <= torch.finfo(torch.float32).eps * (bias.abs() + wanted.abs())
    ).all()
    assert not torch.equal(shift, wanted)


def test_every_key_is_accounted_for_once(tmp_path: Path) -> None:
    files = tensorflow_files()
    imported = import_weights(written(tmp_path, files), tmp_path / "model.safetensors")
    named = sorted(entry.source for entry in imported.entries if entry.source)
    assert named == sorted(key for part in files.values() for key in part)
    targets = [entry.target for entry in imported.entries if entry.target]
    assert sorted(targets) == sorted(imported.tensors)
    left = {entry.source: entry.note for entry in imported.entries if not entry.target}
    assert left == dict.fromkeys(("w5", "b5"), "left out: the classifier of pre-training")
    added = {entry.target.rpartition(".")[2] for entry in imported.entries if not entry.source}
    assert added == {"bias", "running_mean", "running_var"}


def test_a_head_without_scale_and_shift_is_fine_tuned_alone(tmp_path: Path) -> None:
    imported = import_tensorflow(written(tmp_path, tensorflow_files(), "weights", "fc_weights"))
    assert imported.is_meta
    assert imported.config.meta.learn == "head"
    assert not any(name.endswith("scale") for name in imported.tensors)


def without(part: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in part.items() if name != key}


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("weights", lambda p: without(p, "block2_bias2"), "has no 'block2_bias2', which encoder.layers.1"),
        ("weights", lambda p: without(p, "block3_conv3"), "has no 'block3_conv3', whose shape tells"),
        ("weights", lambda p: p | {"block5_conv1": p["b5"]}, "'block5_conv1' [64] is unknown"),
        ("ss_weights", lambda p: p | {"gamma": p["block1_bias1"]}, "'gamma' [4] is unknown"),
        (
            "weights",
            lambda p: p | {"block1_conv2": p["block1_conv2"].transpose(3, 2, 0, 1)},
            "'block1_conv2' is [4, 4, 3, 3] ([k, k, I, O] → [O, I, k, k]), which does not fit",
        ),
        ("ss_weights", lambda p: p | {"block2_bias1": p["block1_bias1"]}, "'block2_bias1' is [4]"),
        (
            "fc_weights",
            lambda p: p | {"w5": p["w5"].T},
            "'w5' is [3, 7] (transposed), which does not fit head",
        ),
        (
            "weights",
            lambda p: p | {"block1_bias1": p["block1_bias1"] * np.nan},
            "'block1_bias1' holds numbers",
        ),
        ("fc_weights", lambda p: {"fc": p["w5"]}, "holds fc; neither 'block1_conv1'"),
    ],
)
def test_keys_and_shapes_that_do_not_fit_are_named(part: str, change: Any, says: str, tmp_path: Path) -> None:
    files = tensorflow_files()
    files[part] = change(files[part])
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        import_tensorflow(written(tmp_path, files))
    assert f"{part}_15000.npy" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_do_not_go_together_are_named(tmp_path: Path) -> None:
    paths = written(tmp_path, tensorflow_files())
    with pytest.raises(InputError, match="holds scale and shift only; give the file of the weights too"):
        import_tensorflow(paths[1:])
    with pytest.raises(InputError, match=r"holds weights, as .* does; give one of them"):
        import_tensorflow([paths[0], paths[0]])
