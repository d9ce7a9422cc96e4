"""Compaction of block-sparse layers: where blocks land, which order is chosen, moments, masks, and bytes."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sparsenet as sn
from sparsenet.compaction.compacting import CompactionError, compact
from sparsenet.compaction.reblocking import fullest_order, reblock
from sparsenet.functional.blocks import zero_outside
from sparsenet.pattern import BlockPattern

# --- counting blocks ------------------------------------------------------------------------------------------------


@st.composite
def gathers(draw):
    b = draw(st.sampled_from([1, 4, 8]))
    shape = tuple(draw(st.integers(1, 5 * b)) for _ in range(2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    pattern = BlockPattern.random(shape, draw(st.sampled_from([0.0, 0.3, 0.8])), b, generator)
    chosen = []
    for n in shape:
        order = torch.randperm(n, generator=generator)[: draw(st.integers(1, n))]
        chosen.append(order if draw(st.booleans()) else order.sort().values)
    present = None
    if draw(st.booleans()):
        present = torch.rand(pattern.num_blocks, b, b, generator=generator) < 0.3
        zero_outside(present, pattern)
    return pattern, *chosen, present


@given(gathers())
def test_reblock_equals_the_dense_picture(case):
    pattern, rows, cols, present = case
    b = pattern.block_size
    values = torch.ones(pattern.num_blocks, b, b) if present is None else present.float()
    zero_outside(values, pattern)
    dense = torch.zeros(pattern.block_rows, pattern.block_cols, b, b)
    dense[pattern.row_indices.long(), pattern.col_indices.long()] = values
    dense = dense.permute(0, 2, 1, 3).reshape(pattern.block_rows * b, -1)[rows][:, cols]
    landed = reblock(pattern, rows, cols, present)
    tiles = nn.functional.pad(dense, (0, -len(cols) % b, 0, -len(rows) % b))
    tiles = tiles.reshape(-(-len(rows) // b), b, -(-len(cols) // b), b)
    inside = nn.functional.pad(torch.ones_like(dense), (0, -len(cols) % b, 0, -len(rows) % b)).reshape(tiles.shape)
    hit = tiles.sum((1, 3)) > 0
    assert torch.equal(landed.pattern().to_mask(), hit)
    assert landed.carried == int(dense.sum())
    assert landed.fill_in == int((inside.sum((1, 3)) * hit).sum()) - landed.carried
    assert landed.pattern().shape == (len(rows), len(cols))


def test_fullest_order_by_hand():
    # two kinds of units, interleaved: sorted by kind, four neighbours touch one block instead of two
    kinds = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0])
    signatures = torch.nn.functional.one_hot(kinds, 2).bool()
    order = fullest_order(signatures, 4)
    assert sorted(order.tolist()) == list(range(8))
    assert [len(kinds[order[i : i + 4]].unique()) for i in (0, 4)] == [1, 1]


@given(st.integers(0, 10_000), st.integers(1, 40), st.sampled_from([1, 4, 8]))
def test_fullest_order_is_a_permutation_and_rarely_worse(seed, n, b):
    signatures = torch.rand(n, 6, generator=torch.Generator().manual_seed(seed)) < 0.3
    order = fullest_order(signatures, b)
    assert sorted(order.tolist()) == list(range(n))
    assert torch.equal(order, fullest_order(signatures, b))


def test_an_order_that_takes_too_long_is_not_searched(monkeypatch):
    monkeypatch.setattr("sparsenet.compaction.reblocking.MOST_WORK", 10)
    assert fullest_order(torch.eye(8, dtype=torch.bool), 4) is None


# --- choosing -------------------------------------------------------------------------------------------------------


def two_layers(hidden=64, b=8, density=1.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    options = {"density": density, "block_size": b, "generator": generator, "dtype": dtype}
    return nn.Sequential(
        sn.SparseLinear(40, hidden, **options),
        sn.TriStateReLU(hidden, width_start=1.0, depth=False),
        sn.SparseLinear(hidden, 10, **options),
    )


def shut(model, units):
    with torch.no_grad():
        model[1].width_gate[units] = 0
    return model


def same_function(model, whole, width=40, bound=1e-5):
    x = torch.randn(9, width, dtype=next(model.parameters()).dtype)
    torch.testing.assert_close(model(x), whole(x), rtol=bound, atol=bound)


def test_whole_blocks_leave_without_re_blocking():
    model = shut(two_layers(), slice(16, 32))
    whole = copy.deepcopy(model)
    report = compact(model)
    assert report.reblocked == {"0": "whole blocks"} and report.fill_in == (0, 0)
    assert report.blocks == (5 * 8 + 8 * 2, 5 * 6 + 6 * 2)
    same_function(model, whole)


def test_single_units_close_ranks_where_that_saves_blocks():
    model = shut(two_layers(), torch.arange(0, 64, 2))  # half of every block
    whole = copy.deepcopy(model)
    report = compact(model)
    assert report.reblocked == {"0": "re-blocked"} and report.layers["0"].after == 32
    assert report.blocks == (5 * 8 + 8 * 2, 5 * 4 + 4 * 2)
    same_function(model, whole)


def test_single_units_stay_where_re_blocking_would_cost():
    # a block diagonal: shifting by one would need two blocks for each one
    pattern = BlockPattern.from_mask(torch.eye(8, dtype=torch.bool), 8)
    model = nn.Sequential(
        sn.SparseLinear(64, 64, pattern=pattern),
        sn.TriStateReLU(64, width_start=1.0, depth=False),
        sn.SparseLinear(64, 64, pattern=pattern),
    )
    shut(model, 0)
    whole = copy.deepcopy(model)
    report = compact(model, permute=False)
    assert report.removed == 0 and report.layers["0"].kept == {"its block is not empty": 1}
    assert report.bytes[0] == report.bytes[1]
    same_function(model, whole, 64)


def test_a_permutation_makes_blocks_fuller():
    """Unstructured weights inside blocks: units that read the same inputs become neighbours."""
    b, hidden = 8, 64
    kinds = torch.arange(hidden) % 4  # unit i reads and writes only quarter i % 4
    first = (torch.arange(64) // 16).unsqueeze(0) == kinds.unsqueeze(1)  # [hidden, in]
    last = (torch.arange(32) // 8).unsqueeze(1) == kinds.unsqueeze(0)  # [out, hidden]

    def layer(mask):
        tiles = mask.reshape(mask.shape[0] // b, b, mask.shape[1] // b, b).permute(0, 2, 1, 3)
        pattern = BlockPattern.from_mask(tiles.any(3).any(2), b)
        blocks = tiles[pattern.row_indices.long(), pattern.col_indices.long()]
        return sn.SparseLinear(mask.shape[1], mask.shape[0], pattern=pattern, element_mask=blocks)

    model = nn.Sequential(layer(first), nn.ReLU(), layer(last))
    whole = copy.deepcopy(model)
    active = sum(layer.num_active for layer in (model[0], model[2]))
    report = compact(model)
    assert report.reblocked == {"0": "re-blocked, permuted"} and report.removed == 0
    assert report.blocks == (8 * 8 + 4 * 8, 8 * 2 + 4 * 2)  # a quarter of the blocks for the same active weights
    assert report.fill_in[1] == 0 < report.fill_in[0]
    assert sum(layer.num_active for layer in (model[0], model[2])) == active
    same_function(model, whole, 64)
    assert compact(model).blocks[1] == report.blocks[1]


def deep_model(hidden=384):
    """Two hidden layers; two fifths of their units, at random, are closed."""
    generator = torch.Generator().manual_seed(1)
    options = {"density": 0.25, "block_size": 16, "generator": generator}
    layers = []
    for n, out in ((256, hidden), (hidden, hidden)):
        gate = sn.TriStateReLU(out, width_start=(torch.rand(out, generator=generator) < 0.6).float())
        layers += [sn.SparseLinear(n, out, **options), gate]
    return nn.Sequential(*layers, nn.Linear(hidden, 10))


def test_two_layers_re_block_together_where_neither_would_alone():
    model = deep_model()
    whole = copy.deepcopy(model)
    for gate_to_open in (1, 3):  # with the other layer's units all open, re-blocking one layer's does not pay
        alone = copy.deepcopy(model)
        with torch.no_grad():
            alone[gate_to_open].width_gate.fill_(1)
        assert compact(alone).removed == 0
    report = compact(model)
    assert report.reblocked == dict.fromkeys(("0", "2"), "re-blocked, permuted")
    assert [report.layers[n].after for n in ("0", "2")] == [whole[1].num_open(), whole[3].num_open()]
    assert report.bytes[1] < report.bytes[0]
    same_function(model, whole, 256)


def test_a_constant_that_stays_in_its_block_stays_what_it_is():
    """Unit 0 of the middle layer could go, but its block stays; it has no bias to take the constants that it reads."""
    reads = BlockPattern([0, 2, 3], [0, 2, 1], shape=(16, 24), block_size=8)
    eye = BlockPattern.from_mask(torch.eye(2, dtype=torch.bool), 8)
    model = nn.Sequential(
        *(nn.Linear(6, 24), nn.Tanh(), sn.SparseLinear(24, 16, bias=False, pattern=reads), nn.Tanh()),
        sn.SparseLinear(16, 16, pattern=eye),
    ).double()
    with torch.no_grad():
        model[0].weight[16:] = 0  # a whole block of constants, read by unit 0 alone, which reads nothing else
        model[2].values[1, 1:] = model[2].values[0, 0] = 0
    whole = copy.deepcopy(model)
    report = compact(model, permute=False)
    assert report.layers["2"].kept == {"its block is not empty": 1}
    assert report.layers["0"].after == 24
    same_function(model, whole, 6, bound=1e-12)


def test_units_that_are_returned_or_concatenated_are_not_permuted():
    class Returned(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = sn.SparseLinear(16, 16, density=0.5, block_size=4), sn.SparseLinear(16, 8, block_size=4)

        def forward(self, x):
            h = self.a(x)
            return h, self.b(h)

    model = Returned()
    whole, x = copy.deepcopy(model), torch.randn(3, 16)
    compact(model)
    for got, expected in zip(model(x), whole(x), strict=True):
        torch.testing.assert_close(got, expected)


@given(st.integers(0, 2**31))
def test_never_more_bytes_than_before(seed):
    generator = torch.Generator().manual_seed(seed)
    b = [4, 8, 16][seed % 3]
    model = two_layers(hidden=int(torch.randint(b, 9 * b, (), generator=generator)), b=b, density=0.4, seed=seed)
    shut(model, torch.rand(len(model[1].width_gate), generator=generator) < [0.02, 0.3, 0.9][seed // 3 % 3])
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if "gate" not in n])
    model(torch.randn(4, 40)).square().sum().backward()
    optimizer.step()
    whole = copy.deepcopy(model)
    report = compact(model, optimizer)
    assert report.bytes[1] <= report.bytes[0]
    same_function(model, whole)


# --- training -------------------------------------------------------------------------------------------------------


def train(model, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(7, 40, generator=generator).to(next(model.parameters()))).square().sum().backward()
        optimizer.step()


class BlockScale(torch.optim.Optimizer):
    """Written here: one step size per block (or entry)."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["size"] = torch.zeros(len(p))
                state["size"].mul_(0.9).add_(p.grad.reshape(len(p), -1).norm(dim=1))
                p.sub_(group["lr"] * p.grad / (1 + state["size"].view([-1] + [1] * (p.dim() - 1))))


