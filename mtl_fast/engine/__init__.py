"""A batch of episodes → losses, class accuracies and gradients; no optimiser, no files, no per-task loop."""

from .capture import capture
from .evaluate import EmbeddedEpisodes, Evaluation, embed_episodes, embed_rows, evaluate, fit_and_score
from .spans import Spans
from .step import EpisodicEngine, Preprocess, StepOutput

__all__ = [
    "EmbeddedEpisodes",
    "EpisodicEngine",
    "Evaluation",
    "Preprocess",
    "Spans",
    "StepOutput",
    "capture",
    "embed_episodes",
    "embed_rows",
    "evaluate",
    "fit_and_score",
]
