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


def test_in_groups_the_last_element_of_a_column_stays():
    """Two rows of 2:4 share four columns, each with one element: none can leave. With a third row some can."""
    for rows, expected in ((2, 0), (3, 1)):
        mask = torch.zeros(1, 4, 4, dtype=torch.bool)
        mask[0, 0, :2] = mask[0, 1, 2:] = True
        mask[0, 2, :2] = rows == 3
        pattern = sn.BlockPattern([0, 1], [0], (rows, 4), 4)
        layer = sn.SparseLinear(4, rows, pattern=pattern, element_mask=mask)
        layer.topology.elements = sn.NM(2, 4)
        sparsifier = sn.Sparsifier(torch.nn.Sequential(layer), None, sn.SET(1 / rows), every=1, elements=True)
        change = sparsifier.step().layers["0"]
        assert change.dropped == change.grown == expected * 2 and change.dropped + change.held == 2
        assert layer.weight_dense().shape == (rows, 4) and layer.element_mask[0].any(0).all()
