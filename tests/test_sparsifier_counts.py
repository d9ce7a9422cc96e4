"""How many blocks a Sparsifier leaves each layer: proportions, falling and rising densities, ramps that end."""

import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sparsenet as sn

pytestmark = pytest.mark.filterwarnings("ignore:Sparse(MLP|Linear)")


def counts(model):
    return [m.pattern.num_blocks for m in model.modules() if isinstance(m, sn.SparseLinear)]


def density_of(model):
    layers = [m for m in model.modules() if isinstance(m, sn.SparseLinear)]
    places = sum(m.pattern.block_rows * m.pattern.block_cols * m.block_size**2 for m in layers)
    return sum(m.values.numel() for m in layers) / places


@pytest.mark.parametrize("policy", [sn.SET(0.3), sn.GMP(), sn.Static()])
@pytest.mark.parametrize("distribution", [None, "uniform", "erdos_renyi"])
def test_row69_an_unchanged_density_changes_no_count(policy, distribution):
    """Also where rounding each layer for itself has left the whole a little off the density."""
    for model, density in (
        (sn.SparseMLP([784, 512, 512, 10], density=0.1), 0.1),
        (sn.SparseMLP([90, 70, 50, 10], density=[0.31, 0.29, 0.3], block_size=8), None),
    ):
        before = counts(model)
        density = density_of(model) if density is None else density
        sparsifier = sn.Sparsifier(model, None, policy, density=density, distribution=distribution, every=1)
        for _ in range(3):
            sparsifier.step()
            assert counts(model) == before


@given(
    st.lists(st.integers(1, 120), min_size=3, max_size=6),
    st.sampled_from([1, 4, 16, None]),
    st.floats(0.05, 1.0),
    st.floats(0.0, 1.0),
    st.integers(1, 7),
    st.sampled_from([None, "uniform", "erdos_renyi"]),
    st.sampled_from([sn.GMP(), sn.SET(0.3)]),
)
@pytest.mark.filterwarnings("ignore:Sparsifier")
def test_row69_counts_never_rise_while_the_density_falls(sizes, block, start, share, every, distribution, policy):
    model = sn.SparseMLP(sizes, start, block)
    schedule = sn.Cubic(start, start * share, steps=20)
    sparsifier = sn.Sparsifier(model, None, policy, schedule, distribution, every)
    before = counts(model)
    for step in range(1, 28):
        sparsifier.step()
        now = counts(model)
        assert all(a <= b for a, b in zip(now, before, strict=True)), f"step {step}: {before} -> {now}"
        before = now
    layers = list(model)
    places = [m.pattern.block_rows * m.pattern.block_cols * m.block_size**2 for m in layers]
    least = sum(m.block_size**2 for m in layers) if start * share else 0
    wanted = max(start * share * sum(places), least)
    assert sum(m.values.numel() for m in layers) <= max(wanted, least) + max(m.block_size**2 for m in layers)


def test_row69_a_network_and_its_sparsifier_agree_on_the_proportions():
    """Erdos-Renyi by the constructor, halved twice: every layer is halved, not only the largest ones."""
    model = sn.SparseMLP([256, 512, 256, 128], density=0.4, block_size=16)
    before = counts(model)
    sparsifier = sn.Sparsifier(model, None, sn.GMP(), sn.Linear(0.4, 0.1, 4), every=2)
    sparsifier.step(), sparsifier.step()
    assert counts(model) == pytest.approx([n * 0.25 / 0.4 for n in before], abs=1)
    sparsifier.step(), sparsifier.step()
    assert counts(model) == pytest.approx([n / 4 for n in before], abs=1)


