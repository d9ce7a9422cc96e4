"""Criteria, by hand: what a view of a layer says of its units, and which of them leave."""

import copy

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import sparsenet as sn
from sparsenet.compaction.criteria import OBD, Activity, Cascade, Fisher, Magnitude, RarelyActive, Taylor, unit_views
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


# --- second order ---------------------------------------------------------------------------------------------------


def test_fisher_is_half_the_mean_square_of_each_examples_pull():
    """Against a loop over single examples: value times gradient of that example's own loss."""
    model, x, y = network().double(), torch.randn(9, 2).double(), torch.randn(9, 1).double()
    hidden = unit_views(UnitGraph(model))["0"]
    total = torch.zeros(3).double()
    for one, target in zip(x, y, strict=True):
        values = torch.relu(model[0](one)).detach().requires_grad_()
        nn.functional.mse_loss(model[2](values), target).backward()
        total += (values.detach() * values.grad).square()
    for batches in ([(x, y)], [(x[:4], y[:4]), (x[4:], y[4:])]):
        found = hidden.statistics(batches, nn.functional.mse_loss)
        torch.testing.assert_close(found.fisher, total / 18)
        assert Fisher(batches, nn.functional.mse_loss, share=1 / 3)(hidden).sum() == 1
    assert all(p.grad is not None for p in model[2].parameters()), "those of the loop above"
    torch.testing.assert_close(hidden.statistics([x]).variance, torch.relu(model[0](x)).var(0, correction=0).detach())


