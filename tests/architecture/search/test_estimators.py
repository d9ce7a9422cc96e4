"""Estimators of architectures: hand-computed scores, ranks, the comparison table."""

import math
from dataclasses import replace

import pytest
import torch

from sparsenet.architecture.search.estimators import (
    compare_estimators,
    extrapolate,
    gradient_flow_at,
    gradient_norm,
    kendall,
    naswot,
    snip,
    spearman,
    synflow,
)
from sparsenet.architecture.search.space import Architecture
from sparsenet.architecture.search.trials import TrialConfig, TrialData


def one_layer(weights):
    model = Architecture(2, len(weights), 2, (1.0,)).build()
    with torch.no_grad():
        model.linears[0].weight.copy_(torch.tensor(weights))
        model.linears[0].bias.zero_()
    return model


def test_synflow_by_hand():
    model = one_layer([[1.0, -2.0], [3.0, 0.5]])  # R = sum |w|, dR/dw = sign: the score is sum |w| = 6.5
    assert synflow(model) == pytest.approx(math.log(6.5))
    two = Architecture(2, 1, 2, (1.0, 1.0)).build()
    with torch.no_grad():
        two.linears[0][0].weight.copy_(torch.tensor([[1.0, -1.0], [2.0, 0.0]]))
        two.linears[1].weight.copy_(torch.tensor([[-3.0, 0.5]]))
    # R = 3 * (1 + 1) + 0.5 * 2 = 7; every layer's sum of |theta dR/dtheta| is R
    assert synflow(two) == pytest.approx(math.log(14.0))


def test_naswot_by_hand():
    model = Architecture(2, 1, 2, (1.0, 1.0)).build()
    with torch.no_grad():
        model.linears[0][0].weight.copy_(torch.eye(2))
        model.linears[0][0].bias.zero_()
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0]])  # codes 11 and 10: K = [[2, 1], [1, 2]], det 3
    assert naswot(model, x) == pytest.approx(math.log(3.0))
    assert naswot(one_layer([[1.0, 1.0]]), x) == 0.0
    sparse = Architecture(2, 1, 40, (0.3, 0.3)).build()  # dead neurons have no code: only the live ones count
    live = sum(sparse.live_widths())
    assert 0 < live < 12 and naswot(sparse, torch.ones(1, 2)) == pytest.approx(math.log(live))


def test_gradient_norm_and_snip_by_hand():
    model = one_layer([[0.0, 0.0], [0.0, 0.0]])  # p = 1/2, dC/dw = (p - onehot) x = +-x / 2
    x, y = torch.tensor([[3.0, 4.0]]), torch.tensor([0])
    assert gradient_norm(model, x, y) == pytest.approx(math.sqrt(2 * 25 / 4))
    assert snip(model, x, y) == 0.0
    assert gradient_flow_at(model, x, y, p=1.0) == pytest.approx(7.0)
    assert model.linears[0].weight.grad is None


def test_power_laws_are_extrapolated():
    curve = [0.9 - 0.4 * t**-1.0 for t in range(1, 6)]
    assert extrapolate(curve, 20) == pytest.approx(0.9 - 0.4 / 20, abs=0.01)
    assert extrapolate([0.3, 0.5], 20) == 0.5
    assert extrapolate([0.3, 0.5, 0.6, 0.7], 4) == 0.7
    with pytest.raises(ValueError, match="curve must have at least one value, got none"):
        extrapolate([], 3)


def test_rank_correlations_by_hand():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == 1.0
    assert spearman([1, 2, 3], [3, 2, 1]) == -1.0
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)
    assert kendall([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.6)
    assert math.isnan(spearman([1, 1], [1, 2])) and math.isnan(kendall([1, 1], [1, 2]))


@pytest.mark.parametrize("correlation", [spearman, kendall])
def test_rank_correlations_agree_with_scipy_on_ties(correlation):
    stats = pytest.importorskip("scipy.stats")
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(6, (40,), generator=g).tolist() for _ in range(2))
    expected = stats.spearmanr(a, b)[0] if correlation is spearman else stats.kendalltau(a, b)[0]
    assert correlation(a, b) == pytest.approx(expected)


@pytest.mark.parametrize("correlation", [spearman, kendall])
def test_rank_correlations_refuse(correlation):
    with pytest.raises(ValueError, match="a and b must have one length of at least 2, got 1 and 2"):
        correlation([1], [1, 2])
    with pytest.raises(ValueError, match="a and b must not contain nan"):
        correlation([1, float("nan")], [1, 2])


def test_every_estimator_is_compared_with_the_truth():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 10, generator=g)
    data = TrialData.from_arrays(x, (x[:, :3].prod(1) > 0).long())
    architectures = [Architecture(10, 2, 24, (d, d)) for d in (0.05, 0.2, 0.5, 1.0)]
    lines = []
    rows, truth = compare_estimators(architectures, data, TrialConfig(epochs=5, batch_size=50), report=lines.append)
    names = [r.name for r in rows]
    assert names[0] == "active weights (no network)" and names[-1] == "full training"
    assert {"SynFlow", "NASWOT", "gradient norm", "SNIP", "2 epochs", "extrapolated from epochs 1 to 3"} <= set(names)
    assert len(truth) == len(lines) == 4
    assert all(-1 <= r.spearman_accuracy <= 1 for r in rows if not math.isnan(r.spearman_accuracy))
    with pytest.raises(ValueError, match="architectures must be at least 4, got 3"):
        compare_estimators(architectures[:3], data, replace(TrialConfig(), epochs=1))