OPTIMIZERS = {
    "Adam": torch.optim.Adam,
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "Adagrad": torch.optim.Adagrad,
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True),
    "NAdam": torch.optim.NAdam,
    "written here": BlockScale,
}


def weights(model):
    return [p for n, p in model.named_parameters() if "gate" not in n]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_bit_for_bit_when_whole_blocks_leave(name):
    """float32, arbitrary numbers: the kernels add block by block, and blocks of dead units add nothing."""
    torch.set_num_threads(1)
    model = shut(two_layers(density=0.6), slice(16, 32))
    optimizer = OPTIMIZERS[name](weights(model))
    train(model, optimizer, 3, seed=1)
    whole, other = copy.deepcopy((model, optimizer))
    report = compact(model, optimizer)
    assert report.reblocked == {"0": "whole blocks"}
    kept = report.layers["0"].kept_units
    train(model, optimizer, 5, seed=2)
    train(whole, other, 5, seed=2)
    assert torch.equal(model[0].weight_dense(), whole[0].weight_dense()[kept])
    assert torch.equal(model[2].weight_dense(), whole[2].weight_dense()[:, kept])
    assert torch.equal(model[0].bias, whole[0].bias[kept])
    x = torch.randn(5, 40)
    assert torch.equal(model(x), whole(x))


