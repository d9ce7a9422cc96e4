"""The pattern and mask that follow from what leaves and what enters."""

import torch

import sparsenet as sn


def test_a_block_without_elements_stays_where_nothing_is_exchanged():
    """And the update says so: one block of two has no active element, and nothing moves."""
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 0, :3] = True
    layer = sn.SparseLinear(8, 4, pattern=sn.BlockPattern([0, 2], [0, 1], (4, 8), 4), element_mask=mask)
    model = torch.nn.Sequential(layer)
    update = sn.Sparsifier(model, None, sn.Static(), every=1, elements=True).step()
    assert layer.pattern.num_blocks == update.layers["0"].num_blocks == 2
    assert update.layers["0"].density == 3 / 32
