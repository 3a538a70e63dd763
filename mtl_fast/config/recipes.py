"""The named recipes: whose numbers each setting has, for any data and for each data set of the paper."""

from __future__ import annotations

from dataclasses import replace

from ..errors import InputError
from .settings import (
    Config,
    DataConfig,
    EncoderConfig,
    EpisodeConfig,
    EvaluationConfig,
    InnerConfig,
    MetaConfig,
    PretrainConfig,
)

# The settings' own defaults: the paper's method in the common form of its network.
PAPER = Config()

# MTL's TensorFlow code, behind the paper's tables. Its support loss is summed over the classes: a rate of 0.01 there
# is 0.05 on the mean, and with support sets that hold mirror images as well it doubles. Its shift replaces the bias
# and starts at the pre-trained one; here it is added to the bias and starts at 0. These are the same functions, and
# Adam, which sees gradients only, takes the same steps: what differs is which number is stored.
TENSORFLOW = Config(
    data=DataConfig(image_size=84, mean=(0.0, 0.0, 0.0), std=(255.0, 255.0, 255.0)),
    encoder=EncoderConfig(form="tensorflow", widths=(64, 128, 256, 512), dropout=0.1),
    pretrain=PretrainConfig(
        optimizer="adam",
        lr=1e-3,
        schedule="steps",
        decay=0.5,
        decay_every=5_000,
        weight_decay=0.0,
        batch_size=64,
        n_updates=10_000,
        crop="none",
        flip=False,
        jitter=0.0,
        keep="last",
    ),
    episodes=EpisodeConfig(n_query=None, n_query_train=15),
    inner=InnerConfig(lr=0.05, test_lr=0.10, train_steps=20, test_steps=100, order="second"),
    meta=MetaConfig(norm="episode", tasks_per_update=2, n_tasks=2 * 20_000, hard="none"),
    evaluation=EvaluationConfig(mirror_support=True),
)

# MTL's PyTorch code. Its rates fall after 900 tasks and then every 1000, for a scheduler of torch ≥ 1.1 counts from
# the first epoch of 100 tasks.
PYTORCH = Config(
    data=DataConfig(image_size=92, centre_crop=80),
    encoder=EncoderConfig("resnet25", widths=(160, 320, 640), dropout=0.0, shortcut_scale_shift=True),
    pretrain=PretrainConfig(
        optimizer="sgd",
        lr=0.1,
        schedule="steps",
        decay=0.2,
        decay_every=30,
        weight_decay=5e-4,
        batch_size=128,
        epochs=100,
        head_width=1000,
        crop="resized",
        crop_size=88,
        flip=True,
        jitter=0.0,
        validation_tasks=600,
    ),
    inner=InnerConfig(lr=0.01, train_steps=100, test_steps=100, order="first"),
    meta=MetaConfig(
        shift="biased",
        train_affine=True,
        norm="running",
        lr=1e-4,
        head_lr=1e-3,
        decay_every=1000,
        decay_first=900,
        lr_floor=0.0,
        tasks_per_update=1,
        n_tasks=100 * 100,
        hard="none",
        validate_every=100,
    ),
)

# MTL's hard-task code as it is meant: its released form never clears its list of accuracies, and draws support and
# query independently.
HARD_TASKS = replace(
    TENSORFLOW,
    inner=replace(TENSORFLOW.inner, test_lr=None),
    meta=replace(TENSORFLOW.meta, n_tasks=2 * (10_000 + 5_000), hard="resample"),
    evaluation=EvaluationConfig(),
)

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

# MAML (arXiv 1703.03400) as a baseline. Its numbers are the common ones, no figure of any source followed here:
# Conv-4 with 32 filters, 5 steps of 0.01 in training and 10 at test, 4 tasks an update, 60,000 updates of Adam at 1e-3.
MAML = Config(
    encoder=EncoderConfig("conv4", widths=(32,), dropout=0.0),
    inner=InnerConfig("all", lr=0.01, train_steps=5, test_steps=10, order="second"),
    meta=MetaConfig(
        learn="weights",
        norm="episode",
        lr=1e-3,
        head_lr=1e-3,
        lr_floor=1e-3,  # no decay
        tasks_per_update=4,
        n_tasks=4 * 60_000,
        hard="none",
        # Two random tasks to a hard one, as `paper` has, in updates of four.
        random_tasks_per_round=24,
        hard_tasks_per_round=12,
        validate_every=8_000,
    ),
)

