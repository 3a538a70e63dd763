"""What happens with wrong input to public functions: an error that names the argument, and what it must fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtl_fast import (
    Config,
    Conv4,
    EpisodeSampler,
    EpisodicEngine,
    FewShotClassifier,
    HardTaskPool,
    ImageStore,
    InputError,
    LinearHead,
    Preprocess,
    RandomStreams,
    ResNet12,
    base_learner,
    convert,
    load_model,
    load_split,
    preset,
    ss_block,
    ss_conv,
    why,
)
from mtl_fast.config import EncoderConfig, EpisodeConfig, InnerConfig, MetaConfig
from mtl_fast.ops import ChannelNorm, ConvOperands, Epilogue, FrozenFilters
from mtl_fast.ops.episode_norm import episode_norm
from mtl_fast.ops.images import images

X, W = torch.ones(2, 3, 8, 8), torch.ones(4, 3, 3, 3)
SUPPORT, LABELS, QUERY = torch.ones(2, 5, 6), torch.arange(5).expand(2, 5), torch.ones(2, 7, 6)
IMAGES, CLASSES = torch.zeros(12, 16, 16, 3, dtype=torch.uint8), torch.arange(12) % 4
PREPROCESS = Preprocess((0.0,) * 3, (1.0,) * 3)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def operands(
    weight: Tensor = W,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    norm: ChannelNorm | None = None,
    **geometry: Any,
) -> ConvOperands:
    return ConvOperands(FrozenFilters(weight, bias, **geometry), scale, shift, norm)


def learn(**changes: Any) -> Any:
    arguments = {
        "support": SUPPORT,
        "support_labels": LABELS,
        "query": QUERY,
        "weight": torch.zeros(5, 6),
        "bias": torch.zeros(5),
        "inner_lr": 0.1,
        "n_steps": 2,
    }
    return base_learner(**(arguments | changes))  # type: ignore[arg-type]  # wrong on purpose


def take(store: Tensor = IMAGES, index: Any = (1,), **options: Any) -> Tensor:
    return images(store, torch.tensor(index), mean=torch.zeros(3), std=torch.ones(3), **options)


def store(pixels: Tensor = IMAGES, labels: Tensor = CLASSES, **options: Any) -> ImageStore:
    return ImageStore.from_arrays(pixels, labels, **options)


def sampler(n_way: int = 3, n_shot: int = 1, n_query: int = 1) -> EpisodeSampler:
    return EpisodeSampler(store(), n_way, n_shot, n_query, generator())


def network(**options: Any) -> ResNet12:
    return ResNet12((8, 8, 8, 8), **options)


def engine(encoder: nn.Module | None = None, n_features: int = 8, **options: Any) -> EpisodicEngine:
    encoder = network().eval() if encoder is None else encoder
    options = {"inner_lr": 0.1, **options}
    return EpisodicEngine(encoder, LinearHead(n_features, 3), store(), PREPROCESS, **options)  # type: ignore[arg-type]  # wrong on purpose


def classifier() -> FewShotClassifier:
    return FewShotClassifier(network().eval(), preprocess=PREPROCESS)


Case = tuple[Callable[[], object], type[Exception], str]
CASES: dict[str, Case] = {
    "conv-dimensions": (
        lambda: ss_conv(X[0], operands()),
        ValueError,
        "x: expected floating images [N, C, H, W]",
    ),
    "conv-integers": (lambda: ss_conv(X.long(), operands()), ValueError, "x: expected floating images"),
    "conv-channels": (
        lambda: ss_conv(torch.ones(2, 5, 8, 8), operands()),
        ValueError,
        "x: images (2, 5, 8, 8) have 5",
    ),
    "conv-groups": (lambda: ss_conv(X, operands(groups=2)), ValueError, "with groups=2 takes 6"),
    "conv-small": (
        lambda: ss_conv(X[..., :2], operands()),
        ValueError,
        "are smaller than the taps of weight",
    ),
    "conv-scale": (
        lambda: ss_conv(X, operands(scale=torch.ones(4, 1))),
        ValueError,
        "conv.scale: shape (4, 1) fits weight",
    ),
    "conv-shift": (
        lambda: ss_conv(X, operands(shift=torch.ones(3))),
        ValueError,
        "conv.shift: shape (3,) does not fit",
    ),
    "conv-bias": (
        lambda: ss_conv(X, operands(bias=torch.ones(5))),
        ValueError,
        "conv.filters.bias: shape (5,)",
    ),
    "conv-norm": (
        lambda: ss_conv(X, operands(norm=ChannelNorm(None, None))),
        ValueError,
        "conv.norm: stored statistics",
    ),
    "conv-activation": (
        lambda: ss_conv(X, operands(), epilogue=Epilogue("relu")),  # type: ignore[arg-type]  # wrong on purpose
        ValueError,
        "epilogue.activation: 'relu' is not one of none, before_residual, after_residual",
    ),
    "conv-residual": (
        lambda: ss_conv(X, operands(), residual=torch.ones(2, 4, 8, 8)),
        ValueError,
        "residual: shape",
    ),
    "conv-backend": (lambda: ss_conv(X, operands(), backend="cuda"), ValueError, "backend='cuda' is unknown"),
    "conv-double": (
        lambda: ss_conv(X.double(), operands(W.double()), backend="native"),
        RuntimeError,
        "backend='native' cannot run this call: a tensor is float64",
    ),
    "block-empty": (
        lambda: ss_block(X, [], None, epilogue=Epilogue()),
        ValueError,
        "convs: a block needs at least one",
    ),
    "block-shortcut": (
        lambda: ss_block(X, [operands(padding=1)], None, epilogue=Epilogue()),
        ValueError,
        "shortcut: its images (2, 3, 8, 8) are not of the shape",
    ),
    "block-mask": (
        lambda: ss_block(
            X,
            [operands(padding=1)],
            operands(torch.ones(4, 3, 1, 1)),
            epilogue=Epilogue(),
            mask=torch.ones(2, dtype=torch.bool),
        ),
        ValueError,
        "mask: only batch statistics take one",
    ),
    "norm-groups": (
        lambda: episode_norm(X, ChannelNorm(None, None), n_groups=3),
        ValueError,
        "n_groups: 2 images do not",
    ),
    "learner-support": (
        lambda: learn(support=SUPPORT[0]),
        ValueError,
        "support: expected [T, n, D], got [5, 6]",
    ),
    "learner-labels": (
        lambda: learn(support_labels=LABELS[:, :4]),
        ValueError,
        "support_labels: expected [2, 5]",
    ),
    "learner-range": (
        lambda: learn(support_labels=LABELS + 1),
        ValueError,
        "support_labels: must lie in 0..4",
    ),
    "learner-dtype": (
        lambda: learn(support_labels=LABELS.float()),
        TypeError,
        "support_labels: expected int64",
    ),
    "learner-query": (lambda: learn(query=QUERY[..., :5]), ValueError, "query: expected [2, m, 6]"),
    "learner-tasks": (lambda: learn(query=torch.ones(3, 7, 6)), ValueError, "query: expected [2, m, 6]"),
    "learner-weight": (
        lambda: learn(weight=torch.zeros(5, 7)),
        ValueError,
        "weight: expected [C, 6] or [2, C, 6]",
    ),
    "learner-bias": (
        lambda: learn(bias=torch.zeros(4)),
        ValueError,
        "bias: expected [5] for weight [5, 6], got [4]",
    ),
    "learner-steps": (lambda: learn(n_steps=-1), ValueError, "n_steps: expected at least 0, got -1"),
    "learner-float-steps": (lambda: learn(n_steps=2.0), TypeError, "n_steps: expected an int, got float"),
    "learner-order": (
        lambda: learn(order="third"),
        ValueError,
        "order: expected 'first' or 'second', got 'third'",
    ),
    "learner-form": (lambda: learn(form="third"), ValueError, "form: expected 'auto', 'dual' or 'primal'"),
    "learner-rate": (lambda: learn(inner_lr=float("nan")), ValueError, "inner_lr: expected a finite number"),
    "learner-mask": (lambda: learn(support_mask=torch.ones(2, 5)), TypeError, "support_mask: expected bool"),
    "images-rows": (lambda: take(index=[12]), ValueError, "index: 12..12 leaves the store's rows 0..11"),
    "images-dtype": (lambda: take(IMAGES.float()), TypeError, "store: expected uint8, got torch.float32"),
    "images-window": (
        lambda: take(size=(20, 20)),
        ValueError,
        "size: a window of 20×20 does not fit images of 16×16",
    ),
    "store-labels": (lambda: store(labels=CLASSES[:-1]), ValueError, "labels: expected [12] for images"),
    "store-channels": (
        lambda: store(IMAGES[..., :2]),
        InputError,
        "has neither 3 channels (RGB) nor 1 (grey)",
    ),
    "store-empty": (lambda: store(IMAGES[:0], CLASSES[:0]), InputError, "with anything in it"),
    "store-names": (
        lambda: store(class_names=("a",)),
        ValueError,
        "labels: 0..3 do not fit 0..0 of 1 class names",
    ),
    "split": (
        lambda: load_split("glyphs", "tset"),
        InputError,
        "no split 'tset'; take one of train, val, test",
    ),
    "sampler-classes": (lambda: sampler(n_way=5), InputError, "4 classes, fewer than n_way = 5"),
    "sampler-images": (
        lambda: sampler(n_shot=2, n_query=5),
        InputError,
        "fewer than n_shot + n_query = 2 + 5 = 7",
    ),
    "sampler-way": (lambda: sampler(n_way=0), InputError, "n_way is 0; it must be at least 1"),
    "sampler-shot": (lambda: sampler(n_shot=0), InputError, "n_shot is 0; it must be at least 1"),
    "sampler-tasks": (lambda: sampler().sample(-1), ValueError, "n_tasks is -1; it must not be negative"),
    "pool-mode": (
        lambda: HardTaskPool(sampler(), "again", generator()),  # type: ignore[arg-type]  # wrong on purpose
        InputError,
        "hard-task mode 'again' is unknown; choose resample or reuse",
    ),
    "streams": (lambda: RandomStreams(-1), ValueError, "seed: -1 is outside 0..2**63 - 1"),
    "preset": (lambda: preset("papper"), InputError, "preset 'papper' is unknown; choose one of"),
    "config-way": (
        lambda: Config(episodes=EpisodeConfig(n_way=1)),
        InputError,
        "episodes.n_way is 1; it must be at least 2",
    ),
    "config-rate": (
        lambda: Config(inner=InnerConfig(lr=-1.0)),
        InputError,
        "inner.lr is -1.0; it must be positive",
    ),
    "config-nan": (lambda: Config(meta=MetaConfig(lr=float("nan"))), InputError, "meta.lr is nan"),
    "config-widths": (
        lambda: Config(encoder=EncoderConfig(widths=(1, 2))),
        InputError,
        "encoder.widths has 2 numbers",
    ),
    "config-word": (
        lambda: Config(meta=MetaConfig(hard="often")),  # type: ignore[arg-type]  # wrong on purpose
        InputError,
        "meta.hard is 'often'; choose one of: none, resample, reuse",
    ),
    "config-name": (
        lambda: Config.from_dict({"sed": 1}),
        InputError,
        "config: unknown setting 'sed'; known: data",
    ),
    "config-half": (
        lambda: Config(inner=InnerConfig("all"), meta=MetaConfig(learn="weights"), precision="bf16"),
        InputError,
        "precision is 'bf16', which goes with inner.adapt head",
    ),
    "granularity": (
        lambda: network().enable_scale_shift("channel"),  # type: ignore[arg-type]  # wrong on purpose
        ValueError,
        "granularity: 'channel' is neither kernel nor filter",
    ),
    "conv4-width": (lambda: Conv4(0), ValueError, "width: expected at least 1 channel, got 0"),
    "conv4-size": (
        lambda: Conv4(4, image_size=8),
        ValueError,
        "image_size: Conv-4 halves its map four times",
    ),
    "head-classes": (
        lambda: LinearHead(4, 0),
        ValueError,
        "feature_dim and n_way: expected at least 1 each, got 4 and 0",
    ),
    "head-init": (
        lambda: LinearHead(4, 2, init="ones"),
        ValueError,
        "init: 'ones' is neither normal nor zeros",
    ),
    "convert": (lambda: convert(nn.Linear(2, 2)), ValueError, "model: Linear has no nn.Conv2d to convert"),
    "small-images": (
        lambda: network()(torch.ones(1, 3, 8, 8)),
        ValueError,
        "are halved 4 times; give at least 16×16",
    ),
    "classifier-early": (lambda: classifier().predict(IMAGES[:2]), InputError, "is not fitted yet; call fit"),
    "classifier-classes": (
        lambda: classifier().fit(IMAGES[:2], ["a", "a"]),
        InputError,
        "labels: all are 'a'",
    ),
    "classifier-labels": (
        lambda: classifier().fit(IMAGES[:2], ["a"]),
        InputError,
        "labels: 1 for 2 images; give one each",
    ),
    "load-model": (lambda: load_model("nowhere/x"), InputError, "checkpoint nowhere/x does not exist"),
    "engine-mode": (
        lambda: engine(network(dropout=0.5).train()).step(sampler().sample(1)),
        ValueError,
        "encoder: is in training mode, with dropout 0.5; call encoder.eval() first",
    ),
    "engine-features": (
        lambda: engine(n_features=9).step(sampler().sample(1)),
        ValueError,
        "weight: expected [C, 8]",
    ),
    "engine-norm": (
        lambda: engine(norm="batch"),
        ValueError,
        "norm: 'batch' is not one of frozen, episode, running",
    ),
    "engine-order": (lambda: engine(order="third"), ValueError, "order: 'third' is neither first nor second"),
    "engine-chunk": (
        lambda: engine(images_per_chunk=0),
        ValueError,
        "images_per_chunk: expected at least 1, or None, got 0",
    ),
    "preprocess-std": (
        lambda: Preprocess((0.0,) * 3, (0.0,) * 3),
        ValueError,
        "std: expected positive numbers",
    ),
    "preprocess-channels": (
        lambda: Preprocess((0.0, 0.0), (1.0, 1.0)),  # type: ignore[arg-type]  # wrong on purpose
        ValueError,
        "mean: expected three finite numbers, one a channel, got (0.0, 0.0)",
    ),
    "why": (lambda: why("convolution"), ValueError, "unknown operation 'convolution'; operations: ss_conv"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_argument_is_named(name: str) -> None:
    call, kind, says = CASES[name]
    with pytest.raises(kind) as caught:
        call()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
