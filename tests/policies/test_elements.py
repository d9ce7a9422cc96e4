"""Rewiring elements inside stored blocks, and blocks of layers with element masks: counts exact, zeros exact."""

import copy

import pytest
import torch

import sparsenet as sn
from sparsenet.elements.masks import elements_inside
from sparsenet.policies.choosing import next_mask, units_of
from sparsenet.policies.views import ElementView, likely_places

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "adam fused": lambda p: torch.optim.Adam(p, 1e-2, fused=True),
    "adam foreach": lambda p: torch.optim.Adam(p, 1e-2, foreach=True),
    "rprop": lambda p: torch.optim.Rprop(p, 1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
}


def dense_mask(layer):
    """Bool [out, in]."""
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.values.copy_(twin.element_mask)
    return twin.weight_dense().detach() != 0


def made(rule=0.3, seed=0, dtype=None):
    generator = torch.Generator().manual_seed(seed)
    first = sn.SparseLinear(
        45, 38, density=0.6, block_size=8, element_mask=rule, activation="relu", generator=generator, dtype=dtype
    )
    second = sn.SparseLinear(38, 10, density=1.0, block_size=8, element_mask=rule, generator=generator, dtype=dtype)
    return torch.nn.Sequential(first, second)


# --- the view ---


def test_the_view_has_active_elements_as_blocks_of_side_1():
    """Of a 4 x 6 matrix the block at its right edge is stored: 4 x 2 of its elements are inside."""
    pattern = sn.BlockPattern([0, 1], [1], shape=(4, 6), block_size=4)
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, [0, 2], [1, 0]] = True
    layer = sn.SparseLinear(6, 4, pattern=pattern, element_mask=mask)
    view = ElementView("0", layer, key=3)
    assert view.pattern.linear_places().tolist() == [5, 16] and view.pattern.shape == (4, 6)
    assert view.inactive == elements_inside(pattern) - 2 == 6
    assert torch.cat(list(view.inactive_places((0, 1)))).tolist() == [4, 10, 11, 17, 22, 23]
    assert view.random_places(100).tolist() == [4, 10, 11, 17, 22, 23]
    drawn = view.random_places(3)
    assert len(drawn) == 3 and set(drawn.tolist()) < {4, 10, 11, 17, 22, 23}
    assert torch.equal(view.values.flatten(), layer.values.detach()[0, [0, 2], [1, 0]])
    view.put(torch.tensor([7.0, 8.0]).view(2, 1, 1))
    assert layer.values[0, 0, 1] == 7 and layer.values[0, 2, 0] == 8
    assert view.whole(torch.tensor([1.0, 2.0]).view(2, 1, 1)).sum() == 3
    with pytest.raises(
        ValueError, match="grow_places must return masked elements of stored blocks, got 0, whose block"
    ):
        view.check_growable(torch.tensor([0]))
    units = units_of(layer, by_elements=True)
    assert (units.now, units.most, units.places, units.size) == (2, 8, 24, 1)


def test_gradients_of_elements_are_those_of_a_dense_layer():
    torch.manual_seed(0)
    layer = made(dtype=torch.float64)[0]
    view, x, g = ElementView("0", layer, key=0), torch.randn(7, 45).double(), torch.randn(7, 38).double()
    view.operands = x, g
    places = torch.cat(list(view.inactive_places((0, 5))))
    torch.testing.assert_close(view.gradients(places).flatten(), (g.T @ x).flatten()[places])
    torch.testing.assert_close(
        view.gradient_squared_norms(places), (g.T @ x).flatten()[places].square().float(), rtol=1e-5, atol=1e-6
    )


# --- unstructured ---


