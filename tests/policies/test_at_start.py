"""SNIP, GraSP and SynFlow: numbers by hand and by autograd of dense copies, and that measuring leaves no trace."""

import copy
import logging
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import sparsenet as sn
from sparsenet.functional.blocks import dense_blocks
from sparsenet.policies import POLICIES, SNIP, GraSP, SynFlow
from sparsenet.policies.places import BadScores
from sparsenet.policies.views import ElementView, View
from sparsenet.saliency import Call

pytestmark = pytest.mark.usefixtures("one_thread")


class Fixed:
    """A layer as a policy sees it, with 2x2 blocks and numbers that are given."""

    name = "hidden"
    element_mask = None

    def __init__(self, values, gradient=None, **measured):
        self.values = torch.tensor(values)
        self._gradient = None if gradient is None else torch.tensor(gradient)
        self.measured = {name: torch.tensor(given) for name, given in measured.items()}

    @property
    def gradient(self):
        if self._gradient is None:
            raise BadScores("its values have no gradient; call Sparsifier.step() before zero_grad()")
        return self._gradient


VALUES = [[[1.0, -2.0], [0.0, 3.0]], [[-1.0, 1.0], [2.0, 0.5]]]
FACTOR = [[[2.0, 1.0], [5.0, -1.0]], [[-0.5, 0.5], [0.0, 2.0]]]


def data(rows=20, features=30, classes=10, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator, dtype=dtype)
    return x, torch.randint(classes, (rows,), generator=generator)


def small_model(density=1.0, block_size=4, seed=0, **more):
    torch.manual_seed(seed)
    return sn.SparseMLP([30, 40, 24, 10], density=density, block_size=block_size, **more)


def views_of(model):
    return {name: View(name, layer, 0, drop=1) for name, layer in model.named_children()}


def given(kind, batches=None, loss=cross_entropy):
    """The policy ``kind`` with data of its own if it takes any."""
    return SynFlow() if kind is SynFlow else kind(batches or [data()], loss)


def one_layer(weights, block_size=1):
    """[1, n] single weights, no bias."""
    layer = sn.SparseLinear(len(weights), 1, bias=False, density=1.0, block_size=block_size)
    with torch.no_grad():
        layer.values.copy_(torch.tensor(weights).view(-1, 1, 1))
    return nn.Sequential(layer)


# --- by hand ---


def test_snip_sums_sizes_of_products_over_a_block():
    assert SNIP().drop_scores(Fixed(VALUES, FACTOR)).tolist() == [2 + 2 + 0 + 3, 0.5 + 0.5 + 0 + 1]


def test_grasp_sums_products_with_their_sign():
    assert GraSP().drop_scores(Fixed(VALUES, product=FACTOR)).tolist() == [2 - 2 + 0 - 3, 0.5 + 0.5 + 0 + 1]


def test_synflow_sums_flows():
    assert SynFlow().drop_scores(Fixed(VALUES, flow=FACTOR)).tolist() == [7.0, 2.0]


def test_snip_averages_batches_by_rows_before_the_absolute_value():
    """Gradients 1 (3 rows) and -2 (1 row): mean 0.25, times the weight 2; sizes first would give 2.5."""
    model = one_layer([2.0, 4.0])
    batches = [
        (torch.tensor([[1.0, 0.0]] * 3), torch.ones(3, 1)),
        (torch.tensor([[1.0, 1.0]]), torch.tensor([[-2.0]])),
    ]
    policy = SNIP(batches, lambda y, t: (y * t).mean())
    (view,) = views_of(model).values()
    policy.measure(model, None, {"0": view}, 0)
    assert policy.drop_scores(view).tolist() == pytest.approx([0.5, 2.0])


