"""Every setting of a run as frozen dataclasses; the command line comes from them."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import InputError


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they enter the network."""

    source: str = "glyphs"
    """`glyphs`, `glyphs:soft`, `glyphs:mid`, or a folder or file of images; `mtl-fast data info` says what it is."""
    image_size: int | None = None
    """Height and width in pixels to bring images to; None takes them as they are."""
    centre_crop: int | None = None
    """Side of the central square that the network sees of each image; None takes all of it."""
    channel_order: Literal["auto", "rgb", "bgr"] = "auto"
    """Of files that do not tell whether red or blue comes first; `auto` is the format's habit."""
    crop_to_box: bool = False
    """Crop each image to the box around its object, where the data set has boxes."""
    mean: tuple[float, float, float] = (125.3, 123.0, 113.9)
    """Per-channel mean to subtract, of 255."""
    std: tuple[float, float, float] = (63.0, 62.1, 66.7)
    """Per-channel standard deviation to divide by, of 255."""

    @property
    def reading(self) -> dict[str, Any]:
        """What `load_split` is told beside source, split and size: the options that are not at their defaults."""
        options = {"channel_order": self.channel_order, "crop_to_box": self.crop_to_box}
        return {name: value for name, value in options.items() if value != getattr(DataConfig, name)}


@dataclass(frozen=True)
class EncoderConfig:
    """The network Θ."""

    name: Literal["resnet12", "resnet25", "conv4"] = "resnet12"
    """Which network."""
    form: Literal["common", "tensorflow"] = "common"
    """ResNet-12's residual form: the common one, or that of MTL's TensorFlow code."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Output channels of the blocks (ResNet-25: of its three stages; Conv-4: of all layers, one number)."""
    dropout: float = 0.1
    """Probability after each block, in pre-training only; Conv-4 has none."""
    shortcut_scale_shift: bool = False
    """Scale and shift the 1×1 shortcuts as well; those of ResNet-25 always are."""


@dataclass(frozen=True)
class PretrainConfig:
    """Pre-training: encoder and a throw-away classifier on all training classes merged."""

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """SGD is with Nesterov momentum 0.9."""
    lr: float = 0.1
    """Highest learning rate."""
    schedule: Literal["cosine", "steps"] = "cosine"
    """How the rate falls: to 0 along a cosine, or by the factor `decay` every `decay_every`."""
    decay: float = 0.2
    """With `steps`: factor of the rate."""
    decay_every: int = 30
    """With `steps`: epochs between falls, or updates where `n_updates` is given."""
    warmup_epochs: float = 0.0
    """Epochs over which the rate rises to `lr`."""
    weight_decay: float = 5e-4
    """L2 penalty (AdamW: decoupled)."""
    batch_size: int = 128
    """Images an update."""
    epochs: int = 100
    """Passes over the training images."""
    n_updates: int | None = None
    """Updates in all, instead of `epochs`."""
    head_width: int | None = None
    """Features of a hidden layer (with ReLU) of the throw-away classifier; None: it is linear."""
    crop: Literal["none", "shift", "resized"] = "resized"
    """`shift`: moved by up to an eighth of the image; `resized`: a random part of 8 to 100 % of its area."""
    crop_size: int | None = None
    """With `resized`: side that the part is brought to, its centre then being taken; None: what the network takes."""
    flip: bool = True
    """Mirror half of the images."""
    jitter: float = 0.4
    """Largest relative change of brightness, contrast and saturation; 0 is none."""
    validation_tasks: int = 600
    """Validation episodes on which the best epoch is chosen."""
    validate_every: int = 1
    """Epochs between validations."""
    keep: Literal["best", "last"] = "best"
    """Which epoch's network to keep: the best by validation, or the last."""


@dataclass(frozen=True)
class EpisodeConfig:
    """The shape of a task."""

    n_way: int = 5
    """Classes a task."""
    n_shot: int = 1
    """Support images a class."""
    n_query: int | None = 15
    """Query images a class, in validation and test; None: as many as `n_shot`."""
    n_query_train: int | None = None
    """Query images a class in meta-training; None: as many as in the test."""

    @property
    def n_query_at_test(self) -> int:
        """Query images a class, in validation and test."""
        return self.n_shot if self.n_query is None else self.n_query


