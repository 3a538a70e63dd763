"""A batch of episodes → losses, class accuracies and gradients; no optimiser, no files, no per-task loop."""

from .evaluate import EmbeddedEpisodes, Evaluation, embed_episodes, embed_rows, evaluate, fit_and_score
from .ranks import ALONE, Ranks, join
from .step import EpisodicEngine, Preprocess, StepOutput

__all__ = [
    "ALONE",
    "EmbeddedEpisodes",
    "EpisodicEngine",
    "Evaluation",
    "Preprocess",
    "Ranks",
    "StepOutput",
    "embed_episodes",
    "embed_rows",
    "evaluate",
    "fit_and_score",
    "join",
]
