"""Tri-state ReLU and its relatives: values and gradients by hand, the penalty's geometry, clipping, every message."""

import copy
import gc
import pickle
import re

import pytest
import torch
from torch import nn

import sparsenet as sn
from sparsenet import after_step
from sparsenet.architecture.gate_kinds import GATES, HardConcreteGate
from sparsenet.architecture.gates import (
    TriStateReLU,
    architecture_penalty,
    clip_gates_,
    close_gates_,
    gate_parameters,
    gated_layers,
    parameter_groups,
    penalty_strengths,
)

# --- the unit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "depth", "expected"),
    [(0.49, 0.0, [0.0, 0.0]), (0.5, 0.49, [3.0, 0.0]), (1.0, 0.5, [3.0, -2.0]), (0.2, 1.0, [0.0, 0.0])],
)
def test_three_states(width, depth, expected):
    unit = TriStateReLU(1, width_start=width, depth_start=depth)
    assert unit(torch.tensor([[3.0], [-2.0]])).flatten().tolist() == expected
    assert unit.is_identity() == (depth >= 0.5)
    assert unit.closed_units().tolist() == [width < 0.5]


@pytest.mark.parametrize("depth", [0.2, 0.7])
@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 5, 2)])
def test_gradients_are_the_papers(shape, depth):
    # dL/dw = sum delta (x or d' x); dL/dd = sum delta w' min(x, 0); dL/dx = delta w' (1 or d')
    unit = TriStateReLU(4, width_start=torch.tensor([0.1, 0.5, 0.9, 0.3]), depth_start=depth).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    delta = torch.randn_like(x)
    unit(x).backward(delta)
    axes = [i for i in range(len(shape)) if i != 1]
    open_ = (unit.width_gate.detach() >= 0.5).double().view([-1 if i == 1 else 1 for i in range(len(shape))])
    d = float(depth >= 0.5)
    data = x.detach()
    slope = torch.where(data >= 0, 1.0, d)
    torch.testing.assert_close(unit.width_gate.grad, (delta * slope * data).sum(axes))
    torch.testing.assert_close(unit.depth_gate.grad, (delta * open_ * data.clamp(max=0)).sum())
    torch.testing.assert_close(x.grad, delta * open_ * slope)


def test_open_relu_is_bitwise_relu_also_at_zero_nan_and_infinity():
    unit = TriStateReLU(6, width=False, depth=False)
    x = torch.tensor([[0.0, -0.0, float("nan"), float("inf"), -float("inf"), -1e-40]], requires_grad=True)
    y, reference = unit(x), torch.relu(x)
    assert torch.equal(y.isnan(), reference.isnan()) and torch.equal(y[:, [0, 3, 4, 5]], reference[:, [0, 3, 4, 5]])


