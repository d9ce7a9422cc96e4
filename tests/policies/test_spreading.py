"""Spreading blocks over layers: hand-worked cases, a brute-force order, scans that leave no trace, every message."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import sparsenet as sn
from sparsenet.densities import DISTRIBUTIONS, apportion, proportions
from sparsenet.policies.spreading import checked_distribution, leaving_by_score, sensitivity, spread
from sparsenet.saliency import Call


def two_layers():
    """Of 64 x 32 and 8 x 64 with blocks of 8 and 4: 32 places each."""
    return {
        "a": sn.SparseLinear(32, 64, density=0.5, block_size=8),
        "b": sn.SparseLinear(64, 8, density=0.5, block_size=4),
    }


# --- proportions ---


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_name_gives_the_proportions_of_the_ground_floor(name):
    assert spread(name, two_layers()) == proportions([(64, 32), (8, 64)], [8, 4], name)


def test_mappings_and_functions_by_hand():
    layers = two_layers()
    assert spread({"b": 0.5, "a": 0.25}, layers) == [16, 32], "by name, not by order"
    assert spread({"a": 2, "b": 1, "frozen": 9}, layers) == [32, 16], "a layer that takes no part changes nothing"
    assert spread({"a": torch.tensor(2), "b": 1}, layers) == [32, 16]
    assert spread(lambda given: {name: given[name].in_features for name in given}, layers) == [16, 32]
    # 24 of 64 places, in weights of 64 and 16: 960 for 2 : 1 in density, which is 2 * 2048 : 512 in weights
    assert apportion(spread({"a": 2, "b": 1}, layers), 960, [1, 1], [32, 32], [64, 16]) == [13, 7]


def test_no_blocks_for_a_layer_until_the_others_are_full():
    layers = two_layers()
    wanted = spread({"a": 0, "b": 1}, layers)
    assert apportion(wanted, 16 * 20, [0, 0], [32, 32], [64, 16]) == [0, 20]
    assert apportion(wanted, 16 * 32 + 64 * 5, [0, 0], [32, 32], [64, 16]) == [5, 32]


def test_what_is_a_distribution_is_handed_on():
    def own(layers):
        return dict.fromkeys(layers, 1.0)

    for value in (None, "global", own, *DISTRIBUTIONS):
        assert checked_distribution(value, "Sparsifier") is value
    checked = checked_distribution({"a": torch.tensor(2), "b": 0}, "Sparsifier", ["a", "b"])
    assert checked == {"a": 2.0, "b": 0.0} and [type(n) for n in checked.values()] == [float, float]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("erk2", ValueError, "S: distribution must be None, one of uniform, erdos_renyi, er, erk, memory, global, "),
        (3, TypeError, "relative densities by layer name or a function that returns them, got 3"),
        ([1, 2], TypeError, "relative densities by layer name or a function that returns them, got [1, 2]"),
        (dict, TypeError, "relative densities by layer name or a function that returns them, got <class 'dict'>"),
        ({"a": 1}, ValueError, "S: distribution must name every layer, got none for 'b'"),
        ({"a": 1, "b": 1, "c": 1}, ValueError, "S: distribution must name only layers (a, b), got 'c'"),
        ({"a": 1, "b": 1, 3: 1}, ValueError, "S: distribution must name only layers (a, b), got 3"),
        ({"a": 1, "b": -1}, ValueError, "S: distribution must be finite numbers >= 0 by layer name, got -1 for 'b'"),
        ({"a": 1, "b": math.nan}, ValueError, "must be finite numbers >= 0 by layer name, got nan for 'b'"),
        ({"a": math.inf, "b": 1}, ValueError, "must be finite numbers >= 0 by layer name, got inf for 'a'"),
        ({"a": "1", "b": 1}, TypeError, "must be finite numbers >= 0 by layer name, got '1' for 'a'"),
        ({"a": True, "b": 1}, TypeError, "must be finite numbers >= 0 by layer name, got True for 'a'"),
        ({"a": 0, "b": 0}, ValueError, "S: distribution must have a number above 0, got {'a': 0.0, 'b': 0.0}"),
        ({}, ValueError, "S: distribution must name every layer, got none for 'a', 'b'"),
    ],
)
def test_what_is_no_distribution_is_a_sentence(value, error, message):
    with pytest.raises(error, match=re.escape(message)):
        checked_distribution(value, "S", ["a", "b"])
    if isinstance(value, dict):
        about = message.replace("distribution must", "what distribution returns must")
        with pytest.raises(error, match=re.escape(about)):
            spread(lambda layers: value, two_layers(), "S")


def test_mappings_are_checked_before_the_layers_are_known():
    with pytest.raises(ValueError, match="S: distribution must have a number above 0, got {}"):
        checked_distribution({}, "S")
    with pytest.raises(ValueError, match="S: distribution must name layers by their names, got 3"):
        checked_distribution({3: 1}, "S")


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({"a": 1}, ValueError, "Sparsifier: distribution must name every layer, got none for 'b'"),
        ({"a": 0, "b": 0, "c": 1}, ValueError, "Sparsifier: distribution must have a number above 0, got {'a': 0.0"),
        (
            lambda layers: [1, 2],
            TypeError,
            "what distribution returns must be relative densities by layer name, got [1",
        ),
        (
            "global",
            ValueError,
            "Sparsifier: distribution must be one of uniform, erdos_renyi, er, erk, memory, relative",
        ),
        (None, ValueError, "a function that returns them, got None"),
    ],
)
def test_what_cannot_be_spread_is_a_sentence(value, error, message):
    with pytest.raises(error, match=re.escape(message)):
        spread(value, two_layers())


# --- global, by score ---


def brute_force(scores, sizes, least, total):
    """Unit by unit, in order."""
    counts, left = dict.fromkeys(scores, 0), total
    order = []
    for number, (name, values) in enumerate(scores.items()):
        lowest = sorted((s / sizes[name], number, i) for i, s in enumerate(values))
        order += [(*unit, name) for unit in lowest[: max(0, len(values) - least[name])]]
    for *_, name in sorted(order):
        if left < sizes[name] / 2:
            break
        counts[name] += 1
        left -= sizes[name]
    return counts


def tensors(scores, dtype=torch.float64):
    return {name: torch.tensor(values, dtype=dtype) for name, values in scores.items()}


def test_leaving_by_score_by_hand():
    scores = tensors({"a": [3, 1, 7, 5], "b": [2, 6, 4]})
    one, none = {"a": 1, "b": 1}, {"a": 0, "b": 0}
    by_total = [tuple(leaving_by_score(scores, one, none, total).values()) for total in range(-1, 9)]
    assert by_total == [(0, 0), (0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (4, 3), (4, 3)]
    # "a" keeps 3, so that 1 leaves, and then 2, 4 and 6 of "b"
    assert leaving_by_score(scores, one, {"a": 3, "b": 0}, 4) == {"a": 1, "b": 3}
    assert leaving_by_score(scores, one, {"a": 3, "b": 2}, 4) == {"a": 1, "b": 1}, "no more than the least allows"
    assert leaving_by_score(scores, one, {"a": 9, "b": 9}, 4) == {"a": 0, "b": 0}
    assert leaving_by_score({}, {}, {}, 4) == {} and leaving_by_score({"a": torch.empty(0)}, one, none, 4) == {"a": 0}


def test_leaving_by_score_of_blocks_of_different_sizes_by_hand():
    """Per weight: 1 and 4 in blocks of 4 weights, 2 and 3 in blocks of 16: in the order a, b, b, a."""
    scores, sizes, none = tensors({"a": [16, 4], "b": [32, 48]}), {"a": 4, "b": 16}, {"a": 0, "b": 0}

    def leaving(total):
        return tuple(leaving_by_score(scores, sizes, none, total).values())

    expected = {1: (0, 0), 2: (1, 0), 4: (1, 0), 11: (1, 0), 12: (1, 1), 27: (1, 1), 28: (1, 2), 37: (1, 2), 38: (2, 2)}
    assert {total: leaving(total) for total in expected} == expected


def test_ties_go_to_the_earlier_layer():
    scores, one = tensors({"a": [1, 1, 1], "b": [1, 1], "c": [0, 1]}), {"a": 1, "b": 1, "c": 1}
    leaving = [tuple(leaving_by_score(scores, one, dict.fromkeys("abc", 0), total).values()) for total in range(8)]
    assert leaving == [(0, 0, 0), (0, 0, 1), (1, 0, 1), (2, 0, 1), (3, 0, 1), (3, 1, 1), (3, 2, 1), (3, 2, 2)]
    # in units of 4 and 1: two of "a" are 8, the rest is for "b"
    mixed = tensors({"a": [4, 4, 8], "b": [1, 1]})
    assert leaving_by_score(mixed, {"a": 4, "b": 1}, {"a": 0, "b": 0}, 10) == {"a": 2, "b": 2}
    assert leaving_by_score(mixed, {"a": 4, "b": 1}, {"a": 0, "b": 0}, 9) == {"a": 2, "b": 1}


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 12) | st.floats(0, 1e6, width=32), max_size=40),
            st.sampled_from([1, 4, 16, 64, 1024]),
            st.integers(0, 10),
        ),
        min_size=1,
        max_size=5,
    ),
    st.floats(-0.1, 1.1),
)
def test_leaving_by_score_is_the_order_unit_by_unit(layers, share):
    scores = {str(i): values for i, (values, _, _) in enumerate(layers)}
    sizes = {str(i): size for i, (_, size, _) in enumerate(layers)}
    least = {str(i): few for i, (_, _, few) in enumerate(layers)}
    total = math.floor(share * sum(len(values) * sizes[n] for n, values in scores.items()))
    expected = brute_force(scores, sizes, least, total)
    assert leaving_by_score(tensors(scores), sizes, least, total) == expected
    assert leaving_by_score(tensors(scores, torch.float32), sizes, least, total) == expected


def test_many_scores_of_several_kinds():
    """More than the sample that a pivot is chosen of; float32, float64 and bfloat16 beside one another."""
    generator = torch.Generator().manual_seed(0)
    scores = {n: torch.randn(5000, generator=generator).square() for n in "abc"}
    scores |= {"b": scores["b"].double() * 3, "c": scores["c"].bfloat16()}
    sizes, least = {"a": 16, "b": 16, "c": 64}, {"a": 1, "b": 4900, "c": 1}
    for total in (0, 1000, 123_456, 400_000, 10**7):
        expected = brute_force({n: s.tolist() for n, s in scores.items()}, sizes, least, total)
        assert leaving_by_score(scores, sizes, least, total) == expected
    equal = {"a": torch.zeros(5000), "b": torch.zeros(5000)}
    assert leaving_by_score(equal, {"a": 1, "b": 1}, {"a": 7, "b": 7}, 6000) == {"a": 4993, "b": 1007}


def test_infinite_scores_have_a_place_in_the_order():
    scores = tensors({"a": [math.inf, 1.0, -math.inf], "b": [math.inf, 2.0]})
    one, none = {"a": 1, "b": 1}, {"a": 0, "b": 0}
    leaving = [tuple(leaving_by_score(scores, one, none, total).values()) for total in range(6)]
    assert leaving == [(0, 0), (1, 0), (2, 0), (2, 1), (3, 1), (3, 2)]


# --- by measured sensitivity ---


def diagonal():
    """Two layers of 1 x 1 blocks on a diagonal: outputs are products of the two weights."""
    pattern = sn.BlockPattern.from_linear_places(torch.tensor([0, 5, 10, 15]), (4, 4), 1)
    model = nn.Sequential(*(sn.SparseLinear(4, 4, bias=False, pattern=pattern) for _ in range(2)))
    with torch.no_grad():
        model[0].values.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1))
        model[1].values.copy_(torch.tensor([6.0, 1.0, 1.0, 5.0]).view(4, 1, 1))
    return model


def test_sensitivity_by_hand():
    """Outputs 6, 2, 3, 20 for ones; the loss is the sum of what is missing.

    Half of layer 0 are its weights 1 and 2: 6 + 2 are missing, 4 per weight. Half of layer 1 are the two ones: 2 + 3,
    2.5 per weight. With a quarter left, layer 0 loses 6 + 2 + 3, 11 / 3 each, and layer 1 2 + 3 + 20, 25 / 3 each.
    """
    model, batches = diagonal(), [(torch.ones(1, 4), 31.0)]

    def missing(output, target):
        return target - output.sum()

    assert sensitivity(model, batches, missing) == pytest.approx({"0": 1.0, "1": 2.5 / 4})
    assert sensitivity(model, batches, missing, density=0.25) == pytest.approx({"0": 11 / 25, "1": 1.0})
    assert sensitivity(model, batches, missing, density=0.0) == pytest.approx({"0": 11 / 25, "1": 1.0}), "one stays"
    assert sensitivity(model, batches, missing, density=0.25, least=0.5) == pytest.approx({"0": 0.5, "1": 1.0})
    assert sensitivity(model, batches, missing, least=1) == {"0": 1.0, "1": 1.0}
    assert sensitivity(model, batches, lambda output, target: float(output.sum())) == {"0": 1.0, "1": 1.0}, "it falls"
    # a second batch of zeros, in which nothing is ever missing, halves all rises alike
    assert sensitivity(model, [*batches, (torch.zeros(1, 4), 0.0)], missing) == pytest.approx({"0": 1.0, "1": 0.625})


def test_equal_norms_leave_in_the_order_of_their_places():
    model = diagonal()[:1]
    with torch.no_grad():
        model[0].values.fill_(1.0)
    seen = []
    sensitivity(model, [(torch.ones(1, 4), None)], lambda output, _: seen.append(output[0].tolist()) or 0.0)
    assert seen == [[1, 1, 1, 1], [0, 0, 1, 1]]


def test_rises_count_per_weight_and_a_layer_of_one_block_is_as_dense_as_any():
    model = nn.Sequential(
        sn.SparseLinear(32, 32, density=1.0, block_size=8, bias=False),
        sn.SparseLinear(32, 32, density=1.0, block_size=4, bias=False),
        sn.SparseLinear(32, 32, density=1.0, block_size=32, bias=False),
    )
    rises = iter([0.0, 8 * 64.0, 32 * 16 * 0.25])
    found = sensitivity(model, [(torch.ones(1, 32), None)], lambda *_: next(rises))
    assert found == {"0": 1.0, "1": 0.25 / (8 * 64 / (8 * 64.0)), "2": 1.0}
    assert next(rises, None) is None, "the layer of one block was not measured"


class Everything(nn.Module):
    """Draws numbers in eval mode as well, counts its calls in a buffer, and takes a keyword."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            sn.SparseLinear(12, 17, density=0.5, block_size=4, activation="relu"),
            nn.BatchNorm1d(17),
            nn.Dropout(0.5),
            sn.SparseLinear(17, 5, density=0.7, block_size=1),
        )
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, scale=1.0):
        self.calls += 1
        return self.layers(nn.functional.dropout(x, 0.3, training=True)) * scale


