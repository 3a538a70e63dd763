"""The operations: contract, checks and choice of backend, one file each."""

from ..kernels.contracts import (
    BlockOutput,
    ChannelNorm,
    ConvOperands,
    EffectiveWeights,
    Epilogue,
    FrozenFilters,
    Normalised,
)
from .backend import why
from .base_learner import base_learner, fit_heads
from .effective_weights import effective_weights
from .episode_norm import episode_norm
from .images import images
from .ss_block import ss_block
from .ss_conv import ss_conv
from .task_conv import task_conv

__all__ = [
    "BlockOutput",
    "ChannelNorm",
    "ConvOperands",
    "EffectiveWeights",
    "Epilogue",
    "FrozenFilters",
    "Normalised",
    "base_learner",
    "effective_weights",
    "episode_norm",
    "fit_heads",
    "images",
    "ss_block",
    "ss_conv",
    "task_conv",
    "why",
]