class Residual(nn.Module):
    """Units that three layers read, convolutional and block-sparse."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.outer = nn.Conv2d(8, 8, 3, padding=1)
        self.head = sn.SparseLinear(8 * 16, 16, density=0.6, block_size=8, activation="relu")
        self.out = nn.Linear(16, 4)

    def forward(self, x):
        """[batch, 2, 4, 4] -> [batch, 4]."""
        h = torch.relu(self.stem(x))
        h = h + self.outer(torch.relu(self.inner(h)))
        return self.out(self.head(torch.flatten(h, 1)))


def trained_residual(steps=100, rows=300):
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(rows, 2, 4, 4)
    y = torch.multinomial(torch.softmax(x.flatten(1) @ torch.randn(32, 4), 1), 1).flatten()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, x, y


def without(model, stage_name, unit, x, y):
    """The loss when what every layer reads of a unit of that layer is zero."""
    view = unit_views(UnitGraph(model))[stage_name]
    graph = UnitGraph(model)
    hooks = []
    for stage in graph.stages:
        if stage.weights is not None and stage.inputs is not None:
            gone = graph.classes[stage.inputs.units] == graph.classes[view.units[unit]]

            def zero(module, args, dim=stage.inputs.dim, gone=gone):
                shape = [1] * args[0].dim()
                shape[dim] = len(gone)
                return (args[0].masked_fill(gone.reshape(shape), 0.0),)

            hooks.append(stage.module.register_forward_pre_hook(zero))
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(model(x), y))
    for hook in hooks:
        hook.remove()
    return loss


def test_units_are_ranked_as_their_removal_does(one_thread):
    """Channels of convolutions and of a residual stream, and units of a block-sparse layer."""
    model, x, y = trained_residual(rows=1000)
    views = unit_views(UnitGraph(model))
    with torch.no_grad():
        before = float(nn.functional.cross_entropy(model(x), y))
    batches, scores, changes = [(x, y)], {}, []
    for name in ("stem", "inner", "head"):
        changes += [without(model, name, unit, x, y) - before for unit in range(views[name].num_units)]
        for label, criterion in {
            "obd": OBD([x], 0.5, samples=20),
            "fisher": Fisher(batches, nn.functional.cross_entropy, 0.5),
            "magnitude": Magnitude(0.5),
        }.items():
            scores.setdefault(label, []).extend(criterion.scores(views[name]).tolist())
    ranked = {label: spearmanr(found, changes).statistic for label, found in scores.items()}
    assert ranked["obd"] >= 0.9 and ranked["fisher"] >= 0.9, ranked
    assert ranked["magnitude"] < ranked["obd"]


def test_the_pull_of_a_residual_unit_is_that_of_all_its_readers_once():
    """Against the derivative by a factor on what they read, which is what compaction takes away."""
    model, x, y = trained_residual(steps=3)
    view = unit_views(UnitGraph(model))["stem"]
    factor = torch.ones(len(x), 8, 1, 1, requires_grad=True)

    def loss_of(factor):
        h = torch.relu(model.stem(x))
        read = h * factor
        h = h + model.outer(torch.relu(model.inner(read)))
        return nn.functional.cross_entropy(model.out(model.head(torch.flatten(h * factor, 1))), y)

    (pull,) = torch.autograd.grad(loss_of(factor), factor)
    pull = pull.flatten(1).double()
    found = view.statistics([(x, y)], nn.functional.cross_entropy)
    torch.testing.assert_close(found.fisher, (pull * len(x)).square().mean(0) / 2, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found.taylor, pull.abs().mean(0), rtol=1e-4, atol=1e-9)


def test_measuring_leaves_no_trace():
    model, x, _ = trained_residual(steps=1)
    model.out.bias.register_post_accumulate_grad_hook(lambda p: pytest.fail("no gradient is for the parameters"))
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    gradients = [p.grad for p in model.parameters()]
    view = unit_views(UnitGraph(model))["inner"]
    a, b = (OBD([x], 0.5, seed=seed).scores(view) for seed in (0, 1))
    assert not torch.equal(a, b) and torch.equal(a, OBD([x], 0.5).scores(view))
    assert model.training and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))


def test_a_cascade_takes_from_the_shortlist_what_the_expensive_criterion_says():
    class Given:
        def __init__(self, *scores):
            self.values = torch.tensor(scores).double()

        def scores(self, view):
            return self.values

    model = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 1))
    hidden = unit_views(UnitGraph(model))["0"]
    cheap, expensive = Given(1, 2, 3, 4, 5, 6), Given(9, 3, 4, 2, 1, 0)
    chosen = Cascade(cheap, expensive, share=1 / 3, shortlist=2.0)(hidden)
    assert chosen.tolist() == [False, True, False, True, False, False]
    chosen = Cascade(cheap, expensive, share=1 / 3, shortlist=2.0, group=2)(hidden)  # pairs: 12, 6 | 1
    assert chosen.tolist() == [False, False, True, True, False, False]
    assert Cascade(cheap, expensive, share=1 / 3, shortlist=3.0)(hidden).tolist() == [False] * 4 + [True] * 2
    assert Cascade(cheap, expensive, share=1 / 3, shortlist=1.0)(hidden).tolist() == [True] * 2 + [False] * 4


def test_activity_takes_the_quietest():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    hidden = unit_views(UnitGraph(network()))["0"]  # mean squares 25/4, 1/4, 1/16
    assert Activity([x], share=1 / 3)(hidden).tolist() == [False, False, True]
    assert Activity([x], share=2 / 3, by="variance")(hidden).tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (lambda: Activity([], 0.5), "Activity: batches must hold at least one batch, got none"),
        (lambda: Activity([], 0.5, by="median"), "Activity: by must be mean_square or variance, got 'median'"),
        (lambda: OBD([], 0.5), "compact: batches must hold at least one batch, got none"),
        (lambda: OBD([torch.randn(4, 2)], 0.5), r"the model's output must be .* got torch.float32 \[4, 1\]"),
        (lambda: OBD([torch.randn(4, 2)], 0.5, targets="poisson"), "targets must be one of softmax, gaussian"),
        (lambda: Fisher([(torch.full((4, 2), torch.nan), torch.ones(4, 1))], nn.functional.mse_loss, 0.5), "got NaN"),
        (lambda: Fisher([(torch.ones(4, 2), None)], lambda output, target: output, 0.5), r"one number .* \[4, 1\]"),
        (lambda: Cascade(Magnitude(0.1), Magnitude(0.1), 0.5, shortlist=0.9), "shortlist must be at least 1, got 0.9"),
    ],
)
def test_what_cannot_be_scored_is_refused_and_nothing_changes(criterion, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        sn.compact(model, criterion=criterion())
    assert model[0].out_features == 3