@pytest.mark.parametrize("name", list(OPTIMIZERS)[:6])
def test_moments_follow_their_elements_when_re_blocked(name):
    model = shut(two_layers(), torch.arange(0, 64, 2)).double()
    optimizer = OPTIMIZERS[name](weights(model))
    train(model, optimizer, 3, seed=1)
    model(torch.randn(3, 40, dtype=torch.float64)).sum().backward()

    def dense(layer, tensor):
        twin = copy.deepcopy(layer)
        with torch.no_grad():
            twin.values.copy_(tensor)
        return twin.weight_dense().detach()

    before = {}
    for at in (0, 2):
        state = {**optimizer.state[model[at].values], "gradient": model[at].values.grad}
        before[at] = {k: dense(model[at], t) for k, t in state.items() if t is not None and t.dim() == 3}
    kept = compact(model, optimizer).layers["0"].kept_units
    assert len(kept) == 32
    for at in (0, 2):
        state = {**optimizer.state[model[at].values], "gradient": model[at].values.grad}
        for key, old in before[at].items():
            assert torch.equal(dense(model[at], state[key]), old[kept] if at == 0 else old[:, kept]), (at, key)
    whole_steps = [int(optimizer.state[p].get("step", 3)) for p in weights(model)]
    assert set(whole_steps) == {3}


