"""Element masks through a compaction: bits in the bytes, and the N:M rule where other inputs stand side by side."""

import copy
import warnings

import pytest
import torch
from torch import nn

import sparsenet as sn
from sparsenet.compaction import compact
from sparsenet.compaction.moves import model_bytes


def model_of(rule="2:4", block_size=8):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 64), nn.ReLU(), sn.SparseLinear(64, 32, density=1.0, block_size=block_size, element_mask=rule)
    )


@pytest.mark.parametrize("block_size", [1, 4, 8])
def test_bytes_count_the_mask_in_bits(block_size):
    masked, whole = model_of(0.5, block_size), model_of(None, block_size)
    more = model_bytes(masked, [])[1] - model_bytes(whole, [])[1]
    assert more == masked[2].pattern.num_blocks * -(-(block_size**2) // 8)


@pytest.mark.parametrize(
    ("removed", "stays"),
    [(range(8), True), (range(4), True), (range(16, 24), True), ([0, 1, 5, 6, 11, 13, 14, 19, 20], False)],
)
def test_the_rule_stays_where_whole_groups_leave(removed, stays):
    model = model_of()
    with torch.no_grad():
        model[0].weight[list(removed)] = model[0].bias[list(removed)] = 0
    whole, x = copy.deepcopy(model), torch.randn(5, 8)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        compact(model, permute=False)
    layer = model[2]
    assert layer.in_features == 64 - len(removed)
    torch.testing.assert_close(model(x), whole(x))
    told = [str(w.message) for w in said if "no longer keep 2:4" in str(w.message)]
    if stays:
        assert layer.elements == sn.NM(2, 4) and layer.elements.holds(layer.element_mask) and not told
    else:
        assert layer.elements is None and not sn.NM(2, 4).holds(layer.element_mask) and len(told) == 1
        layer.set_element_mask("2:4")
        assert layer.elements.holds(layer.element_mask)
