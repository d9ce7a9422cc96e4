"""Operands given by keyword: every call that compaction follows is followed the same, however it is written."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsenet as sn
from sparsenet.compaction.graph import UnitGraph


class Two(nn.Module):
    """Two layers of 6 units, ``how(a, b)``, and a reader of ``width`` columns."""

    def __init__(self, how, width):
        super().__init__()
        self.how, self.a, self.b, self.c = how, nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(width, 2)

    def forward(self, x):
        return self.c(self.how(self.a(x), self.b(x)))


def dead_units(how, width):
    """Units 1 and 4 of both layers are constant, unit 2 is read by nobody."""
    torch.manual_seed(0)
    model = Two(how, width).double()
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.weight[[1, 4]] = 0
        model.c.weight[:, 2::6] = 0
    return model


BINARY = {
    "add": [
        lambda a, b: a + b,
        lambda a, b: torch.add(a, other=b),
        lambda a, b: torch.add(input=a, other=b),
        lambda a, b: torch.add(other=b, input=a),
        lambda a, b: torch.add(x1=a, x2=b),
        lambda a, b: a.add(other=b),
        lambda a, b: a.add_(other=b),
        lambda a, b: torch.add(a, b, alpha=1),
    ],
    "sub": [
        lambda a, b: a - b,
        lambda a, b: torch.sub(input=a, other=b),
        lambda a, b: torch.subtract(a, other=b),
        lambda a, b: a.sub(other=b),
        lambda a, b: torch.add(a, other=b, alpha=-1),
        lambda a, b: torch.add(a, -1, alpha=1) - b + 1,
    ],
    "mul": [
        lambda a, b: a * b,
        lambda a, b: torch.mul(a, other=b),
        lambda a, b: torch.multiply(input=a, other=b),
        lambda a, b: a.mul(other=b),
        lambda a, b: a.mul_(other=b),
    ],
    "div": [
        lambda a, b: a / b,
        lambda a, b: torch.div(a, other=b),
        lambda a, b: torch.divide(input=a, other=b),
        lambda a, b: a.div(other=b, rounding_mode=None),
        lambda a, b: torch.true_divide(a, other=b),
    ],
    "scaled": [
        lambda a, b: 3 * a + 2 * b,
        lambda a, b: torch.add(torch.mul(a, other=3), other=b, alpha=2),
        lambda a, b: torch.sub(input=a / 0.5 + a, other=b, alpha=-2),
    ],
}
TWICE = {
    "cat": [
        lambda a, b: torch.cat([a, b], 1),
        lambda a, b: torch.cat(tensors=[a, b], dim=1),
        lambda a, b: torch.cat(dim=-1, tensors=(a, b)),
        lambda a, b: torch.concat(tensors=[a, b], axis=1),
        lambda a, b: torch.concatenate((a, b), dim=1),
    ],
}
ALIKE = {
    "elementwise": [
        lambda a, b: F.relu(a) + F.leaky_relu(b, 0.3),
        lambda a, b: F.relu(input=a) + F.leaky_relu(input=b, negative_slope=0.3),
        lambda a, b: torch.relu(input=a) + F.leaky_relu(negative_slope=0.3, input=b),
        lambda a, b: torch.clamp(input=a, min=0) + F.dropout(input=F.leaky_relu(b, negative_slope=0.3), p=0.0),
        lambda a, b: a.clamp(min=0) + torch.clone(input=F.leaky_relu(b, 0.3)),
    ],
    "flattened": [
        lambda a, b: (a + b).view(a.size(0), -1),
        lambda a, b: torch.flatten(a + b, 1),
        lambda a, b: torch.flatten(input=a + b, start_dim=1),
        lambda a, b: torch.flatten(end_dim=-1, start_dim=1, input=a + b),
        lambda a, b: (a + b).flatten(start_dim=1),
        lambda a, b: (a + b).view(size=(a.size(dim=0), -1)),
        lambda a, b: torch.reshape(input=a + b, shape=(a.shape[0], -1)),
        lambda a, b: (a + b).reshape(shape=(b.size()[0], -1)),
    ],
}
SPELLINGS = [(name, n) for ways in (BINARY, TWICE, ALIKE) for name, all_ in ways.items() for n in range(1, len(all_))]


@pytest.mark.parametrize(("name", "number"), SPELLINGS)
def test_row84_operands_by_keyword_are_read(name, number):
    ways = {**BINARY, **TWICE, **ALIKE}[name]
    width = 12 if name in TWICE else 6
    first, model = dead_units(ways[0], width), dead_units(ways[number], width)
    whole, x = copy.deepcopy(model), torch.randn(7, 3, dtype=torch.float64)
    expected, got = sn.compact(first), sn.compact(model)
    assert got.removed >= 6 and got.removed == expected.removed
    assert [c.kept_units.tolist() for c in got.layers.values()] == [
        c.kept_units.tolist() for c in expected.layers.values()
    ]
    torch.testing.assert_close(model(x), whole(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("how", "width"),
    [
        (lambda a, b: torch.mean(input=a, dim=(2, 3)), 6),
        (lambda a, b: a.mean(axis=(-1, -2)), 6),
        (lambda a, b: F.avg_pool2d(input=a, kernel_size=4).flatten(start_dim=1), 6),
        (lambda a, b: torch.flatten(F.adaptive_avg_pool2d(input=a, output_size=1), start_dim=1), 6),
        (lambda a, b: torch.flatten(torch.mean(a, axis=(2, 3), keepdims=True), 1), 6),
    ],
)
def test_row84_places_by_keyword(how, width):
    model = dead_units(how, width)
    model.a, model.b = (nn.Conv2d(3, 6, 1).double() for _ in range(2))
    with torch.no_grad():
        model.a.weight[[1, 4]] = 0
    whole, x = copy.deepcopy(model), torch.randn(5, 3, 4, 4, dtype=torch.float64)
    assert sn.compact(model).layers["a"].kept_units.tolist() == [0, 3, 5]
    torch.testing.assert_close(model(x), whole(x), rtol=1e-10, atol=1e-12)


def test_row84_modules_by_keyword():
    class Named(nn.Sequential):
        def forward(self, x):
            return self[2](input=self[1](input=self[0](input=x)))

    model = Named(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0
    assert sn.compact(model).layers["0"].kept_units.tolist() == [0, 2, 3, 5]


@pytest.mark.parametrize(
    "how",
    [
        lambda a, b: torch.add(a, b, out=torch.empty(0)),
        lambda a, b: torch.div(a, b.mean(), rounding_mode="floor"),
        lambda a, b: torch.add(a, other=b.sum(1, keepdim=True)),
        lambda a, b: torch.cat(tensors=torch.chunk(a, 2, 1), dim=1),
        lambda a, b: F.linear(input=a, weight=torch.eye(6, dtype=a.dtype)),
        lambda a, b: torch.where(condition=a > 0, input=a, other=b),
        lambda a, b: a.view(dtype=torch.int64).double(),
    ],
)
def test_row84_what_is_not_understood_keeps_its_units(how):
    model = dead_units(lambda a, b: a, 6)
    model.how = how
    assert sn.compact(model).layers["a"].after == 6


def test_a_sum_in_place_leaves_what_is_known_of_its_terms_alone():
    def twice(a, b):
        c = a * 2
        c += b
        return c

    model = dead_units(twice, 6)
    graph = UnitGraph(model)
    bias = model.a.bias.detach()
    made = {stage.name: stage.outputs.constant for stage in graph.stages}
    assert made["a"][[1, 4]].tolist() == pytest.approx(bias[[1, 4]].tolist()) and math.isnan(made["a"][0])
    doubled = next(axis for node, axis in graph.nodes.items() if node.name.startswith("mul"))
    assert doubled.constant[[1, 4]].tolist() == pytest.approx((2 * bias[[1, 4]]).tolist())


def changed_by_a_method(a, b):
    a.add_(b)
    return a


def changed_by_a_function(a, b):
    F.relu(b, inplace=True)
    return a + b


def changed_by_an_operator(a, b):
    c = a
    c *= b
    return a - b


def changed_twice(a, b):
    a.mul_(2).sub_(b)
    b.add_(a)
    return b


@pytest.mark.parametrize("how", [changed_by_a_method, changed_by_a_function, changed_by_an_operator, changed_twice])
def test_row84_who_reads_a_changed_tensor_reads_the_change(how):
    """Layer a is constant at units 1 and 4, b is not: what was known of a must not be folded."""
    model = dead_units(how, 6)
    model.b = nn.Linear(3, 6).double()
    whole, x = copy.deepcopy(model), torch.randn(7, 3, dtype=torch.float64)
    sn.compact(model)
    torch.testing.assert_close(model(x), whole(x), rtol=1e-10, atol=1e-12)


def test_row84_modules_that_work_in_place():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.relu, self.c = nn.Linear(3, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)

        def forward(self, x):
            a = self.a(x)
            self.relu(a)
            return self.c(a)

    model = Net().double()
    with torch.no_grad():
        model.a.weight[1] = 0
        model.a.bias[1] = -1  # behind the ReLU 0, not -1
    whole, x = copy.deepcopy(model), torch.randn(7, 3, dtype=torch.float64)
    assert sn.compact(model).layers["a"].after == 5
    torch.testing.assert_close(model(x), whole(x), rtol=1e-10, atol=1e-12)