def test_no_trace_is_left_in_the_model():
    model = Everything()
    model.layers[1].eval()
    optimizer = torch.optim.Adam(model.parameters())
    sn.Sparsifier(model, optimizer, sn.RigL(), every=1)
    loss = model(torch.randn(6, 12)).square().mean()
    calls = [layer.topology.expected_calls for layer in (model.layers[0], model.layers[3])]
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    batches = [(Call((torch.randn(6, 12),), {"scale": 2.0}), torch.randint(5, (6,))) for _ in range(2)]
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    versions = [p._version for p in model.parameters()]
    found = sensitivity(model, iter(batches), nn.functional.cross_entropy)
    assert list(found) == ["layers.0", "layers.3"] and max(found.values()) == 1.0
    assert torch.equal(torch.get_rng_state(), random) and torch.is_grad_enabled()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert [m.training for m in (model, model.layers[0], model.layers[1], model.layers[2])] == [True, True, False, True]
    assert all(torch.equal(p.grad, torch.full_like(p, 3.0)) for p in model.parameters())
    assert [layer.topology.expected_calls for layer in (model.layers[0], model.layers[3])] == calls
    assert [p._version for p in model.parameters()] == versions
    loss.backward()  # a graph that was under way runs backward as before


def test_it_measures_the_same_each_time():
    """Random numbers of a forward pass are the same with a layer's blocks and without, and in every call."""
    torch.manual_seed(3)
    model = Everything()
    batches = [(torch.randn(6, 12), torch.randint(5, (6,)))]
    torch.manual_seed(4)
    first = sensitivity(model, batches, nn.functional.cross_entropy)
    assert sensitivity(model, batches, nn.functional.cross_entropy) == first
    seen = []
    with torch.no_grad():
        for layer in (model.layers[0], model.layers[3]):
            layer.values[layer.pattern.num_blocks // 3 :] = 0.0  # more than half of them: nothing is lost
    sensitivity(model, batches, lambda output, _: seen.append(output.clone()) or 0.0)
    assert len(seen) == 3 and all(torch.equal(output, seen[0]) for output in seen)
    model.eval()
    assert not torch.equal(model(batches[0][0]), model(batches[0][0])), "there is noise"


def test_values_come_back_bit_for_bit_when_a_loss_fails():
    model = diagonal()
    with torch.no_grad():
        model[0].values[0] = -0.0
    before = [p.detach().clone() for p in model.parameters()]
    calls = []

    def failing(output, target):
        calls.append(output)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return output.sum()

    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, [(torch.ones(1, 4), None)], failing)
    for p, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.detach().view(torch.int32), was.view(torch.int32))
    assert model.training


