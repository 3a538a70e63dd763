"""A batch of episodes → losses, class accuracies and gradients; no optimiser, no files, no per-task loop."""

from .evaluate import (
    EmbeddedEpisodes,
    Evaluation,
    embed_episodes,
    embed_rows,
    evaluate,
    evaluate_all_weights,
    fit_and_score,
)
from .inner_loops import WholeNetworkEngine
from .step import Engine, EpisodicEngine, Preprocess, StepOutput

__all__ = [
    "EmbeddedEpisodes",
    "Engine",
    "EpisodicEngine",
    "Evaluation",
    "Preprocess",
    "StepOutput",
    "WholeNetworkEngine",
    "embed_episodes",
    "embed_rows",
    "evaluate",
    "evaluate_all_weights",
    "fit_and_score",
]
