"""Growth: a network that adds and removes blocks, units and layers while it trains; what is born changes no output."""

from sparsenet.architecture.growth.deepening import DeepenReport, deepen
from sparsenet.architecture.growth.diagnostics import newborn_ratio
from sparsenet.architecture.growth.events import Change, Event
from sparsenet.architecture.growth.grower import Grower
from sparsenet.architecture.growth.inserting import ResidualLayer
from sparsenet.architecture.growth.placing import GrowthError, growable, multiple_of, readers
from sparsenet.architecture.growth.widening import WidenReport, widen

__all__ = [
    "Change",
    "DeepenReport",
    "Event",
    "Grower",
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