@dataclass(frozen=True)
class InnerConfig:
    """Base-learning: full-batch gradient steps on a task's support set."""

    adapt: Literal["head", "all"] = "head"
    """What the steps move: the head (MTL), or all weights of the network (MAML)."""
    lr: float = 0.05
    """Step size against the mean support loss."""
    test_lr: float | None = None
    """Step size in validation and test; None: `lr`."""
    train_steps: int = 20
    """Steps in meta-training."""
    test_steps: int = 100
    """Steps in validation and test."""
    order: Literal["first", "second"] = "second"
    """First order treats what is adapted as its start minus constants."""
    checkpoint: bool = False
    """With `all`: save memory by computing each inner step again on the way back."""

    @property
    def lr_at_test(self) -> float:
        """Step size in validation and test."""
        return self.lr if self.test_lr is None else self.test_lr


@dataclass(frozen=True)
class ValidationEpisodes:
    """The shape of a validation task of pre-training, which is 1-shot."""

    n_way: int = EpisodeConfig.n_way
    """Classes a task."""
    n_query: int | None = EpisodeConfig.n_query
    """Query images a class; None: 1."""


@dataclass(frozen=True)
class ValidationInner:
    """How pre-training's validation fits a fresh head to a task's support set."""

    lr: float = InnerConfig.lr
    """Step size against the mean support loss."""
    test_lr: float | None = InnerConfig.test_lr
    """Goes before `lr`; None: `lr`."""
    test_steps: int = InnerConfig.test_steps
    """Steps."""


@dataclass(frozen=True)
class MetaConfig:
    """Meta-training on tasks."""

    learn: Literal["scale_shift", "weights", "head"] = "scale_shift"
    """What moves beside the head's start: Φ (SS), the encoder's weights (FT), or nothing (FT θ)."""
    last_block_only: bool = False
    """Restrict `learn` to the encoder's last block (Θ4)."""
    granularity: Literal["kernel", "filter"] = "kernel"
    """One scale a k×k kernel, or one a filter."""
    shift: Literal["every", "biased"] = "every"
    """Shift every convolution that is scaled, or only those with a bias, as in MTL's PyTorch code."""
    train_affine: bool = False
    """Train γ and β of the norms as well, with the rate of what `learn` names."""
    norm: Literal["frozen", "episode", "running"] = "frozen"
    """Statistics of the norms in meta-training and test."""
    head_init: Literal["normal", "zeros"] = "normal"
    """Start of the head before meta-training."""
    lr: float = 1e-3
    """Adam's rate for what `learn` names."""
    head_lr: float = 1e-3
    """Adam's rate for the head's start."""
    decay_every: int = 1000
    """Updates between halvings of both rates; those on hard tasks count."""
    decay_first: int | None = None
    """Updates before the first halving; None: `decay_every`."""
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
    hard_classes_per_task: int = 1
    """How many classes of a random task join the pool, those of lowest accuracy."""
    hard_pool_size: int | None = None
    """Most classes of the pool that hard tasks are made of: those that joined most often; None: all of them."""
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
    """In validation too, support sets also hold each image's mirror image; see `inner.test_lr`."""


