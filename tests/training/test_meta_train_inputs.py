"""What meta-training refuses: encoders, data and runs that do not fit, each in a line that names them."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mtl_fast.config import Config
from mtl_fast.errors import InputError
from mtl_fast.training import meta_train, phase
from mtl_fast.training.meta_train import MetaTraining
from mtl_fast.training.models import load_model
from tests.training import tiny
from tests.training.tiny import CONFIG


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            replace(CONFIG, encoder=replace(CONFIG.encoder, widths=(4, 4, 4, 8))),
            "encoder.widths is [4, 4, 4, 4] there",
        ),
        (
            replace(CONFIG, encoder=replace(CONFIG.encoder, form="tensorflow")),
            'encoder.form is "common" there',
        ),
        (
            replace(CONFIG, data=replace(CONFIG.data, mean=(0.0, 0.0, 0.0))),
            "pre-trained with --data.mean 127.5 127.5 127.5, not 0.0 0.0 0.0",
        ),
        (replace(CONFIG, data=replace(CONFIG.data, std=(64.0, 64.0, 1.0))), "--data.std 64.0 64.0 64.0"),
        (
            replace(CONFIG, data=replace(CONFIG.data, crop_to_box=True)),
            "pre-trained with --data.crop-to-box False, not True",
        ),
        (
            replace(CONFIG, data=replace(CONFIG.data, source="./tiny", channel_order="bgr")),
            "pre-trained with --data.channel-order auto, not bgr",
        ),
    ],
)
def test_an_encoder_of_another_run_is_named(
    config: Config, says: str, pretrained: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        tiny.meta_training(tmp_path / "run", pretrained, config)
    assert str(pretrained / "model.safetensors") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_options_of_other_data_and_of_imported_weights_are_their_own(
    pretrained: Path, tmp_path: Path
) -> None:
    cropped = replace(CONFIG, data=replace(CONFIG.data, crop_to_box=True))
    elsewhere = replace(cropped, data=replace(cropped.data, source="birds"))
    tiny.meta_training(tmp_path / "elsewhere", pretrained, elsewhere)
    model = load_model(pretrained)
    imported = replace(model, meta=model.meta | {"imported": {"format": "pytorch", "files": []}})
    MetaTraining(cropped, imported, tmp_path / "imported", **tiny.splits())


def test_images_of_another_size_are_named(pretrained: Path, tmp_path: Path) -> None:
    stores = {name: tiny.a_store(name, 0, size=18) for name in ("train", "val")}
    with pytest.raises(InputError, match="image_size is 16 there and 18 here"):
        tiny.meta_training(tmp_path / "run", pretrained, **stores)


def test_a_run_goes_on_only_from_the_encoder_it_began_with(
    pretrained: Path, meta_trained: Path, tmp_path: Path
) -> None:
    model = copy.deepcopy(load_model(pretrained))
    with torch.no_grad():
        next(model.encoder.parameters()).add_(1e-3)
    before = (meta_trained / "checkpoint.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"another encoder \(pretrained is"):
        MetaTraining(CONFIG, model, meta_trained, resume=True, **tiny.splits())
    assert (meta_trained / "checkpoint.safetensors").read_bytes() == before


def test_classes_fewer_than_a_task_needs_are_named(pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="few: 2 classes, fewer than n_way = 3"):
        tiny.meta_training(tmp_path / "run", pretrained, train=tiny.a_store("few", 0, n_classes=2))
    # A pool cannot hold more classes than there are: with just n_way of them every task has them all.
    run = tiny.meta_training(
        tmp_path / "just", pretrained, tiny.with_meta(n_tasks=6), train=tiny.a_store("just", 0, n_classes=3)
    )
    assert run.run().exists()


def test_the_command_takes_the_network_from_the_pretrained_model(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phase, "load_split", lambda source, split, size: tiny.split(split))
    config = replace(tiny.with_meta(n_tasks=2, hard="none"), encoder=Config().encoder)
    path = meta_train.meta_train(config, pretrained, tmp_path)
    assert load_model(path).config.encoder == CONFIG.encoder
    with pytest.raises(InputError, match="holds a meta model where a pretrained one is needed"):
        meta_train.meta_train(config, path, tmp_path / "again")


def test_fewer_images_in_flight_than_batch_statistics_need_are_named(
    pretrained: Path, tmp_path: Path
) -> None:
    config = tiny.with_meta(norm="episode", images_per_chunk=11)
    with (
        pytest.warns(UserWarning, match="norm 'episode'"),
        pytest.raises(
            InputError, match=r"images_per_chunk is 11, but norm 'episode' .* give at least 12"
        ) as caught,
    ):
        tiny.meta_training(tmp_path / "run", pretrained, config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
