"""A batch of episodes → losses, class accuracies and gradients; no optimiser, no files, no per-task loop."""

from .adapt import adapt_and_predict
from .capture import capture
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
from .inputs import Preprocess
from .ranks import ALONE, Ranks, join
from .spans import Spans
from .step import EpisodicEngine, StepOutput

__all__ = [
    "ALONE",
    "DistinctImages",
    "EmbeddedEpisodes",
    "EpisodicEngine",
    "Evaluation",
    "Preprocess",
    "Ranks",
    "Spans",
    "StepOutput",
    "accuracy_by_step",
    "adapt_and_predict",
    "capture",
    "distinct_images",
    "embed_episodes",
    "embed_rows",
    "embedded_parts",
    "evaluate",
    "fit_and_predict",
    "fit_and_score",
    "join",
]
