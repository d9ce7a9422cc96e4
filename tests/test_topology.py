"""Topology: one owner of what changes of a layer while it trains."""

import copy
import gc
import pickle

import pytest
import torch

import sparsenet as sn
from sparsenet.functional import StaleTopologyError, registry
from sparsenet.topology import read_state

PLACES = [(0, 0), (1, 1)]


def layer_of(places, mask=None):
    """An 8 x 8 layer without bias whose 4 x 4 blocks stand at ``places``; all of its values are 1."""
    rows, cols = (torch.tensor(x) for x in zip(*places, strict=True))
    pattern = sn.BlockPattern.from_places(rows, cols, (8, 8), 4)
    layer = sn.SparseLinear(8, 8, bias=False, pattern=pattern, element_mask=mask)
    with torch.no_grad():
        layer.values.fill_(1.0)
    return layer


def other_pattern():
    return sn.BlockPattern.from_places(torch.tensor([0, 1]), torch.tensor([1, 0]), (8, 8), 4)


def test_a_layer_reached_twice_shows_its_observer_both_calls():
    """Recurrence: the observer of a backward pass sees every call, last call first."""
    layer, seen = layer_of(PLACES), []
    layer.topology.observer = lambda x, g: seen.append((x.clone(), g.clone()))
    x = torch.arange(16.0).reshape(2, 8)
    layer(layer(x)).sum().backward()
    assert len(seen) == 2
    hidden = torch.cat([x[:, :4].sum(1, keepdim=True).expand(-1, 4), x[:, 4:].sum(1, keepdim=True).expand(-1, 4)], 1)
    assert torch.equal(seen[0][0], hidden) and torch.equal(seen[0][1], torch.ones(2, 8))
    assert torch.equal(seen[1][0], x) and torch.equal(seen[1][1], torch.full((2, 8), 4.0))


def test_replacing_takes_the_observer_away_and_keeps_the_name():
    """Rewired by hand between arming and stepping: nobody goes on watching a pattern that is not there any more."""
    layer = layer_of(PLACES)
    topology, old = layer.topology, layer.pattern
    topology.label, topology.observer = "block_sparse_linear (head)", lambda x, g: pytest.fail("must not be called")
    layer.set_pattern(other_pattern())
    assert layer.topology is topology and topology.observer is None and topology.label == "block_sparse_linear (head)"
    assert registry.topology_of(old) is None and registry.topology_of(layer.pattern) is topology
    layer(torch.ones(1, 8)).sum().backward()
    x, values = torch.ones(1, 8), torch.ones(2, 4, 4)
    with pytest.raises(StaleTopologyError, match=r"^block_sparse_linear \(head\): the layer was rewired since"):
        sn.functional.block_sparse_linear(x, values, old)


@pytest.mark.parametrize("through", ["layer", "pattern", "library"])
def test_backward_of_a_forward_before_the_rewire_raises(through):
    layer = layer_of(PLACES)
    pattern, x = layer.pattern, torch.ones(2, 8)
    if through == "layer":
        y = layer(x)
    elif through == "pattern":
        y = sn.functional.block_sparse_linear(x, layer.values, pattern)
    else:
        y, _ = torch.ops.sparsenet.block_sparse_linear(
            x, layer.values, None, pattern.crow, pattern.col, 8, 8, 4, "none"
        )
    layer.set_pattern(other_pattern())
    with pytest.raises(StaleTopologyError, match="the layer was rewired since this forward"):
        y.sum().backward()
    assert layer.values.grad is None


def test_the_mask_belongs_to_the_pattern():
    """Values, pattern and mask are exchanged together: a forward pass never multiplies by another pattern's mask."""
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[:, 0] = True
    layer = layer_of(PLACES, mask)
    assert layer(torch.ones(1, 8)).tolist() == [[4.0, 0, 0, 0, 4.0, 0, 0, 0]]
    three = sn.BlockPattern.from_places(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), (8, 8), 4)
    layer.set_pattern(three, torch.ones(3, 4, 4), ~torch.cat([mask, mask[:1]]))
    assert layer(torch.ones(1, 8)).tolist() == [[0.0, 8, 8, 8, 0, 4, 4, 4]]


def test_a_copy_has_a_topology_of_its_own():
    layer = layer_of(PLACES)
    layer.topology.label, layer.topology.observer = "block_sparse_linear (head)", print
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.topology is not layer.topology and twin.topology.label == layer.topology.label
        assert twin.topology.observer is None and twin.pattern == layer.pattern
        y = layer(torch.ones(1, 8))
        twin.set_pattern(other_pattern())
        layer.topology.observer = None
        y.sum().backward()  # the original was not rewired


def test_dead_layers_leave_nothing_in_the_registry():
    gc.collect()
    before = len(registry._topologies), len(registry._retired)
    layer = layer_of(PLACES)
    layer.set_pattern(other_pattern())
    assert len(registry._topologies) == before[0] + 1
    del layer
    gc.collect()
    assert (len(registry._topologies), len(registry._retired)) == before


def test_what_is_no_pattern_is_refused_by_name():
    with pytest.raises(TypeError, match=r"block_sparse_linear: pattern must be a BlockPattern, got Tensor"):
        sn.functional.block_sparse_linear(torch.ones(1, 8), torch.ones(2, 4, 4), torch.ones(2, 2))


def test_row76_what_a_state_holds_is_read_and_nothing_changes():
    layer, other = (sn.SparseLinear(64, 48, density=d, block_size=16) for d in (0.25, 0.5))
    pattern, values = layer.pattern, layer.values.detach().clone()
    whole = {f"a.{k}": v for k, v in other.state_dict().items()}
    state = read_state(layer, whole, "a.")
    assert (state.pattern, state.element_mask, state.absent) == (other.pattern, None, [])
    assert torch.equal(state.values, other.values)
    nothing = read_state(layer, {"more": values}, "a.")
    assert nothing.values is None and nothing.absent == ["values", "crow_indices", "col_indices"]
    fitting = read_state(layer, {"values": values})
    assert fitting.pattern is pattern and fitting.absent == ["crow_indices", "col_indices"]
    with pytest.raises(ValueError, match="must come together or fit"):
        read_state(layer, {"a.values": other.values}, "a.")
    assert layer.pattern is pattern and torch.equal(layer.values, values)
