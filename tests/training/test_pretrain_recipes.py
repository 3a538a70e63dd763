"""What recipes ask of pre-training beside the paper's: steps of the rate, updates, the last epoch, centred crops."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mtl_fast.config import Config, PretrainConfig
from mtl_fast.errors import InputError
from mtl_fast.training import checkpoint
from mtl_fast.training.models import load_model, weights_of
from mtl_fast.training.pretrain import learning_rate
from mtl_fast.training.run import Interrupted
from tests.training import tiny
from tests.training.tiny import CONFIG, at_update, ctrl_c


def test_the_rate_falls_by_steps_of_epochs_or_of_updates() -> None:
    epochs = PretrainConfig(lr=0.1, schedule="steps", decay=0.2, decay_every=30, epochs=100)
    for update, n_falls in ((0, 0), (30 * 8 - 1, 0), (30 * 8, 1), (60 * 8, 2), (90 * 8, 3), (100 * 8 - 1, 3)):
        assert learning_rate(epochs, update, 8) == pytest.approx(0.1 * 0.2**n_falls, rel=1e-12), update
    updates = replace(epochs, lr=1e-3, decay=0.5, decay_every=5000, n_updates=10_000)
    for update, rate in ((0, 1e-3), (4999, 1e-3), (5000, 5e-4), (9999, 5e-4)):
        assert learning_rate(updates, update, 8) == pytest.approx(rate, rel=1e-12), update
    cosine = replace(updates, schedule="cosine")
    assert learning_rate(cosine, 5000, 8) == pytest.approx(5e-4, rel=1e-12)


def test_a_number_of_updates_ends_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """Four updates an epoch: two whole ones and a half; the last update is validated and its epoch is the third."""
    config = tiny.with_pretrain(batch_size=42, n_updates=10, epochs=1)
    run = tiny.pretraining(tmp_path, config)
    assert (run.updates_per_epoch, run.total) == (4, 10)
    at_update(run, 9, ctrl_c)
    with pytest.raises(Interrupted):
        run.run()
    rows = tiny.rows_of(tmp_path)
    assert [(row["step"], row["epoch"]) for row in rows] == [("4", "1"), ("8", "2"), ("10", "3")]
    tiny.pretraining(tmp_path / "alone", config).run()
    tiny.pretraining(tmp_path, config, resume=True).run()
    assert tiny.same_tensors(tiny.model_of(tmp_path), tiny.model_of(tmp_path / "alone"))


@pytest.mark.parametrize(("keep", "kept"), [("best", 0), ("last", 2)])
def test_the_last_epoch_is_kept_where_the_recipe_says_so(keep: str, kept: int, tmp_path: Path) -> None:
    run = tiny.pretraining(tmp_path, tiny.with_pretrain(batch_size=84, keep=keep))
    seen: list[dict[str, Tensor]] = []

    def validate() -> float:
        seen.append(weights_of(run.encoder))
        return (0.9, 0.5, 0.6)[len(seen) - 1]

    run._validate = validate  # type: ignore[method-assign]
    run.run()
    assert tiny.same_tensors(tiny.model_of(tmp_path), seen[kept])
    meta = checkpoint.load(tmp_path / "model.safetensors")[1]
    assert (meta["epoch"], meta["validation_accuracy"]) == (kept + 1, (0.9, 0.6)[kept > 0])


def test_the_classifier_may_have_a_hidden_layer(tmp_path: Path) -> None:
    run = tiny.pretraining(tmp_path, tiny.with_pretrain(head_width=11, epochs=1))
    first, act, second = run.head.children()
    assert (tuple(first.weight.shape), tuple(second.weight.shape)) == ((11, 4), (7, 11))
    assert isinstance(act, torch.nn.ReLU)
    x = torch.randn(3, 4)
    hidden = (x @ first.weight.T + first.bias).clamp(min=0)
    torch.testing.assert_close(run.head(x), hidden @ second.weight.T + second.bias)
    before = first.weight.detach().clone()
    at_update(run, 5, ctrl_c)
    with pytest.raises(Interrupted):
        run.run()
    assert not torch.equal(first.weight, before)
    tiny.pretraining(tmp_path, tiny.with_pretrain(head_width=11, epochs=1), resume=True).run()
    assert load_model(tmp_path).head is None


def test_a_network_may_see_the_centre_of_the_images(tmp_path: Path) -> None:
    """Augmented parts and validation alike; what follows has to see the same."""
    config = replace(CONFIG, data=replace(CONFIG.data, centre_crop=16))
    config = tiny.with_pretrain(config, crop="resized", crop_size=18, epochs=1)
    stores = {name: tiny.a_store(name, i, size=20) for i, name in enumerate(("train", "val"))}
    run = tiny.pretraining(tmp_path, config, **stores)
    sizes = []
    run.encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[2:]))
    embed = run.encoder.embed
    run.encoder.embed = lambda x, **named: sizes.append(x.shape[2:]) or embed(x, **named)  # type: ignore[func-returns-value,method-assign]
    run.run()
    assert set(sizes) == {(16, 16)}
    model = load_model(tmp_path)
    assert (model.image_size, model.network_size) == (20, 16)
    with pytest.raises(InputError, match=r"pre-trained with --data\.centre-crop 16, not None; give the same"):
        tiny.meta_training(tmp_path / "meta", tmp_path, **stores)
    meta = tiny.meta_training(tmp_path / "meta", tmp_path, config, **stores)
    meta.run()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            replace(CONFIG, data=replace(CONFIG.data, centre_crop=17)),
            "data.centre_crop is 17, more than the images' 16×16",
        ),
        (tiny.with_pretrain(crop_size=15), "pretrain.crop_size is 15, less than the 16×16 pixels"),
    ],
)
def test_parts_that_do_not_fit_are_named(config: Config, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        tiny.pretraining(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()