def test_a_sparsifier_takes_what_was_measured():
    model = diagonal()
    found = sensitivity(model, [(torch.ones(1, 4), 31.0)], lambda output, target: target - output.sum())
    layers = dict(model.named_children())
    assert checked_distribution(found, "Sparsifier", layers) == found
    assert spread(found, layers) == pytest.approx([16, 10])


PAIRS = [(torch.ones(1, 4), None)]


def computed():
    model = diagonal()
    prune.identity(model[1], "values")
    return model


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda loss: sensitivity(nn.Linear(4, 4), PAIRS, loss), ValueError, "model must hold at least one SparseLi"),
        (lambda loss: sensitivity(3, PAIRS, loss), TypeError, "sensitivity: model must be a module, got int"),
        (lambda loss: sensitivity(diagonal(), [], loss), ValueError, "batches must hold at least one batch, got none"),
        (lambda loss: sensitivity(diagonal(), 3, loss), TypeError, "batches must be (input, target) pairs, got 3"),
        (lambda loss: sensitivity(diagonal(), PAIRS[0], loss), TypeError, "must be (input, target) pairs, got Tensor"),
        (lambda loss: sensitivity(diagonal(), [Call((), {})], loss), TypeError, "(input, target) pairs, got Call"),
        (lambda loss: sensitivity(diagonal(), [(1, 2, 3)], loss), TypeError, "(input, target) pairs, got tuple"),
        (lambda loss: sensitivity(diagonal(), PAIRS, loss, density=1), ValueError, "density must be below 1, so that"),
        (
            lambda loss: sensitivity(diagonal(), PAIRS, loss, density=2),
            ValueError,
            "density must be a number in [0, 1]",
        ),
        (lambda loss: sensitivity(diagonal(), PAIRS, loss, least=-1), ValueError, "least must be a number in [0, 1]"),
        (lambda loss: sensitivity(diagonal(), PAIRS, lambda o, t: o), ValueError, "one finite number, got [1, 4]"),
        (lambda loss: sensitivity(diagonal(), PAIRS, lambda o, t: None), ValueError, "one finite number, got None"),
        (lambda loss: sensitivity(diagonal(), PAIRS, lambda o, t: o.sum() * math.nan), ValueError, "number, got nan"),
        (lambda loss: sensitivity(computed(), PAIRS, loss), ValueError, "layer '1' must hold its values itself, got"),
    ],
)
def test_what_cannot_be_measured_is_a_sentence(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(lambda output, target: output.sum())


def test_global_compares_a_layer_whose_own_proportion_loses_nothing():
    """Of 64 and 16 blocks 78 stay, in proportion 62 and 16; but the two least of all are in the second layer."""
    layers = sn.SparseLinear(32, 32, density=1.0, block_size=4), sn.SparseLinear(32, 8, density=1.0, block_size=4)
    model = nn.Sequential(*layers)
    with torch.no_grad():
        layers[1].values[[3, 5]] = 1e-9
    sparsifier = sn.Sparsifier(model, None, sn.Fisher(0.0), density=78 / 80, distribution="global", every=1)
    model(torch.randn(64, 32)).square().mean().backward()
    update = sparsifier.step()
    assert not any(change.skipped for change in update.layers.values())
    assert update.layers["0"].dropped == 0 and update.layers["1"].dropped_places.tolist() == [3, 5]
