"""A batch of episodes → losses, class accuracies and gradients; no optimiser, no files, no per-task loop."""

from .adapt import adapt_and_predict
from .base import Engine, StepOutput
from .capture import capture
from .evaluate import (
    DistinctImages,
    EmbeddedEpisodes,
    accuracy_by_step,
    distinct_images,
    embed_episodes,
    embed_rows,
    embedded_parts,
    evaluate,
    fit_and_predict,
    fit_and_score,
)
from .inner_loops import WholeNetworkEngine, evaluate_all_weights
from .inputs import Preprocess
from .ranks import ALONE, Ranks, join
from .scores import Evaluation
from .spans import Spans
from .step import EpisodicEngine

__all__ = [
    "ALONE",
    "DistinctImages",
    "EmbeddedEpisodes",
    "Engine",
    "EpisodicEngine",
    "Evaluation",
    "Preprocess",
    "Ranks",
    "Spans",
    "StepOutput",
    "WholeNetworkEngine",
    "accuracy_by_step",
    "adapt_and_predict",
    "capture",
    "distinct_images",
    "embed_episodes",
    "embed_rows",
    "embedded_parts",
    "evaluate",
    "evaluate_all_weights",
    "fit_and_predict",
    "fit_and_score",
    "join",
]
