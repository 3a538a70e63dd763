"""The recipes, number by number, for each data set of the paper and each number of support images."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from mtl_fast.config import DATA, PRESETS, RECIPES, Config, preset
from mtl_fast.errors import InputError
from mtl_fast.training.meta_checks import check_rounds
from mtl_fast.training.models import build_encoder, learnable

PAPER = {
    "data.image_size": None,
    "data.centre_crop": None,
    "data.mean": (125.3, 123.0, 113.9),
    "data.std": (63.0, 62.1, 66.7),
    "encoder.name": "resnet12",
    "encoder.form": "common",
    "encoder.widths": (64, 128, 256, 512),
    "encoder.dropout": 0.1,
    "encoder.shortcut_scale_shift": False,
    "pretrain.optimizer": "sgd",
    "pretrain.lr": 0.1,
    "pretrain.schedule": "cosine",
    "pretrain.decay": 0.2,  # of the schedule that `paper` does not have
    "pretrain.decay_every": 30,
    "pretrain.warmup_epochs": 0.0,
    "pretrain.weight_decay": 5e-4,
    "pretrain.batch_size": 128,
    "pretrain.epochs": 100,
    "pretrain.n_updates": None,
    "pretrain.head_width": None,
    "pretrain.crop": "resized",
    "pretrain.crop_size": None,
    "pretrain.flip": True,
    "pretrain.jitter": 0.4,
    "pretrain.validation_tasks": 600,
    "pretrain.validate_every": 1,
    "pretrain.keep": "best",
    "episodes.n_way": 5,
    "episodes.n_shot": 1,
    "episodes.n_query": 15,
    "episodes.n_query_train": None,
    "inner.adapt": "head",
    "inner.lr": 0.05,
    "inner.test_lr": None,
    "inner.train_steps": 20,
    "inner.test_steps": 100,
    "inner.order": "second",
    "inner.checkpoint": False,
    "meta.learn": "scale_shift",
    "meta.last_block_only": False,
    "meta.granularity": "kernel",
    "meta.shift": "every",
    "meta.train_affine": False,
    "meta.norm": "frozen",
    "meta.lr": 1e-3,
    "meta.head_lr": 1e-3,
    "meta.decay_every": 1000,
    "meta.decay_first": None,
    "meta.lr_floor": 1e-4,
    "meta.tasks_per_update": 2,
    "meta.n_tasks": 2 * (10_000 + 5_000),
    "meta.hard": "resample",
    "meta.random_tasks_per_round": 20,
    "meta.hard_tasks_per_round": 10,
    "meta.hard_classes_per_task": 1,
    "meta.hard_pool_size": None,
    "meta.validation_tasks": 600,
    "meta.images_per_chunk": None,
    "evaluation.n_tasks": 600,
    "evaluation.split": "test",
    "evaluation.mirror_support": False,
}

# What each recipe has otherwise.
HARD_TASKS = {
    "data.image_size": 84,
    "data.mean": (0.0, 0.0, 0.0),
    "data.std": (255.0, 255.0, 255.0),
    "encoder.form": "tensorflow",
    "pretrain.optimizer": "adam",
    "pretrain.lr": 1e-3,
    "pretrain.schedule": "steps",
    "pretrain.decay": 0.5,
    "pretrain.decay_every": 5_000,
    "pretrain.n_updates": 10_000,
    "pretrain.weight_decay": 0.0,
    "pretrain.batch_size": 64,
    "pretrain.crop": "none",
    "pretrain.flip": False,
    "pretrain.jitter": 0.0,
    "pretrain.keep": "last",
    "episodes.n_query": None,  # as many as support images
    "episodes.n_query_train": 15,
    "meta.norm": "episode",
}
TENSORFLOW = HARD_TASKS | {
    "inner.test_lr": 0.10,
    "evaluation.mirror_support": True,
    "meta.n_tasks": 2 * 20_000,
    "meta.hard": "none",
}
PYTORCH = {
    "data.image_size": 92,
    "data.centre_crop": 80,
    "encoder.name": "resnet25",
    "encoder.widths": (160, 320, 640),
    "encoder.dropout": 0.0,
    "encoder.shortcut_scale_shift": True,
    "pretrain.schedule": "steps",
    "pretrain.head_width": 1000,
    "pretrain.crop_size": 88,
    "pretrain.jitter": 0.0,
    "inner.lr": 0.01,
    "inner.train_steps": 100,
    "inner.test_steps": 100,
    "inner.order": "first",
    "meta.shift": "biased",
    "meta.train_affine": True,
    "meta.norm": "running",
    "meta.lr": 1e-4,
    "meta.head_lr": 1e-3,
    "meta.decay_first": 900,
    "meta.lr_floor": 0.0,
    "meta.tasks_per_update": 1,
    "meta.n_tasks": 100 * 100,
    "meta.hard": "none",
}
MAML_DEEP = {
    "inner.adapt": "all",
    "inner.lr": 0.01,
    "inner.train_steps": 5,
    "inner.test_steps": 10,
    "inner.checkpoint": True,
    "meta.learn": "weights",
    "meta.norm": "episode",
    "meta.lr_floor": 1e-3,  # as high as the rates: no decay
    "meta.tasks_per_update": 4,
    "meta.n_tasks": 4 * 60_000,
    "meta.hard": "none",
    "meta.random_tasks_per_round": 24,
    "meta.hard_tasks_per_round": 12,
    "meta.images_per_chunk": 80,
}
MAML = MAML_DEEP | {
    "encoder.name": "conv4",
    "encoder.widths": (32,),
    "encoder.dropout": 0.0,
    "inner.checkpoint": False,
    "meta.images_per_chunk": None,
}
CHANGES: dict[str, dict[str, Any]] = {
    "paper": {},
    "tensorflow": TENSORFLOW,
    "pytorch": PYTORCH,
    "hard-tasks": HARD_TASKS,
    "maml": MAML,
    "maml-deep": MAML_DEEP,
}
SIDES = {"miniimagenet": 84, "fc100": 32, "tieredimagenet": 84}
# Where images come from, how the head starts and how often it is looked at are no part of a recipe.
NO_PART = {"data.source", "data.channel_order", "data.crop_to_box", "meta.head_init", "meta.validate_every"}


def settings_of(config: Config) -> dict[str, Any]:
    """``part.name`` → value."""
    return {
        f"{part}.{name}": getattr(getattr(config, part), name)
        for part, values in dataclasses.asdict(config).items()
        if isinstance(values, dict)
        for name in values
    }


def test_every_setting_is_pinned_but_those_that_are_no_part_of_a_recipe() -> None:
    assert settings_of(Config()).keys() - PAPER.keys() == NO_PART
    assert CHANGES.keys() == RECIPES.keys()
    assert SIDES == DATA
    assert Config() == preset("paper")
    assert Config().seed == 0
    assert preset("pytorch").meta.validate_every == 100


@pytest.mark.parametrize("n_shot", [1, 5, 10])
@pytest.mark.parametrize("data", [None, *SIDES])
@pytest.mark.parametrize("name", CHANGES)
def test_a_recipe_number_by_number(name: str, data: str | None, n_shot: int) -> None:
    expected = PAPER | CHANGES[name] | {"episodes.n_shot": n_shot}
    if data is not None and expected["data.image_size"] is None:
        expected["data.image_size"] = SIDES[data]
    config = preset(name, data, n_shot)
    found = settings_of(config)
    for key, value in expected.items():
        assert (found[key], type(found[key])) == (value, type(value)), key
    assert config.episodes.n_query_at_test == (n_shot if name in ("tensorflow", "hard-tasks") else 15)
    assert config.inner.lr_at_test == {"tensorflow": 0.10}.get(name, expected["inner.lr"])
    assert preset(name if data is None else f"{name}-{data}").data == config.data


def convolutions(name: str, data: str = "miniimagenet") -> tuple[nn.Module, list[Any]]:
    config = preset(name, data)
    encoder = build_encoder(config.encoder, image_size=config.data.centre_crop or SIDES[data])
    learnable(encoder, config)
    return encoder, encoder.convs()


@pytest.mark.parametrize("name", ["paper", "tensorflow", "hard-tasks"])
def test_the_networks_of_resnet12(name: str) -> None:
    """Four blocks of three 3×3 convolutions with bias and norm; what the forms differ in."""
    encoder, convs = convolutions(name)
    assert encoder.feature_dim == 512
    assert [len(layer.convs) for layer in encoder.layers] == [3, 3, 3, 3]
    for conv in convs:
        square = conv.weight.shape[2] == 3
        scaled = conv.scale is not None and conv.shift is not None
        assert scaled == square
        if square or name == "paper":
            assert conv.bias is not None
            assert (conv.norm.weight is None, conv.norm.eps) == (
                (False, 1e-5) if name == "paper" else (True, 1e-3)
            )
        else:
            assert conv.bias is None
            assert conv.norm is None
    activation = "after_residual" if name == "paper" else "before_residual"
    assert (encoder.epilogue.activation, encoder.epilogue.slope, encoder.epilogue.pool) == (
        activation,
        0.1,
        True,
    )
    scales = sum(conv.scale.numel() for conv in convs if conv.scale is not None)
    shifts = sum(conv.shift.numel() for conv in convs if conv.shift is not None)
    assert (scales, shifts) == (868_544, 2_880)


def test_the_network_of_pytorch() -> None:
    """A stem of 80 with bias, three stages of four blocks; every convolution scaled, the stem's alone shifted."""
    encoder, convs = convolutions("pytorch")
    assert encoder.feature_dim == 640
    assert [len(stage) for stage in encoder.stages] == [4, 4, 4]
    assert convs[0].weight.shape == (80, 3, 3, 3)
    assert [conv.bias is not None for conv in convs] == [True] + [False] * 27
    assert all(conv.scale is not None for conv in convs)
    assert [conv.shift is not None for conv in convs] == [True] + [False] * 27
    assert [conv.stride for conv in convs].count(2) == 6  # each stage's first convolution and its shortcut
    assert encoder.epilogue.slope == 0.0
    # γ and β are learned.
    assert all(conv.norm.weight.requires_grad and conv.norm.bias.requires_grad for conv in convs)


