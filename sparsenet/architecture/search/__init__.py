"""Density search: a maximum depth, width and number of active weights in, the densities of the layers out."""

from sparsenet.architecture.search.report import SearchReport, TrialRecord
from sparsenet.architecture.search.run import retrain, search
from sparsenet.architecture.search.space import Architecture, DensityMLP, SearchSpace
from sparsenet.architecture.search.trials import TrialConfig, TrialData, TrialResult
from sparsenet.architecture.search.workers import SearchConfig

__all__ = [
    "Architecture",
    "DensityMLP",
    "SearchConfig",
    "SearchReport",
    "SearchSpace",
    "TrialConfig",
    "TrialData",
    "TrialRecord",
    "TrialResult",
    "retrain",
    "search",
]