# The same on the pre-trained network of `paper`, one task in flight and one inner step's graph at a time.
MAML_DEEP = replace(
    MAML,
    encoder=EncoderConfig(),
    inner=replace(MAML.inner, checkpoint=True),
    meta=replace(MAML.meta, images_per_chunk=80),
)

# MAML on the embedded benchmark, at a length that fits its other rows.
GLYPHS_MAML = replace(
    MAML,
    data=GLYPHS.data,
    episodes=GLYPHS.episodes,
    meta=replace(MAML.meta, n_tasks=7_200, validation_tasks=300, validate_every=720),
)

# On the pre-trained network, where all rows see the same number of tasks. Validation costs as much as training here.
GLYPHS_MAML_DEEP = replace(
    GLYPHS_MAML,
    encoder=GLYPHS.encoder,
    meta=replace(
        GLYPHS_MAML.meta,
        n_tasks=GLYPHS.meta.n_tasks,
        validation_tasks=100,
        validate_every=GLYPHS.meta.validate_every,
    ),
)

# The recipes of MTL and of its baseline: what they are, in a line, and their settings for images as they are on disk.
RECIPES: dict[str, tuple[str, Config]] = {
    "paper": ("the paper's method: frozen norms, second order, hard tasks; the default", PAPER),
    "tensorflow": ("MTL's TensorFlow code, behind the paper's tables", TENSORFLOW),
    "pytorch": ("MTL's PyTorch code", PYTORCH),
    "hard-tasks": ("MTL's hard-task code, without the bugs of its release", HARD_TASKS),
    "maml": ("MAML with Conv-4 from random weights; numbers in common use", MAML),
    "maml-deep": ("MAML on a pre-trained network; numbers in common use", MAML_DEEP),
}

# Data sets of the paper, and the side of their images in pixels.
DATA = {"miniimagenet": 84, "fc100": 32, "tieredimagenet": 84}


def _on(config: Config, data: str, side: int) -> Config:
    """A recipe on that data set's images, of that side unless it brings all images to a size of its own.

    Until its source is named, the folder of its name is looked for: nobody trains on Glyphs by mistake.
    """
    return replace(config, data=replace(config.data, source=data, image_size=config.data.image_size or side))


PRESETS: dict[str, Config] = {
    **{name: config for name, (_, config) in RECIPES.items()},
    **{
        f"{name}-{data}": _on(config, data, side)
        for name, (_, config) in RECIPES.items()
        for data, side in DATA.items()
    },
    "glyphs": GLYPHS,
    "glyphs-quick": GLYPHS_QUICK,
    "glyphs-maml": GLYPHS_MAML,
    "glyphs-maml-deep": GLYPHS_MAML_DEEP,
}


def preset(name: str, data: str | None = None, n_shot: int | None = None) -> Config:
    """The recipe of that name.

    Args:
        name: such as ``tensorflow``, or with its data set ``tensorflow-fc100``.
        data: ``miniimagenet``, ``fc100`` or ``tieredimagenet``, where `name` names none. It sets the size of the
            images; where they are is the user's to say, by default in a folder of that name. None: as `name` says.
        n_shot: support images a class; None: 1.

    Raises:
        InputError: there is none.
    """
    full = name if data is None else f"{name}-{data}"
    if full not in PRESETS:
        names = ", ".join((*RECIPES, *(name for name in PRESETS if name.startswith("glyphs"))))
        raise InputError(
            f"preset {full!r} is unknown; choose one of: {names}; with -{', -'.join(DATA)} for a data set of the paper"
        )
    config = PRESETS[full]
    return config if n_shot is None else replace(config, episodes=replace(config.episodes, n_shot=n_shot))
