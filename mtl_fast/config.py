"""Every setting of a run as frozen dataclasses, and the named recipes; the command line comes from them."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .errors import InputError


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they enter the network."""

    source: str = "glyphs"
    """`glyphs`, `glyphs:soft`, `glyphs:mid`, or a folder with train/, val/ and test/ of class folders."""
    image_size: int | None = None
    """Height and width in pixels to bring images to; None takes them as they are."""
    mean: tuple[float, float, float] = (125.3, 123.0, 113.9)
    """Per-channel mean to subtract, of 255."""
    std: tuple[float, float, float] = (63.0, 62.1, 66.7)
    """Per-channel standard deviation to divide by, of 255."""


@dataclass(frozen=True)
class EncoderConfig:
    """The network Θ."""

    name: Literal["resnet12", "conv4"] = "resnet12"
    """Which network."""
    form: Literal["common", "tensorflow"] = "common"
    """ResNet-12's residual form: the common one, or that of MTL's TensorFlow code."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Output channels of the blocks (Conv-4: of all layers, one number)."""
    dropout: float = 0.1
    """Probability after each block, in pre-training only."""
    shortcut_scale_shift: bool = False
    """Scale and shift the 1×1 shortcuts as well."""


@dataclass(frozen=True)
class PretrainConfig:
    """Pre-training: encoder and a throw-away classifier on all training classes merged."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD is with Nesterov momentum 0.9."""
    lr: float = 0.1
    """Highest learning rate; it falls to 0 along a cosine."""
    warmup_epochs: float = 0.0
    """Epochs over which the rate rises to `lr`."""
    weight_decay: float = 5e-4
    """L2 penalty (AdamW: decoupled)."""
    batch_size: int = 128
    """Images an update."""
    epochs: int = 100
    """Passes over the training images."""
    crop: Literal["none", "shift", "resized"] = "resized"
    """`shift`: moved by up to an eighth of the image; `resized`: a random part of 8 to 100 % of its area."""
    flip: bool = True
    """Mirror half of the images."""
    jitter: float = 0.4
    """Largest relative change of brightness, contrast and saturation; 0 is none."""
    validation_tasks: int = 600
    """Validation episodes on which the best epoch is chosen."""
    validate_every: int = 1
    """Epochs between validations."""


@dataclass(frozen=True)
class EpisodeConfig:
    """The shape of a task."""

    n_way: int = 5
    """Classes a task."""
    n_shot: int = 1
    """Support images a class."""
    n_query: int = 15
    """Query images a class, in validation and test."""
    n_query_train: int | None = None
    """Query images a class in meta-training; None: as many as in the test."""


@dataclass(frozen=True)
class InnerConfig:
    """Base-learning: full-batch gradient steps of the head on a task's support set."""

    lr: float = 0.05
    """Step size against the mean support loss."""
    train_steps: int = 20
    """Steps in meta-training."""
    test_steps: int = 100
    """Steps in validation and test."""
    order: Literal["first", "second"] = "second"
    """First order treats the adapted head as its start minus constants."""


@dataclass(frozen=True)
class MetaConfig:
    """Meta-training on tasks."""

    learn: Literal["scale_shift", "weights", "head"] = "scale_shift"
    """What moves beside the head's start: Φ (SS), the encoder's weights (FT), or nothing (FT θ)."""
    last_block_only: bool = False
    """Restrict `learn` to the encoder's last block (Θ4)."""
    granularity: Literal["kernel", "filter"] = "kernel"
    """One scale a k×k kernel, or one a filter."""
    norm: Literal["frozen", "episode", "running"] = "frozen"
    """Statistics of the norms in meta-training and test."""
    head_init: Literal["normal", "zeros"] = "normal"
    """Start of the head before meta-training."""
    lr: float = 1e-3
    """Adam's rate for what `learn` names."""
    head_lr: float = 1e-3
    """Adam's rate for the head's start."""
    decay_every: int = 1000
    """Updates between halvings of both rates."""
    lr_floor: float = 1e-4
    """Neither rate is halved below this."""
    tasks_per_update: int = 2
    """Tasks averaged into one Adam step."""
    n_tasks: int = 30_000
    """Tasks in all, hard ones included."""
    hard: Literal["none", "resample", "reuse"] = "resample"
    """Hard-task meta-batch: off, with new images of the failed classes, or with those that failed."""
    random_tasks_per_round: int = 20
    """K: random tasks before the hard ones of a round."""
    hard_tasks_per_round: int = 10
    """K': hard tasks of a round."""
    validation_tasks: int = 600
    """Validation episodes on which the best iteration is chosen."""
    validate_every: int = 2000
    """Tasks between validations (and checkpoints)."""
    images_per_chunk: int | None = None
    """Bounds the images in flight; None finds a number for the free memory and says it."""


@dataclass(frozen=True)
class EvaluationConfig:
    """The test."""

    n_tasks: int = 600
    """Test episodes."""
    split: Literal["train", "val", "test"] = "test"
    """Which split the episodes come from."""
    mirror_support: bool = False
    """Support sets also hold each image's mirror image; MTL's TensorFlow recipe doubles the inner rate with it."""


