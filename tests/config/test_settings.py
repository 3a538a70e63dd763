"""Settings: the way to JSON and back, what is out of range, what differs."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest

from mtl_fast.config import (
    PRESETS,
    Config,
    DataConfig,
    EncoderConfig,
    EpisodeConfig,
    InnerConfig,
    MetaConfig,
    different_settings,
    preset,
)
from mtl_fast.errors import InputError


def setting(config: Config, name: str) -> Any:
    part, _, field = name.partition(".")
    return getattr(getattr(config, part), field) if field else getattr(config, part)


def with_setting(name: str, value: Any, base: Config | None = None) -> Config:
    base = base or Config()
    part, _, field = name.partition(".")
    return replace(base, **{part: replace(getattr(base, part), **{field: value}) if field else value})


@pytest.mark.parametrize(
    "changes", [{"learn": "scale_shift"}, {"learn": "head"}, {"last_block_only": True}], ids=str
)
def test_an_inner_loop_of_all_weights_learns_where_all_start(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"inner\.adapt is 'all': .* set meta\.learn to weights"):
        replace(preset("maml"), meta=replace(preset("maml").meta, **changes))


@pytest.mark.parametrize("name", PRESETS)
def test_settings_go_to_json_and_back(name: str) -> None:
    config = replace(preset(name), seed=2**40 + 1, device="cuda:1")
    config = replace(config, data=replace(config.data, source="bilder/Vögel", image_size=84))
    again = Config.from_dict(json.loads(config.to_json()))
    assert again == config
    assert isinstance(again.encoder.widths, tuple)
    assert isinstance(again.data.mean, tuple)
    assert "Vögel" in config.to_json()
    assert Config.from_dict({}) == Config()
    assert Config.from_dict({"meta": {"lr": 0.5}}) == with_setting("meta.lr", 0.5)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"sead": 1}, "config: unknown setting 'sead'; known: data, encoder"),
        ({"meta": {"lr": 1.0, "rate": 2.0}}, "config.meta: unknown setting 'rate'; known: learn"),
    ],
)
def test_a_setting_that_does_not_exist_is_named(values: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        Config.from_dict(values)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("seed", -1, "seed is -1; it must be in 0..2**63 - 1"),
        ("seed", 2**63, "seed is 9223372036854775808"),
        ("precision", "fp8", "precision is 'fp8'; choose one of: fp32, bf16, fp16"),
        ("data.std", (60.0, 0.0, 60.0), "data.std is 0.0; it must be positive"),
        ("data.std", (60.0, math.nan, 60.0), "data.std is nan"),
        ("data.mean", (math.inf, 0.0, 0.0), "data.mean is inf; it must be finite"),
        ("data.image_size", 0, "data.image_size is 0; it must be at least 1"),
        ("data.channel_order", "grb", "data.channel_order is 'grb'; choose one of: auto, rgb, bgr"),
        ("encoder.widths", (8, 16, 32), "encoder.widths has 3 numbers; resnet12 takes 4"),
        ("encoder.widths", (8, 16, 32, 64, 128), "encoder.widths has 5 numbers"),
        ("encoder.widths", (), "encoder.widths has 0 numbers"),
        ("encoder.widths", (8, 0, 32, 64), "encoder.widths is 0; it must be at least 1"),
        ("encoder.dropout", 1.0, "encoder.dropout is 1.0; it must be at least 0 and below 1"),
        ("encoder.dropout", -0.1, "encoder.dropout is -0.1"),
        ("encoder.name", "resnet18", "encoder.name is 'resnet18'; choose one of: resnet12, resnet25, conv4"),
        ("encoder", EncoderConfig("resnet25"), "encoder.widths has 4 numbers; resnet25 takes 3, one a stage"),
        ("meta.shift", "stem", "meta.shift is 'stem'; choose one of: every, biased"),
        ("encoder.form", "pytorch", "encoder.form is 'pytorch'"),
        ("pretrain.optimizer", "lion", "pretrain.optimizer is 'lion'; choose one of: sgd, adam, adamw"),
        ("pretrain.schedule", "linear", "pretrain.schedule is 'linear'; choose one of: cosine, steps"),
        ("pretrain.keep", "first", "pretrain.keep is 'first'; choose one of: best, last"),
        ("pretrain.decay", 1.5, "pretrain.decay is 1.5; it must be in 0..1"),
        ("pretrain.decay_every", 0, "pretrain.decay_every is 0"),
        ("pretrain.n_updates", 0, "pretrain.n_updates is 0; it must be at least 1"),
        ("pretrain.head_width", 0, "pretrain.head_width is 0"),
        ("pretrain.crop_size", 0, "pretrain.crop_size is 0"),
        ("data.centre_crop", 0, "data.centre_crop is 0"),
        ("inner.test_lr", 0.0, "inner.test_lr is 0.0; it must be positive"),
        ("meta.decay_first", 0, "meta.decay_first is 0"),
        ("meta.hard_classes_per_task", 0, "meta.hard_classes_per_task is 0; it must be at least 1"),
        (
            "meta.hard_classes_per_task",
            6,
            "meta.hard_classes_per_task is 6; a task has 5 classes (episodes.n_way)",
        ),
        ("meta.hard_pool_size", 0, "meta.hard_pool_size is 0"),
        ("pretrain.lr", 0.0, "pretrain.lr is 0.0; it must be positive and finite"),
        ("pretrain.lr", -1e-3, "pretrain.lr is -0.001"),
        ("pretrain.lr", math.inf, "pretrain.lr is inf"),
        ("pretrain.weight_decay", -1.0, "pretrain.weight_decay is -1.0; it must be at least 0"),
        ("pretrain.warmup_epochs", math.nan, "pretrain.warmup_epochs is nan"),
        ("pretrain.batch_size", 0, "pretrain.batch_size is 0; it must be at least 1"),
        ("pretrain.epochs", 0, "pretrain.epochs is 0"),
        ("pretrain.jitter", 1.5, "pretrain.jitter is 1.5; it must be in 0..1"),
        ("pretrain.crop", "random", "pretrain.crop is 'random'; choose one of: none, shift, resized"),
        ("pretrain.validation_tasks", 0, "pretrain.validation_tasks is 0"),
        ("pretrain.validate_every", 0, "pretrain.validate_every is 0"),
        ("episodes.n_way", 1, "episodes.n_way is 1; it must be at least 2"),
        ("episodes.n_shot", 0, "episodes.n_shot is 0; it must be at least 1"),
        ("episodes.n_query", -4, "episodes.n_query is -4"),
        ("episodes.n_query_train", 0, "episodes.n_query_train is 0; it must be at least 1"),
        ("inner.lr", 0.0, "inner.lr is 0.0; it must be positive"),
        ("inner.train_steps", -1, "inner.train_steps is -1; it must be at least 0"),
        ("inner.test_steps", -1, "inner.test_steps is -1"),
        ("inner.adapt", "everything", "inner.adapt is 'everything'; choose one of: head, all"),
        ("inner.order", "third", "inner.order is 'third'; choose one of: first, second"),
        ("meta.lr", -1e-3, "meta.lr is -0.001; it must be at least 0 and finite"),
        ("meta.head_lr", math.nan, "meta.head_lr is nan"),
        ("meta.lr_floor", -1.0, "meta.lr_floor is -1.0"),
        ("meta.decay_every", 0, "meta.decay_every is 0"),
        ("meta.tasks_per_update", 0, "meta.tasks_per_update is 0"),
        ("meta.n_tasks", 0, "meta.n_tasks is 0"),
        ("meta.random_tasks_per_round", 0, "meta.random_tasks_per_round is 0"),
        ("meta.hard_tasks_per_round", 0, "meta.hard_tasks_per_round is 0"),
        ("meta.validation_tasks", 1, "meta.validation_tasks is 1; it must be at least 2"),
        ("meta.validate_every", 0, "meta.validate_every is 0"),
        ("meta.images_per_chunk", 0, "meta.images_per_chunk is 0"),
        ("meta.hard", "yes", "meta.hard is 'yes'; choose one of: none, resample, reuse"),
        ("meta.norm", "batch", "meta.norm is 'batch'"),
        ("evaluation.n_tasks", 1, "evaluation.n_tasks is 1; it must be at least 2"),
        ("evaluation.split", "dev", "evaluation.split is 'dev'; choose one of: train, val, test"),
    ],
)
def test_what_is_out_of_range_is_named_with_its_range(name: str, value: Any, says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        with_setting(name, value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 2**63 - 1),
        ("data.image_size", None),
        ("encoder.dropout", 0.0),
        ("pretrain.jitter", 1.0),
        ("pretrain.jitter", 0.0),
        ("pretrain.weight_decay", 0.0),
        ("inner.train_steps", 0),
        ("inner.test_steps", 0),
        ("meta.lr", 0.0),
        ("meta.images_per_chunk", 1),
        ("meta.validation_tasks", 2),
        ("episodes.n_way", 2),
    ],
)
def test_the_edges_of_a_range_are_inside(name: str, value: Any) -> None:
    assert setting(with_setting(name, value), name) == value


def test_data_are_read_as_told() -> None:
    assert DataConfig(source="x", image_size=3).reading == {}
    assert DataConfig(channel_order="bgr", crop_to_box=True).reading == {
        "channel_order": "bgr",
        "crop_to_box": True,
    }


def test_conv4_takes_one_width_and_no_dropout() -> None:
    for widths in ((32,), (32, 32, 32, 32)):
        assert Config(encoder=EncoderConfig("conv4", widths=widths)).encoder.widths == widths
    # All the rest at its defaults, which are another network's, is 64 wide.
    assert Config(encoder=EncoderConfig("conv4")).encoder.widths[0] == 64
    with pytest.raises(InputError, match=r"encoder\.widths has 2 numbers; conv4 takes 1 for all layers"):
        Config(encoder=EncoderConfig("conv4", widths=(32, 32)))
    with pytest.raises(InputError, match=r"widths is 32 64 128 256; conv4 takes one .*, such as 32"):
        Config(encoder=EncoderConfig("conv4", widths=(32, 64, 128, 256)))
    with pytest.raises(InputError, match=r"dropout is 0\.3; conv4 has no dropout, set it to 0"):
        Config(encoder=EncoderConfig("conv4", widths=(32,), dropout=0.3))


def test_resnet25_takes_three_widths() -> None:
    config = Config(encoder=EncoderConfig("resnet25", widths=(160, 320, 640)))
    assert Config.from_dict(json.loads(config.to_json())) == config


def test_numbers_are_checked_by_the_whole_not_by_the_parts() -> None:
    """A part is built by the command line's parser, which would put the error into a box of its own."""
    assert MetaConfig(lr=-1.0).lr == -1.0
    assert DataConfig(std=(0.0, 0.0, 0.0)).std[0] == 0.0


def test_what_two_settings_differ_in_is_named_in_their_order() -> None:
    one = Config(seed=1, meta=MetaConfig(lr=0.5))
    assert different_settings(one, Config()) == {"meta.lr": (0.5, 1e-3), "seed": (1, 0)}
    assert different_settings(one, one) == {}


def test_what_is_left_open_follows_what_is_given() -> None:
    assert EpisodeConfig(n_shot=10, n_query=None).n_query_at_test == 10
    assert EpisodeConfig(n_shot=10).n_query_at_test == 15
    assert InnerConfig(lr=0.25).lr_at_test == 0.25
    assert InnerConfig(lr=0.25, test_lr=0.5).lr_at_test == 0.5
