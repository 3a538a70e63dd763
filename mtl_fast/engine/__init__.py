"""A batch of episodes → losses, class accuracies and gradients; no optimiser, no files, no per-task loop."""

from .adapt import adapt_and_predict
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
from .ranks import ALONE, Ranks, join
from .scores import Evaluation
from .step import Engine, EpisodicEngine, Preprocess, StepOutput

__all__ = [
    "ALONE",
    "DistinctImages",
    "EmbeddedEpisodes",
    "Engine",
    "EpisodicEngine",
    "Evaluation",
    "Preprocess",
    "Ranks",
    "StepOutput",
    "WholeNetworkEngine",
    "accuracy_by_step",
    "adapt_and_predict",
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