def test_grasp_drops_first_what_leaves_the_largest_gradient():
    """L = w'Aw / 2, A = [[2, 1], [1, 1]], w = (1, -3): g = (-1, -2), H g = (-4, -3), w (H g) = (-4, 9).

    Without the first weight the squared gradient norm is 18, without the second 5; now it is 5, and to first order
    half of it grows by 4 and falls by 9.
    """
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    policy = GraSP([(x, torch.zeros(2))], lambda y, _: y.square().sum() / 2)
    model = one_layer([1.0, -3.0])
    (view,) = views_of(model).values()
    policy.measure(model, None, {"0": view}, 0)
    assert policy.drop_scores(view).tolist() == pytest.approx([-4.0, 9.0])
    update = sn.prune_at_initialization(model, policy, 0.5)
    assert update.layers["0"].dropped_places.tolist() == [0]

    def half_norm(*weights):
        twin = one_layer(list(weights))
        (twin(x).square().sum() / 2).backward()
        return float(twin[0].values.grad.square().sum() / 2)

    assert half_norm(0.0, -3.0) == pytest.approx(9.0) and half_norm(1.0, -3.0) == pytest.approx(2.5)
    assert half_norm(1.0 - 1e-2, -3.0) - 2.5 == pytest.approx(1e-2 * 4, rel=0.05)  # S of the first
    assert half_norm(1.0, -3.0 + 3e-2) - 2.5 == pytest.approx(1e-2 * -9, rel=0.05)


# --- by a dense copy ---


def dense_gradients(model, batches, dtype=torch.float64):
    """Weights of a dense copy, and the function that is their mean loss."""
    weights = tuple(layer.weight_dense().detach().to(dtype) for layer in model)
    biases = [layer.bias.detach().to(dtype) for layer in model]
    rows = sum(len(x) for x, _ in batches)

    def mean_loss(*weights):
        total = 0
        for x, target in batches:
            for layer, weight, bias in zip(model, weights, biases, strict=True):
                x = nn.functional.linear(x.to(dtype), weight, bias)
                x = x if layer.activation == "none" else getattr(nn.functional, layer.activation)(x)
            total = total + cross_entropy(x, target, reduction="sum")
        return total / rows

    return weights, mean_loss


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "none"])
def test_snip_and_grasp_are_those_of_a_dense_copy(activation):
    model = small_model(density=0.6, activation=activation, dtype=torch.float64)
    batches = [data(20, seed=1, dtype=torch.float64), data(7, seed=2, dtype=torch.float64)]
    weights, mean_loss = dense_gradients(model, batches)
    inside = [(layer.weight_dense() != 0).double() for layer in model]  # the inactive ones are no variables

    def masked_loss(*weights):
        return mean_loss(*(w * i for w, i in zip(weights, inside, strict=True)))

    gradient = torch.autograd.functional.jacobian(masked_loss, weights)
    _, product = torch.autograd.functional.hvp(masked_loss, weights, gradient)
    for kind, dense in ((SNIP, gradient), (GraSP, product)):
        policy, views = given(kind, batches), views_of(model)
        policy.measure(model, None, views, 0)
        for view, weight, factor in zip(views.values(), weights, dense, strict=True):
            expected = dense_blocks(weight * factor, view.pattern)
            expected = (expected.abs() if kind is SNIP else expected).flatten(1).sum(1)
            error = (policy.drop_scores(view) - expected).abs().max() / expected.abs().max()
            assert error < 1e-12, (kind, view.name, float(error))  # measured: below 1e-15


def test_grasp_of_a_transformer_is_that_of_its_dense_copy():
    torch.manual_seed(0)
    dense = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu").double()
    model = copy.deepcopy(dense)
    sn.sparsify_(model, density=1.0, block_size=4)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, sn.SparseLinear)}
    batch = (torch.randn(3, 5, 16, dtype=torch.float64), torch.randn(3, 5, 16, dtype=torch.float64))
    policy = GraSP([batch], nn.functional.mse_loss)
    views = {name: View(name, layer, 0, drop=1) for name, layer in layers.items()}
    policy.measure(model, None, views, 0)
    dense.eval()
    weights = {name: dense.get_parameter(f"{name}.weight") for name in layers}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = nn.functional.mse_loss(dense(batch[0]), batch[1])
    gradient = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    square = sum((g * g.detach()).sum() for g in gradient)
    for (name, weight), product in zip(
        weights.items(), torch.autograd.grad(square, list(weights.values())), strict=True
    ):
        expected = dense_blocks((weight * product).detach(), layers[name].pattern).flatten(1).sum(1)
        torch.testing.assert_close(policy.drop_scores(views[name]), expected, atol=1e-12, rtol=1e-9)


