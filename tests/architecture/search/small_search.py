"""A search space, data and trials that take milliseconds, for the tests of the density search."""

import torch

from sparsenet.architecture.search.space import SearchSpace
from sparsenet.architecture.search.trials import TrialConfig, TrialData

SMALL = SearchSpace(8, 2, max_depth=3, max_width=16, min_density=0.05, max_active=200)
QUICK = TrialConfig(epochs=2, batch_size=64)


def toy_data():
    """400 points in [-1, 1]^8, two classes divided by a saddle."""
    x = torch.rand(400, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return TrialData.from_arrays(x, (x[:, 0] * x[:, 1] + 0.5 * x[:, 2] > 0).long())