@pytest.mark.parametrize("policy", [sn.SET(0.3), sn.RigL(0.3), sn.GraNet(0.3), sn.GMP()])
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_counts_and_zeros_are_exact(policy, optimizer):
    torch.manual_seed(0)
    model = made()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    weights = 45 * 38 + 38 * 10
    start = sum(layer.num_active for layer in model) / weights
    density = sn.Cubic(start, start / 3, 8) if policy.follows_density else None
    sparsifier = sn.Sparsifier(model, optimizer, policy, density=density, every=2, elements=True)
    for step in range(1, 11):
        optimizer.zero_grad()
        model(torch.randn(16, 45)).square().mean().backward()
        for layer in model:
            assert not layer.values.grad[~layer.element_mask].any()
        optimizer.step()
        masks = [dense_mask(layer) for layer in model]
        update = sparsifier.step()
        for i, layer in enumerate(model):
            assert not layer.values[~layer.element_mask].any()
            assert layer.element_mask.flatten(1).any(1).all()  # no stored block is empty
            if update is None:
                continue
            change, before, after = update.layers[str(i)], masks[i].flatten(), dense_mask(layer).flatten()
            assert not change.skipped and change.density == layer.num_active / before.numel()
            assert torch.equal((before & ~after).nonzero().flatten(), change.dropped_places)
            assert torch.equal((~before & after).nonzero().flatten(), change.grown_places)
            assert not layer.weight_dense().flatten()[change.grown_places].any()
            assert (after.view(-1, layer.in_features).any(1) | ~before.view(-1, layer.in_features).any(1)).all()
        if update is not None and density is not None:
            total = sum(layer.num_active for layer in model)
            assert total == round(density(step) * weights) or abs(total - density(step) * weights) <= 0.5
    if density is None:
        assert sum(layer.num_active for layer in model) == round(start * weights)


def test_rigl_takes_the_elements_of_largest_gradient_and_set_draws_inside_stored_blocks():
    torch.manual_seed(0)
    model, x = made(dtype=torch.float64), torch.randn(16, 45).double()
    stored = copy.deepcopy(model[0])
    with torch.no_grad():
        stored.values.fill_(1.0)
    stored.set_element_mask(None)
    with torch.no_grad():
        stored.values.fill_(1.0)
    stored, before = stored.weight_dense() != 0, dense_mask(model[0])
    weight = model[0].weight_dense().detach().requires_grad_()
    hidden = torch.relu(x @ weight.T + model[0].bias)
    (hidden @ model[1].weight_dense().T + model[1].bias).square().sum().backward()
    sparsifier = sn.Sparsifier(model, None, sn.RigL(0.2), every=1, elements=True)
    model(x).square().sum().backward()
    change = sparsifier.step().layers["0"]
    scores = weight.grad.square().masked_fill(~stored | before, -1).flatten()
    assert change.grown_places.tolist() == sorted(scores.topk(change.grown).indices.tolist()) and change.grown > 20
    lowest = weight.detach().square().masked_fill(~before, torch.inf).flatten()
    assert set(change.dropped_places.tolist()) <= set(lowest.topk(change.dropped + 9, largest=False).indices.tolist())
    before = dense_mask(model[0])
    grown = sn.Sparsifier(model, None, sn.SET(0.2), every=1, elements=True).step().layers["0"].grown_places
    assert len(grown) > 20 and stored.flatten()[grown].all() and not before.flatten()[grown].any()


def test_a_block_leaves_with_its_last_element_and_state_follows():
    """Three blocks, one with a single small weight: it leaves, and Adam's moments of the others stay bit for bit."""
    pattern = sn.BlockPattern([0, 2, 3], [0, 1, 1], shape=(8, 8), block_size=4)
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    mask[0], mask[2], mask[1, 0, 0] = True, True, True
    layer = sn.SparseLinear(8, 8, pattern=pattern, element_mask=mask)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(6, 8)).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        layer.values[1, 0, 0] = 1e-9
    moments, parameter = optimizer.state[layer.values]["exp_avg"].clone(), layer.values
    density = sn.Linear(33 / 64, 32 / 64, 1)
    sparsifier = sn.Sparsifier(layer, optimizer, sn.GMP(), density=density, every=1, elements=True)
    update = sparsifier.step().layers[""]
    assert update.dropped_places.tolist() == [4] and update.num_blocks == layer.pattern.num_blocks == 2
    assert layer.values is parameter and layer.num_active == 32
    assert torch.equal(optimizer.state[layer.values]["exp_avg"], moments[[0, 2]])