@pytest.mark.parametrize(("data", "n_features"), [("miniimagenet", 32 * 25), ("fc100", 32 * 4)])
def test_the_network_of_maml(data: str, n_features: int) -> None:
    encoder, convs = convolutions("maml", data)
    assert [tuple(conv.weight.shape[:2]) for conv in convs] == [(32, 3), (32, 32), (32, 32), (32, 32)]
    assert encoder.feature_dim == n_features
    assert all(p.requires_grad for p in encoder.parameters())


def test_maml_on_the_embedded_benchmark_differs_in_data_and_length_only() -> None:
    glyphs, maml = preset("glyphs-maml"), preset("maml")
    assert glyphs.data == preset("glyphs").data
    assert glyphs.episodes == preset("glyphs").episodes
    same_length = {key: getattr(maml.meta, key) for key in ("n_tasks", "validation_tasks", "validate_every")}
    changed = replace(
        glyphs, data=maml.data, episodes=maml.episodes, meta=replace(glyphs.meta, **same_length)
    )
    assert changed == maml


def test_maml_on_the_embedded_network_sees_as_many_tasks_as_the_other_rows_that_start_from_it() -> None:
    deep, shallow, rows = preset("glyphs-maml-deep"), preset("glyphs-maml"), preset("glyphs")
    assert (deep.meta.n_tasks, deep.meta.validation_tasks, deep.meta.validate_every) == (1_200, 100, 240)
    assert (deep.meta.n_tasks, deep.meta.validate_every) == (rows.meta.n_tasks, rows.meta.validate_every)
    assert deep.encoder == rows.encoder
    length = {key: getattr(shallow.meta, key) for key in ("n_tasks", "validation_tasks", "validate_every")}
    assert replace(deep, encoder=shallow.encoder, meta=replace(deep.meta, **length)) == shallow


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("hard", ["resample", "reuse"])
def test_every_recipe_can_have_hard_tasks(name: str, hard: str) -> None:
    meta = preset(name).meta
    check_rounds(meta)
    check_rounds(replace(meta, hard=hard))


