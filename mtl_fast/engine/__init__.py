"""A batch of episodes → losses, class accuracies and gradients; no optimiser, no files, no per-task loop."""

from .adapt import adapt_and_predict
from .evaluate import (
    DistinctImages,
    EmbeddedEpisodes,
    Evaluation,
    accuracy_by_step,
    distinct_images,
    embed_episodes,
    embed_rows,
    embedded_parts,
    evaluate,
    fit_and_predict,
    fit_and_score,
)
from .ranks import ALONE, Ranks, join
from .step import EpisodicEngine, Preprocess, StepOutput

__all__ = [
    "ALONE",
    "DistinctImages",
    "EmbeddedEpisodes",
    "EpisodicEngine",
    "Evaluation",
    "Preprocess",
    "Ranks",
    "StepOutput",
    "accuracy_by_step",
    "adapt_and_predict",
    "distinct_images",
    "embed_episodes",
    "embed_rows",
    "embedded_parts",
    "evaluate",
    "fit_and_predict",
    "fit_and_score",
    "join",
]