def step_sizes(layer, optimizer):
    """By place of an active element."""
    view = ElementView("0", layer, 0)
    places = view.pattern.linear_places()
    sizes = optimizer.state[layer.values]["step_size"].flatten()[view.stored(places)]
    return dict(zip(places.tolist(), sizes.tolist(), strict=True))


def test_elements_that_come_begin_as_new_ones_and_the_others_keep_their_state():
    torch.manual_seed(0)
    model = made()
    optimizer = torch.optim.Rprop(model.parameters(), lr=0.5)
    sparsifier = sn.Sparsifier(model, optimizer, sn.SET(0.3), every=3, elements=True)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(16, 45)).square().mean().backward()
        optimizer.step()
        before = step_sizes(model[0], optimizer)
        update = sparsifier.step()
    now, grown = step_sizes(model[0], optimizer), set(update.layers["0"].grown_places.tolist())
    assert grown and all(now[place] == 0.5 for place in grown)
    assert all(now[place] == before[place] for place in now if place not in grown) and len(set(now.values())) > 2


@pytest.mark.parametrize("rule", [0.3, "2:4"])
def test_a_failure_half_way_leaves_everything_as_it_was(rule, monkeypatch):
    torch.manual_seed(0)
    model = made(rule)
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    sparsifier = sn.Sparsifier(model, optimizer, sn.SET(0.3), every=2, elements=True)

    def step():
        optimizer.zero_grad()
        model(torch.randn(16, 45)).square().mean().backward()
        optimizer.step()

    step()
    sparsifier.step()
    step()
    state = copy.deepcopy((model.state_dict(), [dict(optimizer.state[layer.values]) for layer in model]))
    real = sn.SparseLinear.set_pattern

    def fails(self, *arguments):
        if self is model[1] and not monkeypatch.failed:
            monkeypatch.failed = True
            raise MemoryError("no more")
        return real(self, *arguments)

    monkeypatch.failed = False
    monkeypatch.setattr(sn.SparseLinear, "set_pattern", fails)
    with pytest.raises(MemoryError):
        sparsifier.step()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[0][key]), key
    for layer, before in zip(model, state[1], strict=True):
        for key, tensor in before.items():
            assert torch.equal(optimizer.state[layer.values][key], tensor), key


