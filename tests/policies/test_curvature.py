"""Policies by curvature: what they rank, what they change, and that nothing else changes."""

import copy
import textwrap

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn.functional import cross_entropy

import sparsenet as sn
from sparsenet.policies.growth import View
from sparsenet.saliency import Call, block_fisher, first_order

pytestmark = pytest.mark.usefixtures("one_thread")

POLICIES = {
    "taylor": sn.Taylor(),
    "obd": sn.OBD(),
    "fisher": sn.Fisher(),
    "diagonal": sn.Fisher(diagonal=True),
    "woodfisher": sn.WoodFisher(),
    "cascade": sn.Cascade(),
    "mixed": sn.Cascade(cheap=sn.GMP(), expensive=sn.WoodFisher(targets="softmax")),
}


def small_model(block_size=4, density=0.5, seed=0):
    torch.manual_seed(seed)
    return sn.SparseMLP([30, 40, 24, 10], density=density, block_size=block_size, distribution="uniform")


def train(model, optimizer, sparsifier, steps=1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    updates = []
    for _ in range(steps):
        x, y = torch.randn(20, 30, generator=generator), torch.randint(10, (20,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        updates.append(sparsifier.step())
    return updates


def views_of(model):
    layers = {name: m for name, m in model.named_modules() if isinstance(m, sn.SparseLinear)}
    return {name: View(name, layer, 0, drop=1) for name, layer in layers.items()}


def scores_of(policy, model, call=None):
    views = views_of(model)
    policy.measure(model, call, views, 0)
    for view in views.values():
        policy.share(view)
    return [policy.drop_scores(view) for view in views.values()]


# --- what they rank -------------------------------------------------------------------------------------------------


def near_a_minimum(block_size, seed=0):
    """A network trained on noisy labels, whose loss has a minimum that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1500, 12, generator=generator, dtype=torch.float64)
    first = torch.randn(12, 16, generator=generator, dtype=torch.float64) * 0.8
    second = torch.randn(16, 4, generator=generator, dtype=torch.float64) * 0.8
    y = torch.multinomial(torch.softmax((x @ first).tanh() @ second, 1), 1, generator=generator).flatten()
    torch.manual_seed(seed)
    model = sn.SparseMLP([12, 16, 4], density=1.0, block_size=block_size).double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    return model, x, y


def true_changes(model, x, y):
    """Of the loss, when each block in turn is zero."""
    changes = []
    with torch.no_grad():
        before = cross_entropy(model(x), y)
        for layer in model:
            for values in layer.values:
                kept = values.clone()
                values.zero_()
                changes.append(float(cross_entropy(model(x), y) - before))
                values.copy_(kept)
    return changes


@pytest.mark.parametrize("seed", [0, 1])
def test_obd_ranks_weights_as_their_removal_does(seed):
    model, x, y = near_a_minimum(1, seed)
    changes = true_changes(model, x, y)
    ranked = {
        name: spearmanr(torch.cat(scores_of(policy, model)), changes).statistic
        for name, policy in {
            "obd": sn.OBD(batches=[x], samples=20),
            "empirical": sn.Fisher(batches=[(x, y)], loss=cross_entropy),
            "taylor": sn.Taylor(batches=[(x, y)], loss=cross_entropy),
        }.items()
    }
    assert ranked["obd"] >= 0.97 and ranked["empirical"] >= 0.97
    assert ranked["taylor"] < 0.8, "near a minimum the first order says little"
    values = torch.cat([layer.values.detach().flatten() for layer in model])
    assert spearmanr(values.abs(), changes).statistic < 0.9


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_block_fisher_ranks_blocks_as_their_removal_does(seed):
    model, x, y = near_a_minimum(4, seed)
    changes = true_changes(model, x, y)
    scores = torch.cat(scores_of(sn.Fisher(batches=[x], targets="softmax", samples=20), model))
    diagonal = torch.cat(scores_of(sn.OBD(batches=[x], samples=20), model))
    assert spearmanr(scores, changes).statistic >= 0.9
    assert spearmanr(diagonal, changes).statistic < spearmanr(scores, changes).statistic


@pytest.fixture(scope="module")
def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(data.data / 16, dtype=torch.float32)[order], torch.tensor(data.target)[order]
    return x[:1300], y[:1300], x[1300:], y[1300:]


@pytest.mark.parametrize(("block_size", "density"), [(1, 0.3), (4, 0.5), (8, 0.6)])
def test_one_shot_woodfisher_beats_magnitude_and_its_update_lowers_the_loss(block_size, density, digits):
    x, y, test_x, test_y = digits
    model = sn.SparseMLP([64, 64, 32, 10], density=1.0, block_size=block_size)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(15):
        for begin in range(0, 1300, 65):
            optimizer.zero_grad()
            cross_entropy(model(x[begin : begin + 65]), y[begin : begin + 65]).backward()
            optimizer.step()
    batches = [(x[:1000], y[:1000])]
    surgeon = sn.WoodFisher(0.0, batches, cross_entropy)
    loss, accuracy = {}, {}
    for name, policy in {
        "magnitude": sn.GMP(),
        "surgeon": surgeon,
        "without update": sn.WoodFisher(0.0, batches, cross_entropy, update=False),
        "cascade": sn.Cascade(0.0, sn.Fisher(0.0, batches, cross_entropy), surgeon, shortlist=1.3),
    }.items():
        pruned = copy.deepcopy(model)
        update = sn.Sparsifier(pruned, None, policy, density=density, every=1).step()
        assert all(layer.density <= density + 0.1 for layer in update.layers.values())
        with torch.no_grad():
            loss[name] = float(cross_entropy(pruned(x), y))
            accuracy[name] = float((pruned(test_x).argmax(1) == test_y).float().mean())
    assert accuracy["surgeon"] >= accuracy["magnitude"] + 0.1
    assert loss["surgeon"] < 0.6 * loss["without update"]
    assert loss["cascade"] < loss["magnitude"]


def test_obd_recomputed_at_every_stage_beats_magnitude(digits):
    """Ten geometric stages down to 5 %, an epoch of training after each and three at the end."""
    x, y, test_x, test_y = digits
    model = sn.SparseMLP([64, 64, 32, 10], density=1.0, block_size=1)

    def epochs(count, model, optimizer, after=lambda: None):
        for begin in [*range(0, 1300, 130)] * count:
            optimizer.zero_grad()
            cross_entropy(model(x[begin : begin + 130]), y[begin : begin + 130]).backward()
            optimizer.step()
            after()

    epochs(15, model, torch.optim.Adam(model.parameters(), 3e-3))
    accuracy = {}
    for name, policy in {"magnitude": sn.GMP(), "obd": sn.OBD(0.0, batches=[x], samples=5)}.items():
        pruned = copy.deepcopy(model)
        optimizer = torch.optim.Adam(pruned.parameters(), 1e-3)
        schedule = sn.Exponential(1.0, 0.05, steps=100)
        sparsifier = sn.Sparsifier(pruned, optimizer, policy, density=schedule, every=10, end=100)
        epochs(13, pruned, optimizer, sparsifier.step)
        with torch.no_grad():
            accuracy[name] = float((pruned(test_x).argmax(1) == test_y).float().mean())
    assert accuracy["obd"] > accuracy["magnitude"] + 0.03


# --- what is measured -----------------------------------------------------------------------------------------------


def test_the_training_backward_is_what_counts_and_of_several_the_last():
    """The scores of a model's own step, from operands that hooks of torch see."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    probe = {}

    class Probe(sn.Fisher):
        def drop_scores(self, layer):
            probe[layer.name] = super().drop_scores(layer)
            return probe[layer.name]

    sparsifier = sn.Sparsifier(model, optimizer, Probe(), every=1)
    for _ in range(2):
        x = torch.randn(16, 30)
        output = model[0](x)
        output.retain_grad()
        cross_entropy(model[2](model[1](output)), torch.randint(10, (16,))).backward()
    before_activation = output.grad * (output > 0)
    expected = block_fisher(x, before_activation, model[0].values, model[0].pattern)
    sparsifier.step()
    torch.testing.assert_close(probe["0"], expected)


def test_all_calls_of_one_backward_pass_count():
    layer = sn.SparseLinear(16, 16, density=0.5, block_size=4)
    model = nn.Sequential(layer)
    for policy in (sn.Taylor(), sn.Fisher(), sn.WoodFisher()):
        sparsifier = sn.Sparsifier(model, None, policy, every=1)
        x = torch.randn(5, 16)
        middle = layer(x)
        middle.retain_grad()
        out = layer(middle)
        out.retain_grad()
        out.square().mean().backward()
        (growth,) = sparsifier._growth.values()
        policy.share(growth.view)
        inputs, gradients = torch.cat([x, middle.detach()]), torch.cat([middle.grad, out.grad])
        if isinstance(policy, sn.Taylor):
            whole = first_order(inputs, gradients, layer.values, layer.pattern) / 2
            torch.testing.assert_close(policy.drop_scores(growth.view), whole.square())
        elif isinstance(policy, sn.Fisher):
            torch.testing.assert_close(
                policy.drop_scores(growth.view), block_fisher(inputs, gradients, layer.values, layer.pattern) / 4
            )
        else:
            kept = growth.view.measured
            torch.testing.assert_close(kept["x"], torch.cat([middle.detach(), x]))
            torch.testing.assert_close(kept["grad_output"] * 10, torch.cat([out.grad, middle.grad]) * 5)


def test_batches_of_any_sizes_are_one_mean():
    model, x = small_model(), torch.randn(30, 30)
    y = torch.randint(10, (30,))
    for policy in (sn.Taylor, sn.Fisher, sn.WoodFisher):
        whole = scores_of(policy(batches=[(x, y)], loss=cross_entropy), model)
        parts = scores_of(policy(batches=[(x[:7], y[:7]), (x[7:], y[7:])], loss=cross_entropy), model)
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)


def test_no_more_rows_are_kept_than_asked_for_and_evenly():
    policy, layer = sn.WoodFisher(rows=10), nn.Sequential(sn.SparseLinear(1, 1, density=1.0, block_size=1))
    (view,) = views_of(layer).values()
    for begin in range(0, 70, 7):
        x = torch.arange(begin, begin + 7.0).unsqueeze(1)
        policy.observe(view, x, x / 7)
    assert view.measured["x"].flatten().tolist() == list(range(0, 70, 8))
    assert view.measured["grad_output"].flatten().tolist() == pytest.approx(list(range(0, 70, 8)))


def test_the_last_call_is_what_obd_measures_on():
    """Arguments by keyword, evaluation between them, and a model in a wrapper."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = sn.SparseLinear(16, 16, density=0.75, block_size=4)

        def forward(self, first, *, scale):
            return self.layer(first) * scale

    model, seen = Model(), []

    class Probe(sn.OBD):
        def terms(self, layer, x, grad_output):
            seen.append(x.clone())
            return super().terms(layer, x, grad_output)

    sparsifier = sn.Sparsifier(model, None, Probe(), every=2)
    sparsifier.step()
    x = torch.randn(5, 16)
    model(x, scale=2.0).square().mean().backward()
    with torch.no_grad():
        model(torch.randn(3, 16), scale=1.0)
    assert sparsifier.step().dropped > 0
    assert len(seen) == 1 and torch.equal(seen[0], x)
    assert not model._forward_pre_hooks, "no hook between rewires"


# --- what they change -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("density", [None, 0.3])
def test_survivors_keep_their_moments_and_only_a_surgeon_moves_weights(name, density):
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    policy = POLICIES[name]
    sparsifier = sn.Sparsifier(model, optimizer, policy, density=density, every=2)
    average = copy.deepcopy(model)
    sparsifier.followers, sparsifier._follower_layers = (average,), {n: [average[int(n)]] for n in sparsifier.layers}
    train(model, optimizer, sparsifier)
    x, y = torch.randn(20, 30), torch.randint(10, (20,))
    optimizer.zero_grad()
    cross_entropy(model(x), y).backward()
    optimizer.step()
    before = copy.deepcopy([layer.values.detach() for layer in model])
    averages = copy.deepcopy([layer.values.detach() for layer in average])
    places = [layer.pattern.linear_places() for layer in model]
    moments = copy.deepcopy([optimizer.state[layer.values] for layer in model])
    update = sparsifier.step()
    assert update.dropped > 0 and (update.grown == update.dropped or density)
    moved = 0
    for n, layer in enumerate(model):
        stays = torch.isin(places[n], layer.pattern.linear_places())
        now = torch.isin(layer.pattern.linear_places(), places[n])
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[layer.values][key][now], moments[n][key][stays])
        assert torch.equal(average[n].values[now], averages[n][stays]), "an average keeps its values"
        moved += int((layer.values[now] != before[n][stays]).sum())
    assert (moved > 0) == (name in ("woodfisher", "cascade", "mixed"))


@pytest.mark.parametrize("name", POLICIES)
def test_a_run_resumes_bit_for_bit(name, tmp_path):
    def parts():
        model = small_model()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        schedule = sn.Linear(0.5, 0.3, 8)
        return model, optimizer, sn.Sparsifier(model, optimizer, POLICIES[name], density=schedule, every=2, seed=3)

    straight, interrupted, resumed = parts(), parts(), parts()
    train(*straight, steps=3, seed=1)
    train(*straight, steps=5, seed=2)
    train(*interrupted, steps=3, seed=1)
    sn.save(tmp_path / "half.safetensors", *interrupted)
    sn.load(tmp_path / "half.safetensors", *resumed)
    train(*resumed, steps=5, seed=2)
    state = straight[0].state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in resumed[0].state_dict().items())
    assert straight[2].state_dict() == resumed[2].state_dict()


def test_a_pass_of_its_own_changes_nothing_in_the_model():
    model = nn.Sequential(
        sn.SparseLinear(30, 40, density=0.5, block_size=4), nn.BatchNorm1d(40), nn.Dropout(0.3), nn.ReLU(),
        sn.SparseLinear(40, 10, density=0.5, block_size=4),
    )  # fmt: skip
    runs = []
    for policy in (sn.GMP(), sn.OBD(0.0)):
        twin = copy.deepcopy(model)
        sparsifier = sn.Sparsifier(twin, None, policy, density=sn.Linear(0.5, 0.4, 1), every=1)
        torch.manual_seed(5)
        cross_entropy(twin(torch.randn(20, 30)), torch.randint(10, (20,))).backward()
        assert sparsifier.step().dropped > 0
        runs.append((twin, torch.rand(3)))
    (a, random_a), (b, random_b) = runs
    assert torch.equal(random_a, random_b)
    for (name, x), (_, y) in zip(a[1].state_dict().items(), b[1].state_dict().items(), strict=True):
        assert torch.equal(x, y), name
    for number in (0, 4):
        assert torch.equal(a[number].bias.grad, b[number].bias.grad) and b[number].values.grad is None
    assert b.training and b[0].topology.expected_calls == a[0].topology.expected_calls


def test_a_move_that_fails_puts_adjusted_values_back_bit_for_bit(monkeypatch):
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    sparsifier = sn.Sparsifier(model, optimizer, sn.WoodFisher(), every=2)
    train(model, optimizer, sparsifier)
    cross_entropy(model(torch.randn(20, 30)), torch.randint(10, (20,))).backward()
    optimizer.step()
    before, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    plain, calls = sn.SparseLinear.set_pattern, []

    def fails_third(self, *args):
        calls.append(self)
        if len(calls) == 3:
            raise MemoryError("no more")
        return plain(self, *args)

    monkeypatch.setattr(sn.SparseLinear, "set_pattern", fails_third)
    with pytest.raises(MemoryError):
        sparsifier.step()
    assert len(calls) == 5, "two moves were made and taken back"
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    for key, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(torch.as_tensor(t), torch.as_tensor(moments["state"][key][n])) for n, t in state.items())


# --- what cannot be measured ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_without_a_backward_pass_nothing_moves(name):
    model = small_model()
    sparsifier = sn.Sparsifier(model, None, POLICIES[name], density=sn.Linear(0.5, 0.3, 1), every=1)
    update = sparsifier.step()
    assert update.dropped == update.grown == 0
    assert all("before this step" in layer.skipped for layer in update.layers.values())


@pytest.mark.parametrize("name", POLICIES)
def test_gradients_that_are_nan_or_zero_move_nothing(name):
    for factor, said in ((torch.nan, "NaN or Inf"), (0.0, "zero")):
        model = small_model()
        before = copy.deepcopy(model.state_dict())
        policy = POLICIES[name]
        if policy.measures:
            if name == "mixed":
                continue  # both of its parts are here by themselves
            batches = [(torch.randn(8, 30), torch.randint(10, (8,)))]
            policy = sn.OBD(0.0, batches, lambda output, target, f=factor: (output * f).mean())
        sparsifier = sn.Sparsifier(model, None, policy, density=sn.Linear(0.5, 0.3, 1), every=1)
        (model(torch.randn(8, 30)) * factor).mean().backward()
        update = sparsifier.step()
        assert all(said in layer.skipped for layer in update.layers.values()), update
        assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (lambda y: {"logits": y}, "dict"),
        (lambda y: y[:, :1], r"torch.float32 \[8, 1\]"),
        (lambda y: y.detach(), r"torch.float32 \[8, 10\]"),
    ],
)
def test_a_model_whose_output_is_no_logits_is_refused_and_unchanged(output, got):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_model()

        def forward(self, x):
            return output(self.inner(x))

    model = Odd()
    before = copy.deepcopy(model.state_dict())
    sparsifier = sn.Sparsifier(model, None, sn.OBD(), every=1)
    model(torch.randn(8, 30))
    with pytest.raises(ValueError, match=f"the model's output must be .* got {got}"):
        sparsifier.step()
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sn.OBD(targets="uniform"), r"OBD: targets must be None or one of softmax, gaussian, got 'uniform'"),
        (lambda: sn.Taylor(targets="softmax"), r"Taylor: targets must be None, got 'softmax'"),
        (lambda: sn.Fisher(loss=cross_entropy), r"Fisher: batches must be given with a loss, got none"),
        (lambda: sn.Fisher(batches=[torch.ones(1)]), r"Fisher: batches must come with a loss or targets, got neither"),
        (lambda: sn.OBD(batches=iter([1])), r"OBD: batches must be readable more than once, .* got list_iterator"),
        (lambda: sn.OBD(samples=0), r"OBD: samples must be an integer >= 1, got 0"),
        (lambda: sn.WoodFisher(rows=0), r"WoodFisher: rows must be an integer >= 1, got 0"),
        (lambda: sn.WoodFisher(damp=0.0), r"WoodFisher: damp must be positive, got 0"),
        (lambda: sn.Cascade(shortlist=0.5), r"Cascade: shortlist must be at least 1, got 0.5"),
        (lambda: sn.Cascade(cheap=3), r"Cascade: cheap must be a policy, and no Cascade, got 3"),
        (lambda: sn.Cascade(expensive=sn.Cascade()), r"Cascade: expensive must be a policy, and no Cascade"),
        (lambda: sn.Fisher(1.5), r"Fisher: drop_fraction must lie in \[0, 1\], got 1.5"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- the cascade ----------------------------------------------------------------------------------------------------


def cascade_scores(shortlist, drop):
    model, x, y = small_model(density=0.8), torch.randn(40, 30), torch.randint(10, (40,))
    cheap, expensive = (kind(batches=[(x, y)], loss=cross_entropy) for kind in (sn.Taylor, sn.WoodFisher))
    policy, views = sn.Cascade(0.3, cheap, expensive, shortlist), views_of(model)
    view = views["0"]
    view.drop = drop
    policy.measure(model, None, views, 0)
    policy.share(view)
    both = scores_of(cheap, model)[0], scores_of(expensive, model)[0]
    return policy.drop_scores(view), *both


def test_a_shortlist_of_everything_is_the_expensive_policy_and_one_of_the_quota_the_cheap():
    scores, _, expensive = cascade_scores(shortlist=1000.0, drop=9)
    assert torch.equal(scores.argsort(), expensive.argsort(stable=True))
    scores, cheap, _ = cascade_scores(shortlist=1.0, drop=9)
    assert set(scores.argsort()[:9].tolist()) == set(cheap.argsort(stable=True)[:9].tolist())
    assert torch.equal(scores.argsort()[9:], cheap.argsort(stable=True)[9:])


def test_the_expensive_work_is_that_of_the_shortlist(monkeypatch):
    from sparsenet.saliency import woodfisher

    groups = []
    plain = woodfisher._Groups._piece
    monkeypatch.setattr(woodfisher._Groups, "_piece", lambda self, b: groups.append(len(b)) or plain(self, b))
    torch.manual_seed(0)
    model = sn.SparseMLP([96, 200, 4], density=1.0, block_size=1)
    batches = [(torch.randn(10, 96), torch.randint(4, (10,)))]
    parts = (kind(0.0, batches, cross_entropy) for kind in (sn.Fisher, sn.WoodFisher))
    policy, views = sn.Cascade(0.0, *parts, shortlist=2.0), views_of(model)
    policy.measure(model, None, views, 0)
    views["0"].drop = 5
    policy.share(views["0"])
    policy.drop_scores(views["0"])
    assert 0 < sum(groups) <= 10 < 400


# --- memory, several ranks, others ----------------------------------------------------------------------------------


def test_memory_is_that_of_the_values(run_child):
    """A layer of 4 GiB if it were dense, within 128 MiB: the workspace, and rows of 32768 features."""
    done = run_child(
        textwrap.dedent("""
        import torch, sparsenet as sn
        from sparsenet.policies.growth import View
        torch.set_num_threads(1)
        n, ce = 32768, torch.nn.functional.cross_entropy
        pattern = sn.BlockPattern.random((n, n), 500 / (n // 32) ** 2, 32)
        model = torch.nn.Sequential(sn.SparseLinear(n, n, pattern=pattern))
        batches = [(torch.randn(16, n), torch.randint(n, (16,)))]
        policies = [sn.Taylor(0.0, batches, ce), sn.OBD(0.0, [batches[0][0]]), sn.Fisher(0.0, batches, ce),
                    sn.WoodFisher(0.0, batches, ce), sn.Cascade(0.0, sn.Fisher(0.0, batches, ce),
                                                                 sn.WoodFisher(0.0, batches, ce))]
        for policy in policies:
            dropped = torch.arange(pattern.num_blocks // 4)
            view = View("0", model[0], 0, drop=len(dropped))
            with sn.measure_peak() as peak:
                policy.measure(model, None, {"0": view}, 0)
                policy.share(view)
                policy.drop_scores(view)
                policy.adjust(view, dropped)
            print(type(policy).__name__, peak.bytes >> 20)
        """)
    )
    used = {name: int(mib) for name, mib in map(str.split, done.stdout.splitlines())}
    assert len(used) == 5 and max(used.values()) < 128, used


@pytest.mark.parametrize("name", POLICIES)
def test_half_types_and_masks_are_served(name):
    torch.manual_seed(0)
    mask = torch.rand(30, 4, 4) > 0.5
    pattern = sn.BlockPattern.random((40, 30), 0.38, 4)
    mask = torch.rand(pattern.values_shape) > 0.5
    model = nn.Sequential(
        sn.SparseLinear(30, 40, pattern=pattern, element_mask=mask), sn.SparseLinear(40, 10, density=0.5, block_size=4)
    ).bfloat16()
    sparsifier = sn.Sparsifier(model, None, POLICIES[name], density=sn.Linear(0.4, 0.3, 1), every=1)
    cross_entropy(model(torch.randn(20, 30).bfloat16()).float(), torch.randint(10, (20,))).backward()
    update = sparsifier.step()
    assert update.dropped > 0 and not any(layer.skipped for layer in update.layers.values())
    assert not bool(model[0].values[~model[0].element_mask].any())


@pytest.mark.parametrize("name", ["taylor", "obd", "fisher", "woodfisher", "cascade"])
def test_the_trainer_takes_them_by_name(name):
    config = sn.TrainConfig(policy=name, epochs=2, batch_size=32, rewire_every=2, progress=False, threads=1)
    trainer = sn.Trainer(sn.plan([64, 96, 10], None, policy=name, density=0.3, block_size=8, batch_size=32), config)
    assert trainer.fit((torch.rand(128, 64), torch.arange(128) % 10)).rewires > 0


def test_a_call_of_a_model_is_a_batch():
    model = small_model()
    scores = scores_of(sn.OBD(), model, Call((torch.randn(5, 30),), {}))
    assert all(bool((s > 0).any()) for s in scores)
