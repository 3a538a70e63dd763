"""A batch of episodes → losses, class accuracies and gradients; no optimiser, no files, no per-task loop."""

from .adapt import adapt_and_predict
from .evaluate import EmbeddedEpisodes, Evaluation, embed_episodes, embed_rows, evaluate, fit_and_score
from .step import EpisodicEngine, Preprocess, StepOutput

__all__ = [
    "EmbeddedEpisodes",
    "EpisodicEngine",
    "Evaluation",
    "Preprocess",
    "StepOutput",
    "adapt_and_predict",
    "embed_episodes",
    "embed_rows",
    "evaluate",
    "fit_and_score",
]
