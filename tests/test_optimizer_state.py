"""Optimizer state by block, by hand: which tensors have one entry per block, and how they follow a rewire."""

import pytest
import torch
from torch import nn

from sparsenet.optimizer_state import (
    as_optimizers,
    carry_state,
    check_followable,
    check_grown_state,
    first_state,
    state_by_block,
    with_inner_optimizers,
)


def with_state(values, **state):
    optimizer = torch.optim.SGD([values], lr=0.1)
    optimizer.state[values] = state
    return optimizer


def test_only_tensors_with_an_entry_per_block_are_state_by_block():
    values = nn.Parameter(torch.zeros(3, 4, 4))
    like_values, per_block, elsewhere = torch.ones(3, 4, 4), torch.ones(3), torch.ones(4, 3)
    optimizer = with_state(values, a=like_values, b=per_block, c=elsewhere, step=torch.tensor(7.0), name="text", n=3)
    found = state_by_block(optimizer, values)
    assert set(found) == {"a", "b"} and found["a"] is like_values and found["b"] is per_block


def test_of_a_single_block_a_vector_of_one_is_a_scalar():
    values = nn.Parameter(torch.zeros(1, 4, 4))
    assert set(state_by_block(with_state(values, a=torch.ones(1, 4, 4), step=torch.ones(1)), values)) == {"a"}


def test_without_optimizer_or_state_there_is_nothing():
    values, other = nn.Parameter(torch.zeros(3, 4, 4)), nn.Parameter(torch.zeros(3, 4, 4))
    assert state_by_block(None, values) == {}
    assert state_by_block(with_state(values, a=torch.ones(3)), other) == {}


def test_blocks_that_stay_keep_their_bits_and_grown_ones_start_at_zero_or_at_the_mean():
    moments = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 12.0]])
    carried = torch.tensor([2, -1, 0])
    assert carry_state(moments, carried).tolist() == [[5.0, 12.0], [0.0, 0.0], [1.0, 2.0]]
    assert carry_state(moments, carried, "mean").tolist() == [[5.0, 12.0], [5.0, 5.0], [1.0, 2.0]]  # (5+12+1+2) / 4
    assert carry_state(moments, torch.tensor([-1, -1]), "mean").tolist() == [[0.0, 0.0]] * 2, "nothing stayed"
    assert carry_state(moments, torch.tensor([1]), "mean").tolist() == [[3.0, 4.0]], "nothing grew"


def test_grown_state_names_what_it_must_be():
    assert check_grown_state({"exp_avg_sq": "mean"}) == {"exp_avg_sq": "mean"}
    with pytest.raises(ValueError, match=r"grown_state\['exp_avg'\] must be zero or mean or .*, got 'median'"):
        check_grown_state({"exp_avg": "median"})


def test_row66_one_several_or_no_optimizer():
    one, other = (torch.optim.SGD([nn.Parameter(torch.zeros(1))]) for _ in range(2))
    assert as_optimizers(None) == () and as_optimizers(one) == (one,) and as_optimizers([one, other]) == (one, other)


def test_row66_optimizers_inside_optimizers_are_found_once():
    inner, outer = (torch.optim.SGD([nn.Parameter(torch.zeros(1))]) for _ in range(2))
    outer.parts = {"fast": [inner], "itself": outer}
    inner.parent = outer
    assert with_inner_optimizers([outer, inner]) == (outer, inner)


def test_row66_what_cannot_follow_is_named():
    values = nn.Parameter(torch.zeros(3, 4, 4))
    check_followable(with_state(values, a=torch.ones(3, 4, 4), b=torch.ones(4, 4), history=[], n=[1.0]), values, "0", 3)
    for state, why in (
        ({"a": [torch.zeros(3, 4, 4)]}, "inside a list or dict"),
        ({"a": {"deep": torch.zeros(3, 4, 4)}}, "inside a list or dict"),
        ({"a": torch.zeros(48)}, r"its shape is \[48\]"),
        ({"a": torch.zeros(3, 3)}, r"its shape \[3, 3\] has blocks on two sides"),
    ):
        with pytest.raises(RuntimeError, match=why):
            check_followable(with_state(values, **state), values, "0", 3)


def test_row73_first_states_by_hand():
    values = nn.Parameter(torch.randn(3, 4, 4))
    assert first_state(torch.optim.SGD([values], 0.1), values) == {}
    rprop = first_state(torch.optim.Rprop([values], lr=0.25), values)
    assert rprop["step_size"].tolist() == torch.full((1, 4, 4), 0.25).tolist() and not rprop["prev"].any()
    assert set(first_state(torch.optim.Adam([values]), values)) == {"exp_avg", "exp_avg_sq"}
    outer = torch.optim.Adam([values])
    outer.inner = torch.optim.SGD([values])
    before = values.detach().clone()
    assert first_state(outer, values) == {} and torch.equal(values, before)
    moved = carry_state(torch.ones(2, 4, 4), torch.tensor([1, -1]), rprop["step_size"])
    assert moved[:, 0, 0].tolist() == [1.0, 0.25]
