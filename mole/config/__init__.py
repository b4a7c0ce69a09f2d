"""The typed configuration. Imports no torch, so that a mistake is told at once."""

from mole.config.loading import load, shipped, to_yaml
from mole.config.sections import (
    Config,
    EvaluateConfig,
    GeneratorConfig,
    HarvestConfig,
    RankConfig,
    RuntimeConfig,
    SampleConfig,
    SubtaskConfig,
    TaskConfig,
    TrackingConfig,
    TrainConfig,
    VaryConfig,
    keys,
)

__all__ = [
    "Config",
    "EvaluateConfig",
    "GeneratorConfig",
    "HarvestConfig",
    "RankConfig",
    "RuntimeConfig",
    "SampleConfig",
    "SubtaskConfig",
    "TaskConfig",
    "TrackingConfig",
    "TrainConfig",
    "VaryConfig",
    "keys",
    "load",
    "shipped",
    "to_yaml",
]
