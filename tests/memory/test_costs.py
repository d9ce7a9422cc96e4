"""What layers of a model cost in a step: kinds, rows and what is updated, by hand."""

import pytest
import torch
from torch import nn

import sparsenet as sn
from sparsenet.memory import LayerCost, layer_costs


def test_linear_and_block_sparse_layers_from_a_number_of_rows():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), sn.SparseLinear(16, 4, density=1.0, block_size=4, bias=False))
    dense, block = layer_costs(model, 32)
    assert dense == LayerCost("dense", 16, 8, 32, optimizer_elements=8 * 16 + 16, input_gradient=False)
    assert block == LayerCost("block", 4, 16, 32, block_size=4, num_blocks=4, optimizer_elements=64)
    assert dense.flops == 2 * 2 * 8 * 16 * 32 and block.flops == 3 * 2 * 64 * 32


def test_a_convolutional_network_is_seen_by_its_inputs():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(8 * 16, 5),
    )  # fmt: skip
    before = model[1].running_mean.clone()
    conv, norm, pool, dense = layer_costs(model, torch.randn(3, 4, 16, 16))
    sizes = {"kernel": (3, 3), "places": 64, "groups": 2}
    elements = 8 * 2 * 9 + 8
    assert conv == LayerCost("conv", 8, 4, 3 * 64, **sizes, optimizer_elements=elements, input_gradient=False)
    assert conv.weights == 8 * 2 * 9
    assert norm == LayerCost("norm", 8, 8, 3 * 64, places=64, optimizer_elements=16)
    assert pool == LayerCost("pool", 8, 8, 3 * 16, kernel=(2, 2), places=16)
    assert dense.positions == 3 and norm.flops == 0
    assert torch.equal(model[1].running_mean, before) and not any(m._forward_hooks for m in model)


def test_rows_of_sequences_shared_and_frozen_layers():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.Linear(8, 8), nn.Linear(8, 2).requires_grad_(False)

        def forward(self, x):
            return self.last(self.inner(self.inner(x)))

    costs = layer_costs(Twice(), torch.randn(3, 5, 8))
    assert [cost.positions for cost in costs] == [15, 15, 15]
    assert [cost.optimizer_elements for cost in costs] == [72, 0, 0]
    named = layer_costs(Twice(), {"inner": 7, "last": 9})
    assert [cost.positions for cost in named] == [7, 9]


def test_refusals():
    with pytest.raises(TypeError, match="layer_costs: model must be a module, got int"):
        layer_costs(3, 1)
    with pytest.raises(ValueError, match="batch must be inputs for a model with a Conv1d, got rows"):
        layer_costs(nn.Conv1d(1, 1, 1), 4)
    with pytest.raises(ValueError, match="batch must name the rows of every layer, got none for '0'"):
        layer_costs(nn.Sequential(nn.Linear(1, 1)), {"1": 3})
    with pytest.raises(ValueError, match="kind must be one of dense, .* got 'csr'"):
        LayerCost("csr", 1, 1, 1)
    with pytest.raises(ValueError, match="positions must be an integer >= 0, got -1"):
        LayerCost("dense", 1, 1, -1)
    with pytest.raises(ValueError, match="block_size must be at least 1 for a block-sparse layer, got 0"):
        LayerCost("block", 1, 1, 1)
