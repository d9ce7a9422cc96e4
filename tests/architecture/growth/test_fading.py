"""What fades falls along a straight line whatever the optimizer does, and comes back exactly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsenet as sn
from sparsenet.architecture.growth.fading import Fade, Fades, group_of, outgoing_of, scale_columns
from sparsenet.compaction.graph import UnitGraph


def network(kind: str) -> tuple[nn.Module, UnitGraph]:
    torch.manual_seed(0)
    if kind == "sparse":
        generator = torch.Generator().manual_seed(0)
        model = sn.SparseMLP([8, 16, 4], 1.0, 4, distribution="uniform", generator=generator)
    else:
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    return model, UnitGraph(model, zeros=False)


def of_reader(model: nn.Module) -> torch.Tensor:
    last = list(model)[-1]
    return last.weight_dense().detach() if isinstance(last, sn.SparseLinear) else last.weight.detach().clone()


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_straight_line_to_zero(kind):
    model, graph = network(kind)
    modules, items = dict(model.named_modules()), torch.tensor([4, 5, 6, 7])
    fades = Fades(ramp=4)
    fades.begin(10, [Fade("units", "0", items, torch.ones(4), outgoing_of(graph, "0", items))])
    before = of_reader(model)
    for step, left in ((11, 0.75), (12, 0.5), (13, 0.25), (14, 0.0), (15, 0.0)):
        fades.apply(step, modules)
        now = of_reader(model)
        torch.testing.assert_close(now[:, 4:8], left * before[:, 4:8])
        assert torch.equal(now[:, :4], before[:, :4]) and torch.equal(now[:, 8:], before[:, 8:])


def test_an_optimizer_cannot_hold_it_up():
    model, graph = network("dense")
    modules, items = dict(model.named_modules()), torch.tensor([3])
    fades = Fades(ramp=5)
    fades.begin(0, [Fade("units", "0", items, torch.ones(1), outgoing_of(graph, "0", items))])
    for step in range(1, 6):
        with torch.no_grad():
            model[2].weight += 1.0
        fades.apply(step, modules)
    assert not model[2].weight[:, 3].any()


def test_a_block_fades_and_comes_back():
    model, _ = network("sparse")
    modules, layer = dict(model.named_modules()), next(iter(model))
    fades, before = Fades(ramp=4), layer.values.detach().clone()
    fades.begin(0, [Fade("blocks", "0", torch.tensor([1, 3]), torch.tensor([1.0, 1.0]))])
    fades.apply(1, modules)
    torch.testing.assert_close(layer.values[[1, 3]], 0.75 * before[[1, 3]])
    sums = torch.zeros(len(before))
    sums[1] = 0.75 * 10.0  # the whole block would be worth 100, chosen with 1
    fades.look(1, {"0": (None, sums)})
    assert fades.rescue(lambda: None, 1, modules) == [("blocks", "0", 1)]
    torch.testing.assert_close(layer.values[1], before[1])
    torch.testing.assert_close(layer.values[3], 0.75 * before[3])
    assert fades.items("blocks")["0"].tolist() == [3]
    fades.drop_blocks()
    assert fades.fades == []


def test_units_of_one_block_are_rescued_together():
    model, graph = network("sparse")
    assert group_of(graph, "0") == 4
    modules, items, before = dict(model.named_modules()), torch.arange(8), of_reader(model)
    fades = Fades(ramp=4)
    fades.begin(0, [Fade("units", "0", items, torch.ones(8), outgoing_of(graph, "0", items))])
    fades.apply(1, modules)
    worth = torch.zeros(16)
    worth[5] = 0.75 * 10.0
    fades.look(1, {"0": (worth, None)})
    assert fades.rescue(lambda: graph, 1, modules) == [("units", "0", 4)]
    torch.testing.assert_close(of_reader(model)[:, 4:8], before[:, 4:8])
    fades.apply(2, modules)
    torch.testing.assert_close(of_reader(model)[:, :4], 0.5 * before[:, :4])
    torch.testing.assert_close(of_reader(model)[:, 4:8], before[:, 4:8])


def test_state_goes_on_and_columns_scale_one_by_one():
    fades, again = Fades(ramp=4), Fades(ramp=4)
    fades.begin(7, [Fade("blocks", "0", torch.tensor([1]), torch.tensor([2.0]))])
    again.load_state_dict(fades.state_dict())
    assert (again.begun, again.strength(9), again.fades[0].items.tolist()) == (7, 0.5, [1])
    conv = nn.Conv2d(3, 2, 3)
    before = conv.weight.detach().clone()
    scale_columns(conv, torch.tensor([0, 2]), torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(conv.weight.detach(), before * torch.tensor([2.0, 1.0, 3.0]).view(1, 3, 1, 1))