@dataclass(frozen=True)
class EvaluationChanges:
    """Settings of a test that go before the model's own; None takes the model's."""

    n_tasks: int | None = None
    """Test episodes; by default as the model's recipe says."""
    split: Literal["train", "val", "test"] | None = None
    """Which split the episodes come from; by default as the model's recipe says."""
    mirror_support: bool | None = None
    """Whether support sets also hold each image's mirror image; by default as the model's recipe says."""


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
    """`auto` (a GPU when there is one), or a device as torch names it, such as `cpu` or `cuda`."""
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
        name, n_widths = self.encoder.name, len(self.encoder.widths)
        if n_widths != _N_WIDTHS[name][0] and not (name == "conv4" and n_widths == 1):
            raise InputError(f"encoder.widths has {n_widths} numbers; {name} takes {_N_WIDTHS[name][1]}")
        if name == "conv4":
            _check_conv4(self.encoder)
        if self.inner.adapt == "all" and self.precision != "fp32":
            raise InputError(
                f"precision is {self.precision!r}, which goes with inner.adapt head; adapting all weights takes fp32"
            )
        if self.inner.adapt == "all" and (self.meta.learn != "weights" or self.meta.last_block_only):
            raise InputError(
                "inner.adapt is 'all': meta-training then learns where all weights start; "
                "set meta.learn to weights and leave meta.last_block_only out"
            )
        if self.meta.hard_classes_per_task > self.episodes.n_way:
            raise InputError(
                f"meta.hard_classes_per_task is {self.meta.hard_classes_per_task}; a task has "
                f"{self.episodes.n_way} classes (episodes.n_way)"
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


def different_settings(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """The settings, such as ``meta.lr``, whose values differ: those of `one` and of `other`, in the order of `Config`."""
    pairs = {}
    for part, values in dataclasses.asdict(one).items():
        names = [f"{part}.{name}" for name in values] if isinstance(values, dict) else [part]
        for name in names:
            if (a := _setting(one, name)) != (b := _setting(other, name)):
                pairs[name] = (a, b)
    return pairs


def _check_conv4(encoder: EncoderConfig) -> None:
    """It has one width and no dropout; the defaults, which are another network's, are let through and mean 64 and 0."""
    widths, dropout = encoder.widths, encoder.dropout
    if len(set(widths)) > 1 and widths != EncoderConfig.widths:
        raise InputError(
            f"encoder.widths is {' '.join(map(str, widths))}; conv4 takes one width for all layers, such as {widths[0]}"
        )
    if dropout not in (0, EncoderConfig.dropout):
        raise InputError(f"encoder.dropout is {dropout}; conv4 has no dropout, set it to 0")


# Network → how many widths, in words.
_N_WIDTHS = {
    "resnet12": (4, "4, one a block"),
    "resnet25": (3, "3, one a stage, such as 160 320 640"),
    "conv4": (4, "1 for all layers, or the same one 4 times"),
}

# Settings → lowest, highest, what to say; every number of a sequence is meant.
_TINY, _HUGE = sys.float_info.min, sys.float_info.max
_LIMITS: dict[str, tuple[float, float, str]] = {
    "seed": (0, 2**63 - 1, "in 0..2**63 - 1"),
    "encoder.widths pretrain.decay_every pretrain.batch_size pretrain.epochs pretrain.n_updates pretrain.head_width "
    "pretrain.crop_size pretrain.validation_tasks pretrain.validate_every episodes.n_shot episodes.n_query "
    "episodes.n_query_train meta.decay_every meta.decay_first meta.tasks_per_update meta.n_tasks "
    "meta.random_tasks_per_round meta.hard_tasks_per_round meta.hard_classes_per_task meta.hard_pool_size "
    "meta.validate_every meta.images_per_chunk data.image_size data.centre_crop": (1, _HUGE, "at least 1"),
    "episodes.n_way": (2, _HUGE, "at least 2: one class alone is always right"),
    "meta.validation_tasks evaluation.n_tasks": (2, _HUGE, "at least 2: an interval needs two tasks"),
    "inner.train_steps inner.test_steps": (0, _HUGE, "at least 0"),
    "data.std pretrain.lr inner.lr inner.test_lr": (_TINY, _HUGE, "positive and finite"),
    "data.mean": (-_HUGE, _HUGE, "finite"),
    "pretrain.warmup_epochs pretrain.weight_decay meta.lr meta.head_lr meta.lr_floor": (
        0,
        _HUGE,
        "at least 0 and finite",
    ),
    "pretrain.jitter pretrain.decay": (0, 1, "in 0..1"),
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
