"""Growth: new units and new layers in a network that trains, without changing what it computes when they are born."""

from sparsenet.architecture.growth.deepening import DeepenReport, deepen
from sparsenet.architecture.growth.diagnostics import newborn_ratio
from sparsenet.architecture.growth.inserting import ResidualLayer
from sparsenet.architecture.growth.placing import GrowthError, growable, multiple_of, readers
from sparsenet.architecture.growth.widening import WidenReport, widen

__all__ = [
    "DeepenReport",
    "GrowthError",
    "ResidualLayer",
    "WidenReport",
    "deepen",
    "growable",
    "multiple_of",
    "newborn_ratio",
    "readers",
    "widen",
]