def test_training_goes_on_from_a_file_bit_for_bit(tmp_path):
    def parts(seed):
        model = made(seed=seed)
        optimizer = torch.optim.AdamW(model.parameters())
        return (
            model,
            optimizer,
            sn.Sparsifier(model, optimizer, sn.RigL(sn.Cosine(0.4, 0.0, 20)), every=3, elements=True),
        )

    def train(model, optimizer, sparsifier, steps):
        for step in steps:
            optimizer.zero_grad()
            model(torch.randn(9, 45, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
            sparsifier.step()

    whole, first, second = parts(0), parts(0), parts(1)
    train(*whole, range(14))
    train(*first, range(8))
    sn.save(tmp_path / "a", *first)
    sn.load(tmp_path / "a", *second)
    train(*second, range(8, 14))
    for a, b in zip(whole[0], second[0], strict=True):
        assert (
            torch.equal(a.values, b.values) and torch.equal(a.element_mask, b.element_mask) and a.pattern == b.pattern
        )


# --- N:M ---


def test_in_a_group_the_lowest_leaves_for_the_best():
    """1:2 on the first row: weights 3 at 0 and 1 at 2. One element is exchanged, inside the group (2, 3) of the 1."""
    pattern = sn.BlockPattern([0, 1], [0], shape=(4, 4), block_size=4)
    layer = sn.SparseLinear(4, 4, pattern=pattern, element_mask="1:2", bias=False)
    weight = torch.tensor([[3.0, 0, 1, 0], [9, 0, 0, 9], [9, 0, 9, 0], [0, 9, 9, 0]])
    layer.set_element_mask((weight != 0)[None])
    layer.set_element_mask("1:2")
    with torch.no_grad():
        layer.values.copy_(weight)
    layer.set_element_mask("1:2")
    assert layer.num_active == 8 and layer.element_mask[0, 0].tolist() == [True, False, True, False]
    update = sn.Sparsifier(layer, None, sn.SET(1 / 8), every=1, elements=True).step().layers[""]
    assert update.dropped_places.tolist() == [2] and update.grown_places.tolist() == [3] and update.clamped == 0
    assert layer.element_mask[0, 0].tolist() == [True, False, False, True] and layer.elements.holds(layer.element_mask)


@pytest.mark.parametrize("rule", ["2:4", "1:4", "4:8", "3:4"])
@pytest.mark.parametrize("policy", [sn.SET(0.3), sn.RigL(0.3), sn.MEST(0.3), sn.SNFS(0.3, momentum=0.5)])
def test_n_m_masks_hold_in_training_and_rewiring(rule, policy):
    torch.manual_seed(0)
    model = made(rule)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    sparsifier = sn.Sparsifier(model, optimizer, policy, every=4, elements=True)
    counts = [layer.num_active for layer in model]
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.randn(16, 45)).square().mean().backward()
        optimizer.step()
        update = sparsifier.step()
        for layer in model:
            assert layer.elements.holds(layer.element_mask) and not layer.values[~layer.element_mask].any()
        assert [layer.num_active for layer in model] == counts
    assert all(change.grown == change.dropped > 0 for change in update.layers.values())


def test_rigl_exchanges_inside_groups_by_the_gradient():
    """With all allowed to go, those go that are not the last of their column, each for the best one in its group."""
    torch.manual_seed(0)
    layer = sn.SparseLinear(16, 8, density=1.0, block_size=8, element_mask="1:4", bias=False, dtype=torch.float64)
    x, before = torch.randn(9, 16).double(), dense_mask(layer)
    sparsifier = sn.Sparsifier(layer, None, sn.RigL(1.0), every=1, elements=True, grace=0)
    y = layer(x)
    y.square().sum().backward()
    update = sparsifier.step().layers[""]
    scores = ((2 * y.detach()).T @ x).abs().masked_fill(before, -1).view(8, 4, 4)
    best = scores.argmax(2) + torch.arange(4) * 4 + torch.arange(8)[:, None] * 16
    groups = update.grown_places // 4
    assert update.dropped == 32 - int(before.any(0).sum()) > 0 and torch.equal(groups, update.dropped_places // 4)
    assert update.grown_places.tolist() == best.flatten()[groups].tolist()


def test_a_changing_density_is_refused_where_only_groups_are_rewired():
    with pytest.raises(ValueError, match=r"density must be constant where every layer has an N:M mask"):
        sn.Sparsifier(made("2:4"), None, sn.GMP(), density=sn.Linear(0.5, 0.2, 10), elements=True)
    with pytest.raises(ValueError, match="NM: m must divide the block size 8, got 16"):
        made("2:16")


# --- blocks of masked layers ---


@pytest.mark.parametrize("rule", [0.25, "2:4"])
@pytest.mark.parametrize("policy", [sn.SET(0.3), sn.RigL(0.3)])
def test_blocks_that_come_keep_the_number_of_elements(rule, policy):
    torch.manual_seed(0)
    layer = sn.SparseLinear(128, 128, density=0.25, block_size=16, element_mask=rule)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    sparsifier = sn.Sparsifier(layer, optimizer, policy, every=1)
    before = layer.num_active
    assert before == (1024 if rule == 0.25 else 2048)
    for _ in range(4):
        optimizer.zero_grad()
        layer(torch.randn(8, 128)).square().mean().backward()
        optimizer.step()
        update = sparsifier.step()
        assert update.dropped == update.grown == 5 and layer.num_active == before and layer.pattern.num_blocks == 16
        assert not layer.values[~layer.element_mask].any() and layer.element_mask.flatten(1).any(1).all()
    assert layer.elements is None if rule == 0.25 else layer.elements.holds(layer.element_mask)


def test_a_block_that_comes_is_never_without_an_element():
    pattern = sn.BlockPattern.from_linear_places(torch.arange(8), (64, 64), 8)
    layer = sn.SparseLinear(64, 64, pattern=pattern, element_mask=8 / 512)
    new = sn.BlockPattern.from_linear_places(torch.tensor([0, 1, 20, 21, 22, 23, 24, 25]), (64, 64), 8)
    mask = next_mask(layer, new, key=1)
    assert mask[2:].flatten(1).any(1).all() and torch.equal(mask[:2], layer.element_mask[:2])
    assert torch.equal(mask, next_mask(layer, new, key=1)) and not torch.equal(mask, next_mask(layer, new, key=2))


# --- candidates ---


def test_candidates_are_drawn_by_what_their_gradient_can_be():
    """Two of the four block rows have no gradient at all: nothing is drawn there as long as other places are left."""
    pattern = sn.BlockPattern.from_linear_places(torch.tensor([0, 5]), (16, 16), 4)
    x, g = torch.randn(6, 16), torch.randn(6, 16)
    g[:, 8:] = 0
    drawn = likely_places(pattern, 4, (x, g), key=1)
    assert len(drawn) == 4 and set(drawn.tolist()) <= {1, 2, 3, 4, 6, 7}
    assert torch.equal(drawn, likely_places(pattern, 4, (x, g), key=1))
    assert likely_places(pattern, 99, (x, g), key=1).tolist() == [p for p in range(16) if p not in (0, 5)]
    shares = torch.zeros(16)
    x, g = torch.ones(1, 16), torch.ones(1, 16)
    x[:, 4:8] = 2.0  # the second block column is four times as likely
    for key in range(3000):
        shares[likely_places(pattern, 1, (x, g), key)] += 1
    expected = torch.tensor([0.0, 4, 1, 1, 1, 0, 1, 1, 1, 4, 1, 1, 1, 4, 1, 1])
    chi_square = ((shares - expected * 3000 / expected.sum()).square() / expected.clamp(min=1)).sum() * expected.sum()
    assert float(chi_square) / 3000 < 34.5  # 13 degrees of freedom, one in a thousand
    with pytest.raises(ValueError, match="its grow scores hold NaN or Inf"):
        likely_places(pattern, 4, (x * torch.nan, g), key=1)


def test_rigl_scores_candidates_only_where_all_places_would_cost_too_much(monkeypatch):
    torch.manual_seed(0)
    seen = []
    real = sn.RigL.grow_scores
    monkeypatch.setattr(
        sn.RigL, "grow_scores", lambda self, view, where: seen.append(len(where)) or real(self, view, where)
    )
    model = sn.SparseMLP([256, 256], density=0.1, block_size=8)
    for cheap, candidates in ((1 << 30, 3), (0, 3), (0, None)):
        monkeypatch.setattr("sparsenet.policies.views.CHEAP", cheap)
        sparsifier = sn.Sparsifier(model, None, sn.RigL(0.3, candidates=candidates), every=1)
        model(torch.randn(16, 256)).square().sum().backward()
        update = sparsifier.step()
        assert update.grown == 31
    assert seen == [1024 - 102, 3 * 31, 1024 - 102]


def test_between_rewires_nothing_of_the_elements_is_kept():
    """The pattern of single elements that a rewire works on is larger than the mask: it goes with the rewire."""
    model = made()
    sparsifier = sn.Sparsifier(model, None, sn.SET(0.3), every=4, elements=True)
    for step in range(1, 9):
        sparsifier.step()
        armed = step % 4 == 3
        assert bool(sparsifier._element_views) == bool(sparsifier._policy_state._patterns) == armed


def test_what_a_policy_keeps_at_rewires_alone_is_saved_too():
    class Counts(sn.SET):
        """How many rewires a block has outlasted."""

        def drop_scores(self, layer):
            layer.state["age"] = layer.state.get("age", torch.zeros(layer.pattern.num_blocks)) + 1
            return -layer.state["age"]

    model = sn.SparseMLP([64, 64], density=0.25, block_size=8)
    sparsifier = sn.Sparsifier(model, None, Counts(0.25), every=3)
    for _ in range(7):
        sparsifier.step()
    age = sparsifier.state_dict()["policy"]["0"]["age"]
    assert len(age) == model[0].pattern.num_blocks and set(age.tolist()) == {0.0, 1.0, 2.0}
