"""Whether what is born learns: both sides of a new unit have a gradient, and it keeps up with the old ones (D11)."""

import math

import pytest
import torch
from torch import nn

import sparsenet as sn
from sparsenet.architecture.growth import GrowthError, deepen, newborn_ratio, widen


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def test_the_ratio_by_hand():
    model = mlp()
    report = widen(model, None, {"0": 2})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert newborn_ratio(model, report) == 1.0
    model[0].weight.grad[6:] = 0.5
    model[2].weight.grad[:, 6:] = 0.5
    assert newborn_ratio(model, report) == pytest.approx(0.5)
    model[0].weight.grad[:6] = 0.0
    model[2].weight.grad[:, :6] = 0.0
    assert newborn_ratio(model, report) == math.inf


def test_the_ratio_in_blocks_counts_what_is_inside():
    model = sn.SparseMLP([16, 20, 8], density=0.8, block_size=8)
    report = widen(model, None, {"0": 2})
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    model[0].values.grad[model[0].pattern.row_indices.long() == 2, 4:6] = 1.0
    model[1].values.grad[model[1].pattern.col.long() == 2, :, 4:6] = 1.0
    assert newborn_ratio(model, report) == pytest.approx(0.5)


def test_no_gradient_and_other_sizes_are_refused():
    model = mlp()
    report = widen(model, None, {"0": 2})
    with pytest.raises(GrowthError, match="newborn_ratio: model must have a gradient for '0', got none"):
        newborn_ratio(model, report)
    sn.compact(model, remove={"0": [0, 6, 7]})
    model(torch.randn(3, 4)).sum().backward()
    with pytest.raises(GrowthError, match="newborn_ratio: '0' must have the size it had in the report"):
        newborn_ratio(model, report)


def digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32) / 16 - 0.3, torch.tensor(y)


def stepping(model, optimizer, x, y, generator):
    batch = torch.randint(len(x), (64,), generator=generator)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
    optimizer.step()


def start(block_size):
    torch.manual_seed(0)
    if block_size:
        return sn.SparseMLP([64, 32, 32, 10], density=0.6, block_size=block_size), "0"
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)), "0"


def operands_of(model, x, y):
    """What the first layer reads, and the gradient at the second."""
    layers = [m for m in model if isinstance(m, nn.Linear | sn.SparseLinear)]
    given = x[:256].requires_grad_(False)
    hidden = torch.relu(nn.functional.linear(given, layers[0].weight, layers[0].bias))
    z = nn.functional.linear(hidden, layers[1].weight, layers[1].bias).detach().requires_grad_()
    nn.functional.cross_entropy(layers[2](torch.relu(z)), y[:256]).backward()
    return {"0": (given, z.grad)}


@pytest.mark.parametrize("block_size", [0, 8])
@pytest.mark.parametrize("how", ["pairs", "zero", "split", "gradient", "firefly"])
def test_new_units_have_a_gradient_on_both_sides_and_keep_up(how, block_size):
    if block_size and how in ("gradient", "firefly"):
        pytest.skip("the operands here are made for dense layers")
    (x, y), (model, name) = digits(), start(block_size)
    generator, optimizer = torch.Generator().manual_seed(1), torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(150):
        stepping(model, optimizer, x, y, generator)
    operands = operands_of(model, x, y) if how in ("gradient", "firefly") else None
    report = widen(model, optimizer, {name: 8}, how=how, operands=operands)
    seen = []
    for step in range(200):
        stepping(model, optimizer, x, y, generator)
        if step == 1 and not block_size:
            rows, columns = model[0].weight.grad[report.new["0"]], model[2].weight.grad[:, report.columns["2"]]
            assert (rows.abs().sum(1) > 0).float().mean() >= 0.75 and (columns.abs().sum(0) > 0).float().mean() >= 0.75
        if step >= 180:
            seen.append(newborn_ratio(model, report))
    least = 0.2 if how == "zero" else 0.5  # those that nobody listens to at first stay behind: pairs are the default
    assert sum(seen) / len(seen) >= least, f"{how}: {sum(seen) / len(seen):.2f}"


@pytest.mark.parametrize("block_size", [0, 8])
@pytest.mark.parametrize("kind", ["identity", "residual"])
def test_a_new_layer_keeps_up(kind, block_size):
    (x, y), (model, _) = digits(), start(block_size)
    generator, optimizer = torch.Generator().manual_seed(1), torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(150):
        stepping(model, optimizer, x, y, generator)
    report = deepen(model, optimizer, "0" if block_size else "1", kind=kind)
    seen = []
    for step in range(200):
        stepping(model, optimizer, x, y, generator)
        if step >= 180:
            seen.append(newborn_ratio(model, report))
    assert sum(seen) / len(seen) >= 0.5, f"{kind}: {sum(seen) / len(seen):.2f}"