def test_masked_fill_in_trains_as_before_and_trainable_fill_in_does_not():
    def fresh():  # a pattern whose second layer has fill-in
        model = shut(two_layers(density=0.5, dtype=torch.float64, seed=4), torch.arange(64) % 4 > 0)
        optimizer = torch.optim.Adam(weights(model))
        train(model, optimizer, 2, seed=1)
        return model, optimizer

    model, optimizer = fresh()
    whole, other = copy.deepcopy((model, optimizer))
    report = compact(model, optimizer)
    assert report.reblocked["0"].startswith("re-blocked") and report.fill_in[1] > 0
    train(model, optimizer, 5, seed=2)
    train(whole, other, 5, seed=2)
    kept = report.layers["0"].kept_units
    torch.testing.assert_close(model[0].weight_dense(), whole[0].weight_dense()[kept], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model[2].weight_dense(), whole[2].weight_dense()[:, kept], rtol=1e-9, atol=1e-12)

    model, optimizer = fresh()
    before = copy.deepcopy(model)
    report = compact(model, optimizer, fill_in="trainable")
    assert model[0].element_mask is None
    same_function(model, before, bound=1e-12)
    train(model, optimizer, 1, seed=2)
    assert model[0].values.count_nonzero() > report.parameters[1] * 0  # it trains
    assert (model[2].weight_dense() != 0).sum() > (
        before[2].weight_dense()[:, report.layers["0"].kept_units] != 0
    ).sum()


def test_an_optimizer_with_a_number_per_block_lets_only_whole_blocks_leave():
    model = shut(two_layers(), torch.arange(0, 64, 2))
    optimizer = BlockScale(weights(model))
    train(model, optimizer, 2, seed=1)
    assert compact(model, optimizer).removed == 0
    shut(model, slice(0, 8))
    sizes = optimizer.state[model[0].values]["size"].clone()
    assert compact(model, optimizer).layers["0"].after == 56
    assert torch.equal(optimizer.state[model[0].values]["size"], sizes[5:])  # the first of 8 block rows left