def test_row69_proportions_survive_saving_and_resuming(tmp_path):
    def make():
        model = sn.SparseMLP([256, 512, 256, 128], 0.4, 16, generator=torch.Generator().manual_seed(1))
        return model, sn.Sparsifier(model, None, sn.GMP(), sn.Linear(0.4, 0.1, 40), every=2)

    whole, resumed = make(), make()
    for _ in range(10):
        whole[1].step()
    sn.save(tmp_path / "a.safetensors", whole[0], sparsifier=whole[1])
    sn.load(tmp_path / "a.safetensors", resumed[0], sparsifier=resumed[1])
    for _ in range(30):
        whole[1].step(), resumed[1].step()
        assert counts(whole[0]) == counts(resumed[0])


def test_row69_rising_densities_take_nothing_from_a_layer():
    model = sn.SparseMLP([256, 512, 256, 128], density=0.1, block_size=16)
    before = counts(model)
    sparsifier = sn.Sparsifier(model, None, sn.SET(0.2), sn.Linear(0.1, 0.3, 10), "uniform", every=1)
    for _ in range(10):
        sparsifier.step()
        now = counts(model)
        assert all(a >= b for a, b in zip(now, before, strict=True))
        before = now
    assert density_of(model) == pytest.approx(0.3, abs=0.002)


def test_row69_totals_count_weights_where_block_sizes_differ():
    model = nn.Sequential(
        sn.SparseLinear(512, 256, density=0.5, block_size=32),
        nn.ReLU(),
        sn.SparseLinear(256, 100, density=0.5, block_size=4),
    )
    sparsifier = sn.Sparsifier(model, None, sn.GMP(), sn.Linear(0.5, 0.125, 10), every=5)
    for _ in range(10):
        sparsifier.step()
    assert density_of(model) == pytest.approx(0.125, abs=0.5 * 32**2 / (512 * 256))
    assert model[0].density == pytest.approx(0.125, abs=0.01) and model[2].density == pytest.approx(0.125, abs=0.01)


# --- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "end", "steps"), [(30, None, 120), (30, 100, 100), (7, 100, 100), (100, 100, 100), (64, None, 128)]
)
def test_row70_the_last_density_is_reached(every, end, steps):
    """A ramp of 100 steps: at the first rewire after it, or at the last one before the end."""
    model = sn.SparseMLP([256, 256, 256], density=0.5, block_size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsifier = sn.Sparsifier(model, None, sn.GMP(), sn.Cubic(0.5, 0.1, 100), every=every, end=end)
    for _ in range(steps):
        sparsifier.step()
    assert density_of(model) == pytest.approx(0.1, abs=0.0005)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": sn.SET(), "every": 100, "end": 50}, "no step rewires: begin 0 \\+ every 100 lies beyond end 50"),
        ({"policy": sn.RigL(), "every": 10, "begin": 95, "end": 100}, "no step rewires"),
        ({"policy": sn.GMP()}, "GMP needs a density schedule: without one it changes nothing"),
        (
            {"policy": sn.GMP(), "density": sn.Linear(0.5, 0.1, 100), "every": 10, "end": 50},
            "end 50 cuts the density schedule off at 0.3; it would reach 0.1 at step 100",
        ),
        (
            {"policy": sn.GMP(), "sparsity": sn.Linear(0.5, 0.9, 100), "every": 10, "end": 50},
            "end 50 cuts the density schedule off at 0.3; it would reach 0.1 at step 100",
        ),
    ],
)
def test_row70_a_schedule_that_never_acts_or_is_cut_warns_once(arguments, message):
    model = sn.SparseMLP([64, 64, 64], density=0.5, block_size=8)
    with pytest.warns(UserWarning, match=message) as seen:
        sparsifier = sn.Sparsifier(model, None, **arguments)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            sparsifier.step()


