"""Meta-transfer learning for few-shot classification: a frozen network, its filters scaled and shifted per task set.

Importing the package starts nothing (no CUDA, no compiler, no Triton), and loads PyTorch only when a name needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .classifier import FewShotClassifier
    from .config import Config, preset
    from .data import load_split
    from .data.store import ImageStore
    from .engine import EpisodicEngine, Preprocess, WholeNetworkEngine, adapt_and_predict, evaluate
    from .episodes import Episodes, EpisodeSampler, HardTaskPool
    from .errors import InputError
    from .nn import (
        Conv4,
        LinearHead,
        NetworkEncoder,
        ResNet12,
        ResNet25,
        ScaleShiftConv2d,
        convert,
        fold,
        scale_shift_parameters,
    )
    from .ops import base_learner, fit_heads, ss_block, ss_conv, task_conv, why
    from .random_streams import RandomStreams
    from .training.evaluate import evaluate_model
    from .training.export_weights import export_weights
    from .training.import_weights import import_weights
    from .training.meta_train import meta_train
    from .training.models import load_model
    from .training.predict import predict_images
    from .training.pretrain import pretrain

_HOME = {
    "FewShotClassifier": "classifier",
    "Config": "config",
    "preset": "config",
    "load_split": "data",
    "ImageStore": "data.store",
    "EpisodicEngine": "engine",
    "Preprocess": "engine",
    "WholeNetworkEngine": "engine",
    "adapt_and_predict": "engine",
    "evaluate": "engine",
    "Episodes": "episodes",
    "EpisodeSampler": "episodes",
    "HardTaskPool": "episodes",
    "InputError": "errors",
    "Conv4": "nn",
    "LinearHead": "nn",
    "NetworkEncoder": "nn",
    "ResNet12": "nn",
    "ResNet25": "nn",
    "ScaleShiftConv2d": "nn",
    "convert": "nn",
    "fold": "nn",
    "scale_shift_parameters": "nn",
    "base_learner": "ops",
    "fit_heads": "ops",
    "ss_block": "ops",
    "ss_conv": "ops",
    "task_conv": "ops",
    "why": "ops",
    "RandomStreams": "random_streams",
    "evaluate_model": "training.evaluate",
    "export_weights": "training.export_weights",
    "import_weights": "training.import_weights",
    "load_model": "training.models",
    "meta_train": "training.meta_train",
    "predict_images": "training.predict",
    "pretrain": "training.pretrain",
}

__all__ = [
    "Config",
    "Conv4",
    "EpisodeSampler",
    "Episodes",
    "EpisodicEngine",
    "FewShotClassifier",
    "HardTaskPool",
    "ImageStore",
    "InputError",
    "LinearHead",
    "NetworkEncoder",
    "Preprocess",
    "RandomStreams",
    "ResNet12",
    "ResNet25",
    "ScaleShiftConv2d",
    "WholeNetworkEngine",
    "adapt_and_predict",
    "base_learner",
    "convert",
    "evaluate",
    "evaluate_model",
    "export_weights",
    "fit_heads",
    "fold",
    "import_weights",
    "load_model",
    "load_split",
    "meta_train",
    "predict_images",
    "preset",
    "pretrain",
    "scale_shift_parameters",
    "ss_block",
    "ss_conv",
    "task_conv",
    "why",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