@given(st.integers(0, 2**31))
def test_a_number_per_block_survives_a_concatenation_across_blocks(seed):
    """Widths that are no multiples of the block: units of two layers share a block of the reader."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            generator = torch.Generator().manual_seed(seed)
            sizes = [int(torch.randint(3, 40, (), generator=generator)) for _ in range(2)]
            options = {"block_size": 8, "density": 1.0, "generator": generator}
            self.a, self.b = (sn.SparseLinear(16, n, **options) for n in sizes)
            self.gate = sn.TriStateReLU(
                sum(sizes), width_start=(torch.rand(sum(sizes), generator=generator) < 0.2).float()
            )
            self.c = sn.SparseLinear(sum(sizes), 8, **options)

        def forward(self, x):
            return self.c(self.gate(torch.cat([self.a(x), self.b(x)], 1)))

    model = Both()
    optimizer = BlockScale(weights(model))
    model(torch.randn(5, 16)).sum().backward()
    optimizer.step()
    whole, other = copy.deepcopy((model, optimizer))
    compact(model, optimizer)
    same_function(model, whole, 16)
    pattern, old = model.c.pattern, whole.c.pattern
    size = dict(zip(old.linear_places().tolist(), other.state[whole.c.values]["size"].tolist(), strict=True))
    first = {b[0, 0].item(): p for b, p in zip(whole.c.values, old.linear_places().tolist(), strict=True)}
    for block, moved in zip(model.c.values, optimizer.state[model.c.values]["size"].tolist(), strict=True):
        assert moved == size[first[block[0, 0].item()]]
    assert pattern.num_blocks == len(optimizer.state[model.c.values]["size"])


def test_existing_masks_go_along():
    generator = torch.Generator().manual_seed(0)
    pattern = BlockPattern.random((64, 40), 0.7, 8, generator)
    mask = torch.rand(pattern.num_blocks, 8, 8, generator=generator) < 0.5
    model = two_layers()
    model[0] = sn.SparseLinear(40, 64, pattern=pattern, element_mask=mask)
    shut(model, torch.arange(64) % 3 > 0)
    whole = copy.deepcopy(model)
    active = (whole[0].weight_dense() != 0)[model[1].width_gate > 0.5].sum()
    report = compact(model)
    assert report.layers["0"].after == 22 and model[0].num_active == active
    same_function(model, whole)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, 2, seed=1)
    assert model[0].values[~model[0].element_mask].abs().max() == 0


def test_the_same_parameter_objects_and_a_stale_graph_refuses():
    model = shut(two_layers(), slice(0, 16))
    identities = [id(p) for p in model.parameters()]
    loss = model(torch.randn(3, 40)).sum()
    compact(model)
    assert [id(p) for p in model.parameters()] == identities
    with pytest.raises(RuntimeError, match=r"rewired since this forward|modified by an inplace operation"):
        loss.backward()
    assert (model[0].out_features, model[2].in_features) == (48, 48)


def test_the_sparsifier_goes_on():
    model = shut(two_layers(density=0.5), slice(0, 16))
    optimizer = torch.optim.Adam(weights(model))
    sparsifier = sn.Sparsifier(model, optimizer, sn.RigL(drop_fraction=0.3), every=2)
    train(model, optimizer, 1, seed=1)
    sparsifier.step()
    compact(model, optimizer, sparsifier=sparsifier)
    for seed in range(5):
        train(model, optimizer, 1, seed=seed)
        update = sparsifier.step()
        if update is not None:
            assert update.dropped == update.grown > 0 and not any(u.skipped for u in update.layers.values())


def test_copies_follow_and_must_have_the_pattern():
    model = shut(two_layers(), slice(0, 16))
    average = torch.optim.swa_utils.AveragedModel(model)
    compact(model, copies=[average])
    same_function(average.module, model)
    shut(model, slice(0, 8))
    other = copy.deepcopy(model)
    other[0].set_pattern(BlockPattern.random(other[0].pattern.shape, 0.3, 8))
    with pytest.raises(CompactionError, match="must have the model's sizes and pattern"):
        compact(model, copies=[other])


def test_mixed_with_dense_layers_and_block_size_one():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 33),
        sn.TriStateReLU(33, width_start=(torch.rand(33) < 0.5).float()),
        sn.SparseLinear(33, 29, density=0.6, block_size=1),
        sn.TriStateReLU(29, width_start=(torch.rand(29) < 0.5).float()),
        sn.SparseLinear(29, 17, density=0.6, block_size=16, activation="silu"),
        nn.Linear(17, 3),
    )
    whole = copy.deepcopy(model)
    report = compact(model)
    assert report.layers["0"].after == int(whole[1].num_open()) and report.layers["2"].after <= 29
    same_function(model, whole, 12)


def test_a_layer_too_large_to_be_dense():
    """200,000 x 200,000: 160 GB as a dense matrix."""
    n = 200_000
    first = sn.SparseLinear(64, n, pattern=BlockPattern.random((n, 64), 0.1, 32))
    middle = sn.SparseLinear(n, n, pattern=BlockPattern.random((n, n), num_blocks=3000, block_size=32))
    model = nn.Sequential(first, nn.ReLU(), middle, nn.ReLU(), sn.SparseLinear(n, 10, density=0.05))
    whole, x = copy.deepcopy(model), torch.randn(2, 64)
    report = compact(model)
    assert report.removed > 300_000
    torch.testing.assert_close(model(x), whole(x))