def test_row70_what_is_meant_to_stay_still_does_not_warn():
    model = sn.SparseMLP([64, 64, 64], density=0.5, block_size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sn.Sparsifier(model, None, sn.Static(), end=0)
        sn.Sparsifier(model, None, sn.SET(0.0))
        sn.Sparsifier(model, None, sn.SET(0.3), sn.Linear(0.5, 0.1, 100), every=10, end=100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.5}, "sparsity must lie in \\[0, 1\\], got 1.5"),
        ({"sparsity": -0.1}, "sparsity must lie in \\[0, 1\\], got -0.1"),
        ({"density": sn.Linear(0.5, 1.5, 2), "every": 2}, "density must lie in \\[0, 1\\], got 1.5 at step 2"),
        ({"sparsity": sn.Linear(0.5, 1.5, 2), "every": 2}, "density must lie in \\[0, 1\\], got -0.5 at step 2"),
        (
            {"distribution": "erk2"},
            "distribution must be None, one of uniform, erdos_renyi, er, erk, memory, global, "
            "relative densities by layer name or a function that returns "
            "them, got 'erk2'",
        ),
    ],
)
def test_row84_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sn.Sparsifier(sn.SparseMLP([64, 64], density=0.5, block_size=8), None, sn.SET(), **arguments).step()


def test_row69_a_policy_that_grows_nothing_refuses_a_rising_density_at_once():
    with pytest.raises(ValueError, match="GMP: density must not increase: this policy grows nothing"):
        sn.Sparsifier(
            sn.SparseMLP([64, 64], density=0.5, block_size=8), None, sn.GMP(), sn.Linear(0.5, 0.9, 10), every=1
        )
    sparse = sn.SparseMLP([64, 64], density=0.25, block_size=8)
    sparsifier = sn.Sparsifier(sparse, None, sn.GMP(), sn.Linear(0.5, 0.1, 10), every=1)  # begins above what there is
    before = counts(sparse)
    for _ in range(4):
        sparsifier.step()
        assert counts(sparse) == before
    for _ in range(6):
        sparsifier.step()
    assert density_of(sparse) == pytest.approx(0.1, abs=0.01)


# --- coverage -------------------------------------------------------------------------------------------------------


@given(
    st.integers(2, 12), st.integers(2, 12), st.floats(0.1, 1.0), st.sampled_from(["set", "rigl"]), st.integers(0, 999)
)
@pytest.mark.filterwarnings("ignore:Sparsifier")
def test_row81_every_rewire_keeps_rows_and_columns_reached(height, width, density, policy, seed):
    pattern = sn.BlockPattern.random((height * 4, width * 4), density, 4, torch.Generator().manual_seed(seed))
    layer = sn.SparseLinear(width * 4, height * 4, pattern=pattern)
    policy = {"set": sn.SET(0.7), "rigl": sn.RigL(0.7)}[policy]
    sparsifier = sn.Sparsifier(layer, None, policy, every=1, seed=seed)
    for _ in range(4):
        layer(torch.randn(5, width * 4)).square().sum().backward()
        update = sparsifier.step().layers[""]
        assert update.num_blocks == pattern.num_blocks
        outputs, inputs = layer.pattern.unreached()
        if pattern.num_blocks >= height:
            assert outputs == 0
        if pattern.num_blocks >= width:
            assert inputs == 0


def test_row81_a_falling_density_keeps_reaching_all_as_long_as_it_can():
    layer = sn.SparseLinear(64, 64, density=1.0, block_size=8)
    sparsifier = sn.Sparsifier(layer, None, sn.GMP(), sn.Linear(1.0, 0.0, 8), every=1)
    reached = []
    with pytest.warns(UserWarning) as seen:
        for _ in range(8):
            sparsifier.step()
            reached.append((layer.pattern.num_blocks, *layer.pattern.unreached()))
    assert [n for n, *_ in reached] == [56, 48, 40, 32, 24, 16, 8, 0]
    assert all(dead == [0, 0] for n, *dead in reached if n >= 16)  # of 8 rows and columns
    assert reached[-1] == (0, 64, 64)
    said = [str(w.message) for w in seen if "have no weight" in str(w.message)]
    assert len(said) == 1 and "outputs and" in said[0] and "use smaller blocks or a higher density" in said[0]


