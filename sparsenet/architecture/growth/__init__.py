"""Growth: new units and new layers in a network that trains, without changing what it computes when they are born."""

from sparsenet.architecture.growth.placing import GrowthError, growable, multiple_of, readers
from sparsenet.architecture.growth.widening import WidenReport, widen

__all__ = ["GrowthError", "WidenReport", "growable", "multiple_of", "readers", "widen"]
