"""Criteria, by hand: what a view of a layer says of its units, and which of them leave."""

import torch
from torch import nn

from sparsenet.compaction.criteria import Magnitude, RarelyActive, Taylor, unit_views
from sparsenet.compaction.graph import UnitGraph


def network():
    """2 inputs, 3 hidden units, 1 output; incoming norms 5, 1, 0.5 and outgoing norms 1, 2, 8."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 4.0], [0.0, -1.0], [0.5, 0.0]]))
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[1.0, -2.0, 8.0]]))
        model[2].bias.zero_()
    return model


def test_a_view_says_norms_and_what_may_leave():
    views = unit_views(UnitGraph(network()))
    assert list(views) == ["0", "2"]
    hidden, output = views["0"], views["2"]
    assert hidden.num_units == 3 and hidden.removable.tolist() == [True, True, True]
    assert hidden.incoming().tolist() == [5.0, 1.0, 0.5] and hidden.outgoing().tolist() == [1.0, 2.0, 8.0]
    assert output.removable.tolist() == [False], "an output of the model stays"


def test_magnitude_takes_the_smallest_products():
    hidden = unit_views(UnitGraph(network()))["0"]  # products 5, 2, 4
    assert Magnitude(1 / 3)(hidden).tolist() == [False, True, False]
    assert Magnitude(2 / 3)(hidden).tolist() == [False, True, True]


def test_statistics_are_those_of_the_values_that_are_read():
    """Hidden values of x = (1, 0), (0, 1), (-1, 0), (0, -1): (3, 4, 0, 0), (0, 0, 0, 1), (0.5, 0, 0, 0)."""
    batches = [torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])]
    hidden = unit_views(UnitGraph(network()))["0"]
    found = hidden.statistics(batches)
    assert found.zero_share.tolist() == [0.5, 0.75, 0.75]
    assert found.mean.tolist() == [7 / 4, 1 / 4, 1 / 8]
    assert found.mean_square.tolist() == [25 / 4, 1 / 4, 1 / 16]
    assert RarelyActive(batches, above=0.6)(hidden).tolist() == [False, True, True]
    assert RarelyActive(batches, above=0.75)(hidden).tolist() == [False, False, False]


def test_taylor_takes_what_changes_the_loss_least():
    """With the output as the loss the gradient of a unit is its outgoing weight: means of 7/4, 2/4 and 8/8."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    hidden = unit_views(UnitGraph(network()))["0"]
    batches = [(x, torch.zeros(4))]

    def loss(output, target):
        return output.sum()

    torch.testing.assert_close(hidden.statistics(batches, loss).taylor, torch.tensor([1.75, 0.5, 1.0]).double())
    assert Taylor(batches, loss, share=1 / 3)(hidden).tolist() == [False, True, False]