def test_row81_an_output_behind_a_relu_stays_alive_under_rigl():
    """One block per row: without coverage rewires empty rows, whose gradient behind the ReLU is zero for ever."""
    torch.manual_seed(0)
    model = sn.SparseMLP([256, 512, 10], density=[0.03, 0.5], block_size=16)
    assert model[0].pattern.num_blocks < 1.0 * model[0].pattern.block_rows
    model = sn.SparseMLP([256, 512, 10], density=[0.07, 0.5], block_size=16)
    assert model[0].pattern.unreached()[0] == 0
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    sparsifier = sn.Sparsifier(model, optimizer, sn.RigL(0.5), every=1)
    x, y = torch.randn(64, 256), torch.randint(10, (64,))
    held = 0
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        held += sparsifier.step().layers["0"].held
        assert model[0].pattern.unreached() == (0, 0)
    assert held > 0


def test_row81_constructors_reach_all_or_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = sn.SparseLinear(512, 512, density=0.1)
    assert layer.pattern.unreached() == (0, 0)
    with pytest.warns(
        UserWarning, match=r"SparseLinear: 0 of 10 outputs and 88 of 128 inputs have no weight with 10 blocks"
    ):
        layer = sn.SparseLinear(128, 10)
    assert layer.block_size == 4 and layer.pattern.num_blocks == 10 and layer(torch.randn(3, 128)).abs().max() > 0
    message = (
        r"48 of 64 outputs and 48 of 64 inputs have no weight with 1 blocks of 16 x 16; block_size=4 would reach all"
    )
    with pytest.warns(UserWarning, match=message):
        sn.SparseLinear(64, 64, density=0.0625, block_size=16)
    with pytest.warns(UserWarning, match=r"SparseMLP: layer 0: .*; layer 1: .* would reach all") as seen:
        sn.SparseMLP([64, 64, 64], density=0.1, block_size=16)
    assert len(seen) == 1
    with pytest.warns(UserWarning, match=r"sparsify_: layer 0: 0 of 16 outputs and 96 of 128 inputs"):
        sn.sparsify_(nn.Sequential(nn.Linear(128, 16)), 0.25, 16)
    pattern = sn.BlockPattern.from_places(torch.tensor([0]), torch.tensor([0]), (64, 64), 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sn.SparseLinear(64, 64, pattern=pattern)  # who names a pattern knows it


@pytest.mark.parametrize(
    ("fan_in", "density", "block"),
    [
        (4096, 0.1, 32),
        (960, 0.1, 32),
        (959, 0.1, 16),
        (784, 0.05, 8),
        (128, 0.1, 4),
        (64, 0.1, 4),
        (40, 0.1, 1),
        (7, 0.0, 1),
    ],
)
def test_row81_block_size_none_leaves_rows_of_blocks_enough(fan_in, density, block):
    """density * fan_in / block_size >= 3, by hand: 960 * 0.1 / 32 = 3, 959 falls short of it; 64 * 0.1 / 4 = 1.6."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert sn.SparseLinear(fan_in, 64, density=density).block_size == block
        assert sn.SparseMLP([fan_in, 64, 64], density=density)[0].block_size == block
        model = nn.Sequential(nn.Linear(fan_in, 64))
        sn.sparsify_(model, density)
        assert model[0].block_size == block
        assert sn.SparseLinear.from_linear(nn.Linear(fan_in, 64), density=density).block_size == block
        assert sn.plan([fan_in, 64, 64], None, density=density).block_sizes[0] == block


def test_row81_a_chosen_block_size_stays_for_the_layers_life():
    model = sn.SparseMLP([512, 256, 10], density=0.5)
    sides = [layer.block_size for layer in model]
    sparsifier = sn.Sparsifier(model, None, sn.GMP(), sn.Linear(0.5, 0.2, 4), every=1)
    for _ in range(4):
        sparsifier.step()
    assert [layer.block_size for layer in copy.deepcopy(model)] == sides