def test_the_embedded_recipes_are_one_family() -> None:
    full, quick = preset("glyphs"), preset("glyphs-quick")
    assert quick.meta.n_tasks < full.meta.n_tasks
    assert quick.data == full.data
    assert full.data.source.startswith("glyphs")
    assert full.episodes == quick.episodes
    assert full.episodes.n_way == 5


@pytest.mark.parametrize(("name", "data"), [("papper", None), ("paper", "cub"), ("glyphs", "fc100")])
def test_an_unknown_recipe_is_named(name: str, data: str | None) -> None:
    full = name if data is None else f"{name}-{data}"
    says = rf"preset '{full}' is unknown; choose one of: paper, tensorflow, .*glyphs-maml-deep; with -miniimagenet, -fc100"
    with pytest.raises(InputError, match=says):
        preset(name, data)


def test_replacing_the_bias_by_the_shift_changes_nothing_but_what_is_stored() -> None:
    """Adam on b + Φ_S2 from Φ_S2 = 0, and on a shift that starts at b: equal sums after every step, to rounding."""
    g = torch.Generator().manual_seed(0)
    bias, target = (torch.randn(7, generator=g, dtype=torch.float64) for _ in range(2))
    added, replaced = nn.Parameter(torch.zeros_like(bias)), nn.Parameter(bias.clone())
    adams = [torch.optim.Adam([p], lr=1e-3) for p in (added, replaced)]
    for _ in range(50):
        for adam, total in zip(adams, (bias + added, replaced), strict=True):
            adam.zero_grad()
            (total - target).pow(4).sum().backward()
            adam.step()
    assert float((replaced.detach() - bias).abs().max()) > 0.04
    torch.testing.assert_close(
        (bias + added).detach(), replaced.detach(), rtol=0, atol=50 * 4 * torch.finfo(torch.float64).eps
    )
