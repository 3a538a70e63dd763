"""Every setting of a run, and the named recipes."""

from .recipes import DATA, GLYPHS, GLYPHS_MAML, GLYPHS_MAML_DEEP, PRESETS, RECIPES, preset
from .settings import (
    Config,
    DataConfig,
    EncoderConfig,
    EpisodeConfig,
    EvaluationChanges,
    EvaluationConfig,
    InnerConfig,
    MetaConfig,
    PretrainConfig,
    ValidationEpisodes,
    ValidationInner,
    different_settings,
)

__all__ = [
    "DATA",
    "GLYPHS",
    "GLYPHS_MAML",
    "GLYPHS_MAML_DEEP",
    "PRESETS",
    "RECIPES",
    "Config",
    "DataConfig",
    "EncoderConfig",
    "EpisodeConfig",
    "EvaluationChanges",
    "EvaluationConfig",
    "InnerConfig",
    "MetaConfig",
    "PretrainConfig",
    "ValidationEpisodes",
    "ValidationInner",
    "different_settings",
    "preset",
]