def test_grasp_without_data_goes_by_the_last_step_and_the_gauss_newton_matrix():
    model = small_model(dtype=torch.float64)
    x, target = data(dtype=torch.float64)
    cross_entropy(model(x), target).backward()
    views, policy = views_of(model), GraSP()
    policy.measure(model, Call((x,), {}), views, 0)
    weights, _ = dense_gradients(model, [(x, target)])
    v = tuple(g for layer in model for g in [dense_of(layer, layer.values.grad)])

    def logits(*weights):
        h = x
        for layer, weight in zip(model, weights, strict=True):
            h = nn.functional.linear(h, weight, layer.bias.detach())
            h = h.relu() if layer.activation == "relu" else h
        return h

    out, jv = torch.autograd.functional.jvp(logits, weights, v)
    p = out.softmax(1)
    back = p * (jv - (p * jv).sum(1, keepdim=True)) / len(x)
    _, products = torch.autograd.functional.vjp(logits, weights, back)
    for view, weight, product in zip(views.values(), weights, products, strict=True):
        expected = dense_blocks(weight * product, view.pattern).flatten(1).sum(1)
        torch.testing.assert_close(policy.drop_scores(view), expected, atol=1e-14, rtol=1e-9)


def dense_of(layer, values):
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.values.copy_(values)
    return twin.weight_dense().detach()


def test_snip_without_data_takes_the_accumulated_gradient():
    """Two passes add up, a layer that is called twice as well; the order before the absolute value."""
    torch.manual_seed(0)
    layer = sn.SparseLinear(8, 8, density=1.0, block_size=4)
    for seed in (1, 2):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))
        layer(layer(x)).square().sum().backward()
    weight = layer.weight_dense().detach().requires_grad_()
    total = 0
    for seed in (1, 2):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))
        for _ in range(2):
            x = nn.functional.linear(x, weight, layer.bias.detach())
        total = total + x.square().sum()
    total.backward()
    expected = dense_blocks((weight * weight.grad).detach().abs(), layer.pattern).flatten(1).sum(1)
    torch.testing.assert_close(SNIP().drop_scores(View("0", layer, 0)), expected, rtol=1e-4, atol=1e-4)


def test_where_the_gradient_is_gone_the_last_pass_counts():
    """Two calls of a layer in it, watched before zero_grad: the same scores as by the gradient itself."""
    dropped = []
    for gone in (False, True):
        torch.manual_seed(0)
        layer = sn.SparseLinear(32, 32, density=1.0, block_size=4)
        model = nn.Sequential(layer, layer)
        sparsifier = sn.Sparsifier(model, None, SNIP(), sn.Linear(1.0, 0.5, 1), every=1, end=1)
        model(torch.randn(9, 32)).square().sum().backward()
        if gone:
            model.zero_grad(set_to_none=gone is True)
        dropped.append(sparsifier.step().layers["0"].dropped_places.tolist())
    assert len(dropped[0]) == 32 and dropped[0] == dropped[1]


