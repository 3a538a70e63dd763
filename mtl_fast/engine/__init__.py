"""A batch of episodes → losses, class accuracies and gradients; no optimiser, no files, no per-task loop."""

from .evaluate import Evaluation, embed_rows, evaluate
from .step import EpisodicEngine, Preprocess, StepOutput

__all__ = ["EpisodicEngine", "Evaluation", "Preprocess", "StepOutput", "embed_rows", "evaluate"]