def test_last_dimension_and_half_types():
    unit = TriStateReLU(3, dim=-1, width_start=torch.tensor([1.0, 0.0, 1.0]))
    x = torch.randn(2, 5, 3)
    assert torch.equal(unit(x), torch.relu(x) * torch.tensor([1.0, 0.0, 1.0]))
    with torch.autocast("cpu", torch.bfloat16):
        y = unit(x.bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert unit.width_gate.grad.dtype == torch.float32


def test_double_backward_raises():
    unit = TriStateReLU(3)
    x = torch.randn(2, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(unit(x).exp().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_compiles_without_graph_breaks():
    model = nn.Sequential(nn.Linear(5, 4), TriStateReLU(4, width_start=1.0), nn.Linear(4, 2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 5)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert model[1].width_gate.grad is not None


def test_switches_turn_learning_off():
    assert [p.requires_grad for p in TriStateReLU(3, width=False).parameters()] == [False, True]
    assert TriStateReLU(3, width=False).closed_units().sum() == 0
    assert [p.requires_grad for p in TriStateReLU(3, depth=False).parameters()] == [True, False]


def test_uniform_start_is_reproducible():
    a, b = (TriStateReLU(50, generator=torch.Generator().manual_seed(3)).width_gate for _ in range(2))
    assert torch.equal(a, b) and 0 <= a.min() < 0.2 and 0.8 < a.max() <= 1


# --- clipping -------------------------------------------------------------------------------------------------------


class HandMade(torch.optim.Optimizer):
    """Sign descent, written here."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad.sign())


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=50.0, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=3.0),
        lambda p: torch.optim.RMSprop(p, lr=3.0),
        lambda p: HandMade(p, lr=3.0),
    ],
)
def test_gates_are_clipped_after_any_optimizers_step(make):
    unit = TriStateReLU(20)
    optimizer = make(unit.parameters())
    for _ in range(3):
        unit.zero_grad()
        (unit(torch.randn(9, 20)).sum() + architecture_penalty(unit, 1.0)).backward()
        optimizer.step()
        assert unit.width_gate.min() >= 0 and unit.width_gate.max() <= 1
        assert 0 <= unit.depth_gate <= 1


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_clipped_too(copy_of):
    unit = copy_of(TriStateReLU(4))
    optimizer = torch.optim.SGD(unit.parameters(), lr=100.0)
    architecture_penalty(unit, 1.0).backward()
    optimizer.step()
    assert unit.width_gate.min() >= 0 and unit.width_gate.max() <= 1


def test_clip_gates_for_a_step_without_torch_optim():
    unit = TriStateReLU(4)
    with torch.no_grad():
        unit.width_gate.add_(torch.tensor([2.0, -3.0, 0.0, 0.0]))
        unit.depth_gate.fill_(-1)
    clip_gates_(unit)
    assert unit.width_gate[0] == 1 and unit.width_gate[1] == 0 and unit.depth_gate == 0


def test_optimizers_are_hooked_once_however_many_layers_come_and_go():
    from torch.optim import optimizer as optim

    for _ in range(3):
        TriStateReLU(2)
        gc.collect()
    hooks = [h for h in optim._global_optimizer_post_hooks.values() if h is after_step._mend_all]
    assert len(hooks) == 1


def test_hard_concrete_range_is_kept():
    unit = TriStateReLU(4, gates="hard_concrete")
    with torch.no_grad():
        unit.width_gate.copy_(torch.tensor([-99.0, 99.0, 0.0, 1.0]))
    clip_gates_(unit)
    assert unit.width_gate.tolist() == pytest.approx([HardConcreteGate.low, HardConcreteGate.high, 0.0, 1.0])


# --- the penalty ----------------------------------------------------------------------------------------------------


def two_layers():
    return nn.ModuleDict(
        {
            "a": TriStateReLU(2, width_start=torch.tensor([0.25, 0.75]), depth_start=0.2),
            "b": TriStateReLU(1, width_start=torch.tensor([0.5]), depth_start=0.6),
        }
    )


def test_penalty_and_its_gradient_by_hand():
    model = two_layers()
    # l1: 2 * .1875 + .25 = .625; l2: .16 + .24 = .4; l3: only layer a (d < .5): 1; l4: .8
    penalty = architecture_penalty(model, lambda_3=3.0, lambda_1=1.0, lambda_2=2.0, lambda_4=4.0)
    assert penalty.item() == pytest.approx(1 * 0.625 + 2 * 0.4 + 3 * 1.0 - 4 * 0.8)
    penalty.backward()
    assert model["a"].width_gate.grad.tolist() == pytest.approx([0.5 + 3, -0.5 + 3])
    assert model["b"].width_gate.grad.tolist() == pytest.approx([0.0])  # its d is 1: units cost nothing
    assert model["a"].depth_gate.grad.item() == pytest.approx(2 * 0.6 - 4)
    assert model["b"].depth_gate.grad.item() == pytest.approx(2 * -0.2 - 4)


def test_heuristics_are_the_papers():
    lenet = nn.ModuleList([TriStateReLU(20), TriStateReLU(50), TriStateReLU(500)])
    one, two, three, four = penalty_strengths(lenet)
    assert (three, one, two, four) == pytest.approx((1e-5, 2.5e-5, 2.5e-6, 1e-6))
    assert penalty_strengths(TriStateReLU(5700))[2] == pytest.approx(1e-6)  # ten times the units, a tenth of lambda_3


def test_strengths_may_be_schedules():
    unit = TriStateReLU(2, width_start=1.0, depth=False)
    warm = sn.Linear(0.0, 1.0, steps=10)
    values = [architecture_penalty(unit, warm, step=s).item() for s in (0, 5, 10, 99)]
    assert values == pytest.approx([0.0, 1.0, 2.0, 2.0])


def test_gates_that_do_not_learn_cost_nothing():
    frozen = TriStateReLU(7, width=False, depth=False)
    assert architecture_penalty(frozen, 1.0).item() == 0.0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_b1_survivors_without_data(seed):
    """B1: gates below 1/2 + lambda_3 / (2 lambda_1) = 0.7 fall, those above rise: 150 of 500 uniform gates stay.

    In one epoch's 938 steps at gate_lr 0.3; here in 94 steps ten times as long.
    """
    unit = TriStateReLU(500, depth=False, generator=torch.Generator().manual_seed(seed))
    above = int((unit.width_gate > 0.7).sum())
    optimizer = torch.optim.SGD(unit.parameters(), lr=3.0, momentum=0.9)
    for _ in range(94):
        optimizer.zero_grad()
        architecture_penalty(unit, lambda_3=0.4e-2, lambda_1=1e-2).backward()
        optimizer.step()
    assert unit.num_open() == above  # 137 to 163 over these seeds: binomial, deviation 10
    assert abs(unit.num_open() - 150) <= 30
    assert torch.equal(unit.width_gate, unit.width_gate.round())


def test_equal_strengths_close_all_gates_but_one_and_depth_falls_below_its_peak():
    unit = TriStateReLU(50, depth_start=0.28)  # d* = 1/2 - 0.4/2 = 0.3
    other = TriStateReLU(50, depth_start=0.32)
    model = nn.ModuleList([unit, other])
    strongest = int(unit.width_gate.argmax())
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    for _ in range(300):
        optimizer.zero_grad()
        architecture_penalty(model, lambda_3=1e-2, lambda_1=1e-2, lambda_2=1e-2, lambda_4=0.4e-2).backward()
        optimizer.step()
    assert (~unit.closed_units()).nonzero().flatten().tolist() == [strongest] and unit.width_gate[strongest] == 0.5
    assert not unit.is_identity() and other.is_identity()


@pytest.mark.parametrize("kind", ["straight_through", "hard_concrete"])
def test_the_strongest_gate_of_a_layer_is_held_half_open(kind):
    unit = TriStateReLU(3, gates=kind)
    with torch.no_grad():
        unit.width_gate.copy_(unit.kind.initial(torch.tensor([0.1, 0.3, 0.2])))
    clip_gates_(unit)
    half = unit.kind.initial(torch.tensor([0.5]))
    assert unit.width_gate[1] == half and unit.width_gate[[0, 2]].max() < half
    assert not unit.closed_units()[1]


# --- relatives ------------------------------------------------------------------------------------------------------


def test_hard_concrete_by_hand():
    kind = GATES["hard_concrete"]
    log_alpha = torch.tensor([0.0, -4.0, 4.0])
    # sigmoid(0) * 1.2 - 0.1 = 0.5; sigmoid(-4) * 1.2 - 0.1 = -0.078 -> 0; sigmoid(4) * 1.2 - 0.1 = 1.078 -> 1
    assert kind.value(log_alpha, training=False).tolist() == pytest.approx([0.5, 0.0, 1.0])
    assert kind.closed(log_alpha).tolist() == [False, True, False]
    shift = 2 / 3 * torch.tensor(0.1 / 1.1).log()
    assert kind.cost(log_alpha).item() == pytest.approx(torch.sigmoid(log_alpha - shift).sum().item())


def test_hard_concrete_samples_match_their_expected_count():
    unit = TriStateReLU(20_000, gates="hard_concrete", width_start=0.5)
    samples = unit.kind.value(unit.width_gate, training=True)
    share = (samples > 0).float().mean().item()
    assert share == pytest.approx(unit.kind.cost(unit.width_gate).item() / 20_000, abs=0.02)
    assert (samples == 0).any() and (samples == 1).any()


def test_straight_through_counts_open_units():
    unit = TriStateReLU(3, gates="straight_through", width_start=torch.tensor([0.2, 0.6, 0.9]), depth=False)
    penalty = architecture_penalty(unit, lambda_3=2.0)
    assert penalty.item() == 4.0
    penalty.backward()
    assert unit.width_gate.grad.tolist() == [2.0, 2.0, 2.0]


def test_slimming_scales_and_has_an_l1_penalty():
    unit = TriStateReLU(3, gates="slimming", depth=False)
    with torch.no_grad():
        unit.width_gate.copy_(torch.tensor([-0.5, 0.0, 2.0]))
    x = torch.tensor([[1.0, 1.0, -1.0], [2.0, 2.0, 3.0]])
    assert torch.equal(unit(x), torch.relu(x) * unit.width_gate)
    assert architecture_penalty(unit, 0.1).item() == pytest.approx(0.25)
    assert unit.closed_units().tolist() == [False, True, False]


@pytest.mark.parametrize("kind", list(GATES))
def test_close_gates_by_share_and_threshold(kind):
    model = nn.Sequential(TriStateReLU(6, gates=kind), TriStateReLU(2, gates=kind))
    with torch.no_grad():
        raw = torch.tensor([0.9, 0.05, 0.6, 0.55, 0.8, 0.7])
        model[0].width_gate.copy_(model[0].kind.initial(raw))
        model[1].width_gate.copy_(model[1].kind.initial(torch.tensor([0.01, 0.02])))
    assert close_gates_(model, share=0.5) == (4 if kind in ("tri_state", "straight_through") else 3)
    # the four weakest are .01 .02 .05 .55, and layer 1 keeps its strongest, .02 (which a threshold calls closed anyway)
    assert model[0].closed_units().tolist() == [False, True, False, True, False, False]
    assert model[1].closed_units()[0]
    close_gates_(model, below=0.65)
    assert model[0].num_open() == 3


def test_gates_that_do_not_learn_are_not_closed():
    model = nn.Sequential(
        TriStateReLU(10, width=False), TriStateReLU(4, width_start=torch.tensor([0.6, 0.7, 0.8, 0.9]))
    )
    assert close_gates_(model, share=0.5) == 2  # half of 4, not of 14
    assert model[0].num_open() == 10 and model[1].closed_units().tolist() == [True, True, False, False]


@pytest.mark.parametrize("kind", list(GATES))
def test_training_learns_with_every_kind(kind):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 32), TriStateReLU(32, gates=kind, depth=False), nn.Linear(32, 2))
    optimizer = torch.optim.SGD(parameter_groups(model, gate_lr=0.3), lr=0.05, momentum=0.9)
    x = torch.randn(256, 6)
    y = (x[:, 0] * x[:, 1] > 0).long()
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        (loss + architecture_penalty(model, lambda_3=2e-3, lambda_1=1e-3)).backward()
        optimizer.step()
    model.eval()
    assert (model(x).argmax(1) == y).float().mean() > 0.85


def test_parameter_groups_split_gates_from_weights():
    model = nn.Sequential(nn.Linear(3, 4), TriStateReLU(4), nn.Linear(4, 2), TriStateReLU(2, width=False, depth=False))
    weights, gate_group = parameter_groups(model, gate_lr=0.3, momentum=0.5)
    assert len(weights["params"]) == 4
    assert gate_group["lr"] == 0.3 and gate_group["weight_decay"] == 0.0 and gate_group["momentum"] == 0.5
    assert [id(p) for p in gate_group["params"]] == [id(p) for p in gate_parameters(model)]
    assert list(gated_layers(model)) == ["1", "3"]


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TriStateReLU(0), "TriStateReLU: num_features must be an integer >= 1, got 0"),
        (lambda: TriStateReLU(2.5), "num_features must be an integer >= 1, got 2.5"),
        (lambda: TriStateReLU(3, gates="soft"), "gates must be one of tri_state, straight_through, hard_concrete"),
        (
            lambda: TriStateReLU(3, width_start="ones"),
            "width_start must be 'uniform', a number or a tensor, got",
        ),
        (lambda: TriStateReLU(3, width_start=1.5), "width_start must be a number in [0, 1], got 1.5"),
        (lambda: TriStateReLU(3, width_start=torch.ones(2)), "width_start must be [3] in [0, 1], got [2]"),
        (lambda: TriStateReLU(3, width_start=torch.full((3,), float("nan"))), "width_start must be [3] in [0, 1]"),
        (lambda: TriStateReLU(3, depth_start=float("nan")), "depth_start must be a number in [0, 1], got nan"),
        (lambda: TriStateReLU(3)(torch.ones(2, 4)), "x must have 3 entries in dimension 1, got [2, 4]"),
        (lambda: TriStateReLU(3)(torch.ones(3)), "x must have 3 entries in dimension 1, got [3]"),
        (lambda: architecture_penalty(nn.Linear(2, 2)), "model must hold at least one TriStateReLU"),
        (lambda: architecture_penalty(TriStateReLU(2), -1.0), "lambda_3 must be finite and at least 0, got -1.0"),
        (lambda: architecture_penalty(TriStateReLU(2), 1.0, sn.Constant(-2.0)), "lambda_1 must be finite"),
        (lambda: close_gates_(TriStateReLU(2)), "give share or below"),
        (
            lambda: close_gates_(TriStateReLU(2, width=False), below=0.1),
            "at least one TriStateReLU whose gates learn, got",
        ),
        (lambda: close_gates_(TriStateReLU(2), share=0.1, below=0.1), "give share or below"),
        (lambda: close_gates_(TriStateReLU(2), share=1.0), "share must lie in [0, 1), got 1.0"),
    ],
)
def test_bad_input_is_refused_with_a_clear_message(make, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        make()