def test_elements_have_the_scores_of_single_weights():
    model = small_model(density=0.5)
    for layer in model:
        layer.set_element_mask(0.5)
    for kind in (SNIP, GraSP, SynFlow):
        policy = given(kind)
        blocks = views_of(model)
        elements = {name: ElementView(name, view.layer, 0, drop=1) for name, view in blocks.items()}
        policy.measure(model, None, blocks, 0)
        policy.measure(model, None, elements, 0)
        for name, view in elements.items():
            of_elements = view.whole(policy.drop_scores(view).view(-1, 1, 1)).flatten(1).sum(1)
            torch.testing.assert_close(
                of_elements, policy.drop_scores(blocks[name]).to(of_elements), rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize("kind", [SNIP, GraSP, SynFlow])
def test_bfloat16_ranks_as_float32_does(kind):
    scores = []
    for dtype in (torch.bfloat16, torch.float32):
        model = small_model(dtype=torch.bfloat16).to(dtype)  # the same numbers
        x, target = data(dtype=torch.bfloat16)
        policy, views = given(kind, [(x.to(dtype), target)]), views_of(model)
        policy.measure(model, None, views, 0)
        scores.append(torch.cat([policy.drop_scores(view).float() for view in views.values()]))
    assert torch.corrcoef(torch.stack(scores))[0, 1] > 0.99


@pytest.mark.parametrize("kind", [SNIP, GraSP, SynFlow])
def test_elements_are_pruned_to_the_number_that_is_asked_for(kind):
    model = small_model(density=1.0)
    for layer in model:
        layer.set_element_mask(0.5)
    sparsifier = sn.Sparsifier(
        model, None, given(kind), sn.Linear(0.5, 0.1, 2), "global", every=1, end=2, elements=True
    )
    places = 30 * 40 + 40 * 24 + 24 * 10
    for _ in range(2):
        assert not any(u.skipped for u in sparsifier.step().layers.values())
    assert sum(layer.num_active for layer in model) == round(0.1 * places)


# --- no trace ---


class Mixed(nn.Module):
    """Everything that a measurement could leave a trace in."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop = sn.SparseLinear(12, 16, density=1.0, block_size=4), nn.BatchNorm1d(16), None
        self.drop = nn.Dropout(0.5)
        self.last = sn.SparseLinear(16, 10, density=0.5, block_size=4)
        self.last.set_element_mask(0.5)
        self.frozen = nn.Parameter(torch.randn(10), requires_grad=False)

    def forward(self, x):
        return self.last(self.drop(self.norm(self.first(x)).relu())) + self.frozen


def trace_of(model):
    """All that must not change, in a form that compares."""
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    tensors |= {f"{n} gradient": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    facts = {name: (module.training, sorted(module.__dict__)) for name, module in model.named_modules()}
    objects = {name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()}
    watchers = [layer.topology.observer for layer in (model.first, model.last)]
    return tensors, facts, objects, watchers, torch.get_rng_state()


def assert_no_trace(before, after):
    assert before[1:4] == after[1:4]
    assert torch.equal(before[4], after[4])
    assert before[0].keys() == after[0].keys()
    assert [name for name in before[0] if not torch.equal(before[0][name], after[0][name])] == []


@pytest.mark.parametrize("kind", [SNIP, GraSP, SynFlow])
@pytest.mark.parametrize("fails", [False, True])
def test_measuring_leaves_no_trace(kind, fails):
    torch.manual_seed(0)
    model = Mixed().train()
    x, target = data(features=12)
    for _ in range(3):
        cross_entropy(model(x), target).backward()
    model.first.topology.observer = lambda *_: pytest.fail("nobody is to be told")
    views = {name: View(name, getattr(model, name), 0, drop=1) for name in ("first", "last")}
    before = trace_of(model)

    def failing(y, _):
        raise ZeroDivisionError

    if fails:
        policy = SynFlow(torch.ones(4, 7)) if kind is SynFlow else kind([(x, target)], failing)
        with pytest.raises(ValueError if kind is SynFlow else ZeroDivisionError):
            policy.measure(model, None, views, 0)
    else:
        given(kind, [(x, target)]).measure(model, Call((x,), {}), views, 0)
        assert all(len(view.measured) == 1 for view in views.values())
    assert_no_trace(before, trace_of(model))


@pytest.mark.parametrize("kind", [SNIP, GraSP, SynFlow])
def test_growth_by_the_training_pass_is_not_disturbed(kind):
    """What grows beside a pass of its own is what grows beside magnitude."""
    grown = []
    for drop in (given(kind), sn.Policy()):
        model = small_model(density=0.5)
        sparsifier = sn.Sparsifier(model, None, sn.Policy(drop=drop, grow=sn.RigL(), drop_fraction=0.2), every=1)
        x, target = data(seed=3)
        cross_entropy(model(x), target).backward()
        update = sparsifier.step()
        assert update.dropped == update.grown > 0
        grown.append([u.grown_places.tolist() for u in update.layers.values()])
    assert grown[0] == grown[1]


# --- what it depends on ---


def test_synflow_needs_no_data():
    one = sn.prune_at_initialization(small_model(), SynFlow(), 0.1)
    other = sn.prune_at_initialization(small_model(), SynFlow(torch.randn(9, 30)), 0.1)
    assert all(torch.equal(u.dropped_places, other.layers[n].dropped_places) for n, u in one.layers.items())


@pytest.mark.parametrize("kind", [SNIP, GraSP, SynFlow])
def test_the_same_again_and_after_saving(kind):
    def start():
        model = small_model()
        return model, sn.Sparsifier(model, None, given(kind), sn.Cubic(1.0, 0.2, 4), "global", every=1, end=4)

    whole, sparsifier = start()
    for _ in range(4):
        sparsifier.step()
    model, sparsifier = start()
    for _ in range(2):
        sparsifier.step()
    states = copy.deepcopy((model.state_dict(), sparsifier.state_dict()))
    model, sparsifier = start()
    model.load_state_dict(states[0])
    sparsifier.load_state_dict(states[1])
    for _ in range(2):
        assert sparsifier.step().dropped > 0
    for one, other in zip(whole, model, strict=True):
        assert one.pattern == other.pattern and torch.equal(one.values, other.values)


def test_where_layers_are_compared_all_are_measured(caplog):
    """A layer whose share of a small step rounds to nothing takes part in the comparison."""
    torch.manual_seed(0)
    model = sn.SparseMLP([64, 64, 4], density=1.0, block_size=4)
    policy = SNIP([data(features=64, classes=4)], cross_entropy)
    sparsifier = sn.Sparsifier(model, None, policy, sn.Linear(1.0, 0.99, 1), "global", every=1, end=1)
    with caplog.at_level(logging.WARNING):
        update = sparsifier.step()
    assert not caplog.records and update.dropped == 3  # of 272; of 16 in proportion 0.16
    assert [u.skipped for u in update.layers.values()] == ["", ""]


RANK = """
    import sys, torch, torch.distributed as dist, sparsenet as sn
    from torch.nn.functional import cross_entropy
    kind, rank, world, store = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4]
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = sn.SparseMLP([30, 40, 10], density=1.0, block_size=4, dtype=torch.float64)
    x, target = torch.randn(24, 30, dtype=torch.float64), torch.randint(10, (24,))
    mine = slice(rank * 24 // world, (rank + 1) * 24 // world)
    batches = [(x[mine], target[mine])]
    policy = sn.SNIP() if kind == "gradient" else getattr(sn, kind)(batches, cross_entropy)
    wrapped = sn.distributed.DataParallel(model) if world > 1 else model
    if kind == "gradient":   # each rank's own, which nobody has averaged
        cross_entropy(model(x[mine]), target[mine]).backward()
    update = sn.prune_at_initialization(wrapped, policy, 0.3)
    print({name.removeprefix("module."): u.dropped_places.tolist() for name, u in update.layers.items()})
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SNIP", "GraSP", "gradient"])
def test_two_processes_prune_as_one(kind, tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(RANK), kind]
    found = {}
    for world in (1, 2):
        where = str(world), str(tmp_path / kind)
        ranks = [
            subprocess.Popen([*command, str(rank), *where], stdout=subprocess.PIPE, text=True) for rank in range(world)
        ]
        found[world] = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert found[1][0] and found[2] == found[1] * 2


def test_gradients_are_averaged_over_ranks_before_the_absolute_value(monkeypatch):
    """The other rank's is the opposite of the first block's, and the same of the second's."""
    other = torch.tensor(FACTOR)
    other[0] *= -1
    monkeypatch.setattr("sparsenet.distributed.averaged", lambda t: (t + other) / 2)
    assert SNIP().drop_scores(Fixed(VALUES, FACTOR)).tolist() == [0.0, 2.0]


# --- errors ---


@pytest.mark.parametrize("kind", [SNIP, GraSP])
def test_arguments_that_do_not_serve(kind):
    name = kind.__name__
    with pytest.raises(ValueError, match=f"{name}: batches and loss must be given together, got batches alone"):
        kind([data()])
    with pytest.raises(ValueError, match=f"{name}: batches and loss must be given together, got a loss alone"):
        kind(loss=cross_entropy)
    with pytest.raises(ValueError, match=f"{name}: batches must be readable more than once, as a list is, got gener"):
        kind((data() for _ in range(2)), cross_entropy)
    model = small_model()
    for batches, message in (
        ([], "batches must hold at least one batch, got none"),
        ([data()[0]], r"batches must be \(input, target\) pairs for a loss, got an input alone"),
        ([data(rows=0)], "batches must hold examples, got an empty batch"),
    ):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            kind(batches, cross_entropy).measure(model, None, views_of(model), 0)


def test_synflow_says_what_inputs_it_takes():
    with pytest.raises(TypeError, match="SynFlow: inputs must be a tensor or a Call, got list"):
        SynFlow([30])


@pytest.mark.parametrize("kind", [SNIP, GraSP])
def test_a_layer_about_which_nothing_is_known_keeps_its_topology(kind, caplog):
    model = small_model()
    sparsifier = sn.Sparsifier(model, None, kind(), sn.Linear(1.0, 0.5, 1), every=1, end=1)
    with caplog.at_level(logging.WARNING):
        update = sparsifier.step()
    assert update.dropped == 0
    reason = {
        SNIP: "its values have no gradient, and no backward pass",
        GraSP: "nothing was measured before this step",
    }[kind]
    assert all(reason in u.skipped for u in update.layers.values()) and "keeps its topology" in caplog.text


def test_grasp_refuses_what_has_no_second_derivative():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return grad * 2

    model = small_model()
    policy = GraSP([data()], lambda y, t: cross_entropy(Once.apply(y), t))
    with pytest.raises(ValueError, match="GraSP: model and loss must have second derivatives, got: .* only once"):
        policy.measure(model, None, views_of(model), 0)


def test_grasp_without_batches_needs_logits():
    class Pair(sn.SparseMLP):
        def forward(self, x):
            return super().forward(x), x

    model = Pair([8, 8, 4], density=1.0, block_size=4)
    x = torch.randn(3, 8)
    model(x)[0].sum().backward()
    with pytest.raises(ValueError, match=r"GraSP: the model's output must be logits .* without batches, got tuple"):
        GraSP().measure(model, Call((x,), {}), views_of(model), 0)


def test_they_have_names_and_can_be_planned_and_trained():
    for name, kind in (("snip", SNIP), ("grasp", GraSP), ("synflow", SynFlow)):
        assert POLICIES[name] is kind and getattr(sn, kind.__name__) is kind
        planned = sn.plan([784, 256, 10], "24MiB", policy=name)
        assert ("measuring before a rewire" in planned.moments) == (kind is not SNIP)
        x, y = data(64, 784)
        config = sn.TrainConfig(policy=name, epochs=2, batch_size=16, rewire_every=2, final_density=0.2)
        plan = sn.plan([784, 64, 10], None, 16, density=0.5, block_size=8, policy=name)
        trainer = sn.Trainer(plan, config)
        trainer.fit(sn.Examples(x, y))
        assert trainer.density == pytest.approx(0.2, abs=0.01)