@dataclass(frozen=True)
class Config:
    """All settings of a run.

    Raises:
        InputError: a setting is out of its range; one line names it, its value and the range.
    """

    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    episodes: EpisodeConfig = field(default_factory=EpisodeConfig)
    inner: InnerConfig = field(default_factory=InnerConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = 0
    """One seed; every part of the run draws from a named stream made of it."""
    device: str = "auto"
    """`auto` (a GPU when there is one), `cpu`, `cuda`, `cuda:1`, …"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the encoder in training; everything else, validation and test stay in fp32."""

    def __post_init__(self) -> None:
        for name, choices in _choices().items():
            if (value := _setting(self, name)) not in choices:
                raise InputError(f"{name} is {value!r}; choose one of: {', '.join(choices)}")
        for names, (low, high, meaning) in _LIMITS.items():
            for name in names.split():
                value = _setting(self, name)
                for number in value if isinstance(value, tuple) else (value,):
                    # Written so that a NaN is outside.
                    if number is not None and not low <= number <= high:
                        raise InputError(f"{name} is {number}; it must be {meaning}")
        n_widths = len(self.encoder.widths)
        if n_widths != 4 and not (self.encoder.name == "conv4" and n_widths == 1):
            raise InputError(
                f"encoder.widths has {n_widths} numbers; {self.encoder.name} takes 4, one a block"
            )

    def to_json(self) -> str:
        """The settings as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """The inverse of `dataclasses.asdict`; unknown names are errors.

        Raises:
            InputError: a name that no setting has.
        """
        return _from_dict(cls, values, "config")


# Settings → lowest, highest, what to say; every number of a sequence is meant.
_TINY, _HUGE = sys.float_info.min, sys.float_info.max
_LIMITS: dict[str, tuple[float, float, str]] = {
    "seed": (0, 2**63 - 1, "in 0..2**63 - 1"),
    "encoder.widths pretrain.batch_size pretrain.epochs pretrain.validation_tasks pretrain.validate_every "
    "episodes.n_shot episodes.n_query episodes.n_query_train meta.decay_every meta.tasks_per_update meta.n_tasks "
    "meta.random_tasks_per_round meta.hard_tasks_per_round meta.validate_every meta.images_per_chunk "
    "data.image_size": (1, _HUGE, "at least 1"),
    "episodes.n_way": (2, _HUGE, "at least 2: one class alone is always right"),
    "meta.validation_tasks evaluation.n_tasks": (2, _HUGE, "at least 2: an interval needs two tasks"),
    "inner.train_steps inner.test_steps": (0, _HUGE, "at least 0"),
    "data.std pretrain.lr inner.lr": (_TINY, _HUGE, "positive and finite"),
    "data.mean": (-_HUGE, _HUGE, "finite"),
    "pretrain.warmup_epochs pretrain.weight_decay meta.lr meta.head_lr meta.lr_floor": (
        0,
        _HUGE,
        "at least 0 and finite",
    ),
    "pretrain.jitter": (0, 1, "in 0..1"),
    "encoder.dropout": (0, 1 - 2**-24, "at least 0 and below 1"),
}


def _setting(config: Config, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), config)


@functools.cache
def _choices() -> dict[str, tuple[str, ...]]:
    """The settings that are one of some words."""
    found = {}
    for part, kind in get_type_hints(Config).items():
        hints = get_type_hints(kind) if dataclasses.is_dataclass(kind) else {"": kind}
        for name, hint in hints.items():
            if get_origin(hint) is Literal:
                found[f"{part}.{name}".rstrip(".")] = get_args(hint)
    return found


def _from_dict(kind: Any, values: dict[str, Any], where: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise InputError(f"{where}: unknown setting {unknown[0]!r}; known: {', '.join(fields)}")
    out = {}
    for name, value in values.items():
        default = fields[name].default_factory
        if isinstance(value, dict) and default is not dataclasses.MISSING:
            value = _from_dict(default, value, f"{where}.{name}")
        out[name] = tuple(value) if isinstance(value, list) else value
    return kind(**out)


# The recipe of the embedded benchmark, found on its validation split within six minutes of demo.
GLYPHS = Config(
    data=DataConfig("glyphs:mid", mean=(127.5, 127.5, 127.5), std=(64.0, 64.0, 64.0)),
    encoder=EncoderConfig(widths=(24, 48, 96, 192), dropout=0.0),
    pretrain=PretrainConfig(
        optimizer="adamw",
        lr=3e-3,
        warmup_epochs=1.0,
        weight_decay=0.01,
        batch_size=32,
        epochs=4,
        crop="shift",
        flip=False,
        jitter=0.0,
        validation_tasks=300,
        validate_every=1,
    ),
    # More and smaller tasks learn faster than fewer large ones.
    episodes=EpisodeConfig(n_query_train=5),
    inner=InnerConfig(lr=0.01, train_steps=20, test_steps=50),
    meta=MetaConfig(
        head_init="zeros",
        lr=1e-3,
        head_lr=1e-4,
        decay_every=200,
        n_tasks=1200,
        validation_tasks=300,
        validate_every=240,
    ),
)

# The same way in 40 seconds: too short to mean anything, long enough to run every part.
GLYPHS_QUICK = replace(
    GLYPHS,
    encoder=replace(GLYPHS.encoder, widths=(8, 16, 24, 32)),
    pretrain=replace(GLYPHS.pretrain, epochs=1, validation_tasks=50, validate_every=1),
    meta=replace(GLYPHS.meta, n_tasks=30, validation_tasks=50, validate_every=30),
    evaluation=EvaluationConfig(n_tasks=100),
)

PRESETS: dict[str, Config] = {
    "paper": Config(),
    "glyphs": GLYPHS,
    "glyphs-quick": GLYPHS_QUICK,
}


def preset(name: str) -> Config:
    """The recipe of that name.

    Raises:
        InputError: there is none.
    """
    if name not in PRESETS:
        raise InputError(f"preset {name!r} is unknown; choose one of: {', '.join(PRESETS)}")
    return PRESETS[name]
