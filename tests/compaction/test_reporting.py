"""The report: for every dead unit that had to stay there is a reason; by hand, and counted over random networks."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import Residual, random_network
from torch import nn

import sparsenet as sn


def zero_rows(layer):
    """Bool by output: nothing comes in, so that it is constant whatever the network reads."""
    weight = layer.weight_dense() if isinstance(layer, sn.SparseLinear) else layer.weight
    return (weight.detach().flatten(1) == 0).all(1)


def layers_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | sn.SparseLinear)}


@pytest.mark.parametrize("family", ["dense", "block_sparse", "mixed", "cnn"])
@settings(max_examples=40)
@given(seed=st.integers(0, 2**31))
def test_row84_every_dead_unit_left_or_has_a_reason(family, seed):
    """Rows without weights, and closed gates behind a layer, in 160 random networks."""
    model, _ = random_network(seed, family)
    dead = {name: zero_rows(layer) for name, layer in layers_of(model).items()}
    for name, module in model.named_modules():
        parts = list(module.named_children()) if type(module) is nn.Sequential else []
        for (layer_name, layer), (_, gate) in pairwise(parts):
            if isinstance(gate, sn.TriStateReLU) and isinstance(layer, nn.Linear | nn.Conv2d | sn.SparseLinear):
                key = f"{name}.{layer_name}".lstrip(".")
                dead[key] = dead[key] | gate.closed_units()
    report = sn.compact(model, strict=False)
    assert set(report.layers) <= dead.keys() and set(report.layers) == set(layers_of(model))
    for name, change in report.layers.items():
        stay = int(dead[name][change.kept_units].sum())
        assert stay <= sum(change.kept.values()), f"{name}: {stay} dead units stay, told are {change.kept}"
        assert int(dead[name].sum()) - stay <= sum(change.removed.values())
        assert all(change.kept) and sum(change.kept.values()) <= change.after
    again = sn.compact(copy.deepcopy(model), strict=False)
    for name, change in again.layers.items():
        assert int(zero_rows(layers_of(model)[name]).sum()) <= sum((change.kept | change.removed).values())


@torch.no_grad()
def zeroed(layer, rows=(), columns=(), bias=None):
    """The layer with these rows and columns zero; ``bias`` for the rows."""
    layer.weight[list(rows)] = 0
    layer.weight[:, list(columns)] = 0
    if bias is not None:
        layer.bias[list(rows)] = bias
    return layer


def kept(model, layer="0", **options):
    return sn.compact(model, **options).layers[layer].kept


def test_row84_constants_that_stay():
    dead, reader = zeroed(nn.Linear(3, 5), [1, 2], bias=2.0), nn.Linear(5, 2)
    assert kept(nn.Sequential(copy.deepcopy(dead))) == {"the model returns it": 2}
    norm = nn.BatchNorm1d(5)
    assert kept(nn.Sequential(copy.deepcopy(dead), norm, copy.deepcopy(reader))) == {
        "what stands before its readers makes it vary": 2
    }
    assert kept(nn.Sequential(copy.deepcopy(dead), nn.Dropout(0.5), copy.deepcopy(reader))) == {
        "what stands before its readers makes it vary": 2
    }
    no_bias = nn.Linear(5, 2, bias=False)
    assert kept(nn.Sequential(copy.deepcopy(dead), no_bias)) == {
        "a reader has no bias to take it, or pads with zeros": 2
    }
    assert kept(nn.Sequential(copy.deepcopy(dead), nn.Softmax(1), copy.deepcopy(reader))) == {
        "module '1' (Softmax) reads it": 2
    }
    stream = nn.Sequential(
        nn.Linear(3, 5),
        Residual(nn.Sequential(nn.Linear(5, 4), copy.deepcopy(dead := zeroed(nn.Linear(4, 5), [1, 2])))),
    )
    assert kept(stream.append(reader), "1.branch.1") == {"it is added to units that live": 2}


def test_row84_units_that_nobody_reads_and_stay():
    reader = zeroed(nn.Linear(5, 2), columns=[0, 3])

    class Asked(nn.Sequential):
        def forward(self, x):
            x = self[0](x)
            return self[1](x) * x.shape[1]

    assert kept(Asked(nn.Linear(3, 5), copy.deepcopy(reader))) == {"its number of channels is asked for": 2}
    everything = nn.Sequential(nn.Linear(3, 5), zeroed(nn.Linear(5, 4), columns=range(5)), nn.Linear(4, 2))
    assert kept(everything) == {"a layer keeps at least one unit": 1}
    opaque = nn.Sequential(nn.Linear(3, 5), copy.deepcopy(reader))
    assert kept(opaque, opaque=["1"]) == {"module '1' is left whole as asked": 2}
    assert kept(nn.Sequential(nn.Linear(3, 5), nn.utils.parametrizations.weight_norm(nn.Linear(5, 2)))) == {}


def test_row84_layers_that_stay_whole():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.shared, self.last = nn.Linear(3, 4), zeroed(nn.Linear(4, 4), [2], [1]), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(self.shared(self.shared(self.first(x))))

    report = sn.compact(Twice())
    assert report.removed == 0
    reason = "module 'shared' is called 2 times"
    assert report.layers["shared"].kept == {reason: 1} and report.layers["first"].kept == {reason: 1}
    assert f"1 stay: {reason}" in str(report)
    grouped = nn.Conv2d(4, 4, 1, groups=2)
    with torch.no_grad():
        grouped.weight[1] = 0
    assert kept(nn.Sequential(nn.Conv2d(1, 4, 3), grouped, nn.Conv2d(4, 2, 1)), "1") == {
        "module '1' is not followed": 1
    }


def test_row84_closed_gates_that_stay():
    """Behind what is not followed the gate has the entry: no layer is known to make its units."""
    start = torch.tensor([1.0, 0.0, 0.0, 1.0])
    model = nn.Sequential(nn.Linear(3, 4), nn.Softmax(1), sn.TriStateReLU(4, width_start=start), nn.Linear(4, 2))
    with pytest.raises(sn.compaction.CompactionError, match="a closed unit of '2' cannot be removed"):
        sn.compact(copy.deepcopy(model))
    report = sn.compact(model, strict=False)
    assert report.layers["2"].kept == {"module '1' (Softmax) reads it": 2} and report.removed == 0
    model = nn.Sequential(nn.Linear(3, 4), sn.TriStateReLU(4, width_start=start))
    assert kept(model, strict=False) == {"the model returns it": 2}


# --- copies ---------------------------------------------------------------------------------------------------------


def test_row68_followers_of_the_sparsifier_are_compacted_along():
    """Each once, also where it is among ``copies``; what follows nothing is left alone."""
    torch.manual_seed(0)
    model = nn.Sequential(sn.SparseLinear(8, 16, density=1.0, block_size=4), nn.ReLU(), nn.Linear(16, 2))
    with torch.no_grad():
        model[2].weight[:, :4] = 0
    average, best, other = torch.optim.swa_utils.AveragedModel(model), copy.deepcopy(model), copy.deepcopy(model)
    sparsifier = sn.Sparsifier(model, None, sn.SET(), every=100)
    sparsifier.followers = [average, best]
    sn.compact(model, sparsifier=sparsifier, copies=[best])
    assert [m[0].out_features for m in (model, average.module, best, other)] == [12, 12, 12, 16]
    x = torch.randn(3, 8)
    torch.testing.assert_close(best(x), other(x))
    torch.testing.assert_close(average(x), other(x))
