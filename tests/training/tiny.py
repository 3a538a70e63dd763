"""Tiny splits and settings: everything that a training run does, in a fraction of a second."""

from __future__ import annotations

import csv
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mtl_fast.config import (
    Config,
    DataConfig,
    EncoderConfig,
    EpisodeConfig,
    EvaluationConfig,
    InnerConfig,
    MetaConfig,
    PretrainConfig,
)
from mtl_fast.data.store import ImageStore
from mtl_fast.training import checkpoint
from mtl_fast.training.meta_train import MetaTraining
from mtl_fast.training.models import load_model
from mtl_fast.training.phase import Phase
from mtl_fast.training.pretrain import Pretraining

# A checkpoint each 4 updates of 3-update rounds: the pool is not empty there.
CONFIG = Config(
    data=DataConfig("tiny", mean=(127.5, 127.5, 127.5), std=(64.0, 64.0, 64.0)),
    encoder=EncoderConfig(widths=(4, 4, 4, 4), dropout=0.1),
    pretrain=PretrainConfig("adamw", lr=1e-2, batch_size=16, epochs=3, jitter=0.1, validation_tasks=8),
    episodes=EpisodeConfig(n_way=3, n_shot=1, n_query=4),
    inner=InnerConfig(train_steps=3, test_steps=5),
    meta=MetaConfig(
        n_tasks=20, random_tasks_per_round=4, hard_tasks_per_round=2, validate_every=8, validation_tasks=8
    ),
    evaluation=EvaluationConfig(n_tasks=12),
    device="cpu",
)

# All weights adapt, from a random start; two rounds of two random and one hard update.
MAML = replace(
    CONFIG,
    encoder=EncoderConfig("conv4", widths=(4,), dropout=0.0),
    inner=InnerConfig("all", lr=0.05, train_steps=2, test_steps=3),
    meta=replace(CONFIG.meta, learn="weights", norm="episode", n_tasks=12, validate_every=4, hard="resample"),
)


def with_meta(config: Config = CONFIG, **changes: Any) -> Config:
    """Settings with other ones of meta-training."""
    return replace(config, meta=replace(config.meta, **changes))


def with_pretrain(config: Config = CONFIG, **changes: Any) -> Config:
    """Settings with other ones of pre-training."""
    return replace(config, pretrain=replace(config.pretrain, **changes))


def a_store(name: str, seed: int, *, n_classes: int = 7, n_images: int = 24, size: int = 16) -> ImageStore:
    """A colour a class, under noise."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n_classes).repeat_interleave(n_images)
    colour = torch.rand(n_classes, 1, 1, 3, generator=g)
    images = 255 * (0.6 * colour[labels] + 0.4 * torch.rand(len(labels), size, size, 3, generator=g))
    return ImageStore(
        images.to(torch.uint8), labels, tuple(f"{name}{i}" for i in range(n_classes)), name=name
    )


@cache
def split(name: str) -> ImageStore:
    """The split of that name."""
    return a_store(name, ["train", "val", "test"].index(name))


def splits() -> dict[str, ImageStore]:
    """What a phase trains and validates on."""
    return {"train": split("train"), "val": split("val")}


def pretraining(
    folder: Path, config: Config = CONFIG, *, resume: bool = False, **options: Any
) -> Pretraining:
    """A pre-training run on the tiny splits."""
    return Pretraining(config, folder, resume=resume, **(splits() | options))


def meta_training(
    folder: Path, pretrained: Path, config: Config = CONFIG, *, resume: bool = False, **options: Any
) -> MetaTraining:
    """A meta-training run on the tiny splits."""
    return MetaTraining(config, load_model(pretrained), folder, resume=resume, **(splits() | options))


def model_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of a run's model file."""
    return checkpoint.load(folder / "model.safetensors")[0]


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether names and bits are the same."""
    return a.keys() == b.keys() and all(torch.equal(raw(a[name]), raw(b[name])) for name in a)


def raw(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same_run(a: Path, b: Path) -> None:
    """Two runs left the same files, the same weights and the same log."""
    files = [
        sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) for folder in (a, b)
    ]
    assert files[0] == files[1]
    for name in ("model.safetensors", "checkpoint.safetensors"):
        (tensors, meta), (others, other_meta) = (checkpoint.load(folder / name) for folder in (a, b))
        assert same_tensors(tensors, others), name
        # The commit may change under a test that runs beside somebody's work, and so does the time that it takes.
        varying = {"provenance": None, "seconds": None}
        assert meta | varying == other_meta | varying
    assert (a / "log.csv").read_text() == (b / "log.csv").read_text()


def rows_of(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's log."""
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def write_class_folders(root: Path, *, n_classes: int = 6, n_images: int = 8, size: int = 16) -> Path:
    """A data set of class folders, for the command line."""
    for seed, name in enumerate(("train", "val", "test")):
        store = a_store(name, seed, n_classes=n_classes, n_images=n_images, size=size)
        for i, (image, label) in enumerate(zip(store.images, store.labels.tolist(), strict=True)):
            file = root / name / store.class_names[label] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).save(file, compress_level=1)
    return root


def at_update(run: Phase, update: int, do: Callable[[], object]) -> None:
    """Does something in the middle of the run, at the beginning of that update."""
    original = run._update

    def hooked() -> None:
        if run.update == update:
            do()
        original()

    run._update = hooked  # type: ignore[method-assign]


def ctrl_c() -> None:
    """The signal that Ctrl-C sends."""
    signal.raise_signal(signal.SIGINT)
