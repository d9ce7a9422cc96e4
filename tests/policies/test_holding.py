"""A Sparsifier within a budget of bytes: growth that ends there, budgets that fall, limits that tighten."""

import copy
import json
import logging
import pickle

import pytest
import torch

import sparsenet as sn
from sparsenet import distributed, limits
from sparsenet.policies import holding as holding_file
from sparsenet.policies.holding import Holding

MIB = 1 << 20


def network(density=0.3, sizes=(64, 256, 256, 10), block_size=16):
    torch.manual_seed(0)
    return sn.SparseMLP(sizes, density=density, block_size=block_size, distribution="uniform")


def train(model, optimizer, sparsifier, steps=1, rows=32):
    """Steps; what each of them returned."""
    torch.manual_seed(1)
    updates = []
    for _ in range(steps):
        loss = model(torch.randn(rows, model[0].in_features)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        updates.append(sparsifier.step())
    return updates


def made(density=0.3, policy=None, **kwargs):
    model = network(density)
    optimizer = torch.optim.AdamW(model.parameters())
    return model, optimizer, sn.Sparsifier(model, optimizer, policy or sn.RigL(0.3), **kwargs)


def counts(model):
    return [layer.pattern.num_blocks for layer in model]


def test_bytes_by_hand():
    model = sn.SparseMLP([32, 64], density=1.0, block_size=16)
    optimizer = torch.optim.AdamW(model.parameters())
    holding = Holding(model, {"0": model[0]}, [optimizer], {}, (), sn.MemoryBudget("1MiB"))
    block, blocks = 4 * 16 * 16, 8
    bias, steps = 4 * 64, 4
    assert holding.stays({"0": blocks}) == blocks * (4 * block + 24) + 4 * bias + steps
    moved = 3 * block  # values and two moments
    assert holding.room({"0": blocks}, share=0.25) == blocks * moved + 2 * (moved + 8) + 58 * blocks
    holding.seen["activations"] = 10 * MIB
    assert holding.bytes(share=0.25) == holding.stays({"0": blocks}) + 10 * MIB


def test_the_prediction_is_what_is_there():
    model, optimizer, sparsifier = made(budget="64MiB")
    predicted = sparsifier._holding.stays(sparsifier._holding.counts())
    train(model, optimizer, sparsifier)
    tensors = [t for p in model.parameters() for t in (p, p.grad, *optimizer.state[p].values())]
    there = sum(t.nbytes for t in tensors) + sum(24 * n for n in counts(model))
    assert abs(predicted - there) <= 4 * 3, "up to the counts of steps of the layers' values"


def test_growth_ends_at_the_budget():
    schedule = sn.Linear(0.3, 1.0, steps=10)
    model, optimizer, sparsifier = made(density=0.3, every=1)
    free = made(density=0.3)[0]
    budget = round(1.5 * made(budget="64MiB")[2].bytes)
    sparsifier = sn.Sparsifier(model, optimizer, sn.RigL(0.3), density=schedule, every=1, budget=budget)
    updates = []
    for _ in range(12):
        updates += train(model, optimizer, sparsifier)
        assert sparsifier.bytes <= budget
    assert sum(counts(free)) < sum(counts(model)) < 352, "it grew, and not to all places"
    assert 0.97 * budget < sparsifier.bytes
    assert any(layer.clamped for layer in updates[-2].layers.values())


def test_a_budget_that_is_lowered_takes_the_lowest_blocks_at_the_next_step(caplog):
    model, optimizer, sparsifier = made(every=1000, budget="64MiB")
    train(model, optimizer, sparsifier, steps=2)
    before = {name: (layer.pattern.linear_places(), layer.values.detach().clone()) for name, layer in enumerate(model)}
    moments = [optimizer.state[layer.values]["exp_avg"].clone() for layer in model]
    sparsifier.budget = int(0.6 * sparsifier.bytes)
    with caplog.at_level(logging.WARNING):
        sparsifier._states.follow()
        update = sparsifier.step()
    assert update.dropped > 0 and update.grown == 0
    assert 0.9 * sparsifier.budget.bytes < sparsifier.bytes <= sparsifier.budget.bytes
    assert len([r for r in caplog.records if "shrinks by" in r.message]) == 1
    for name, layer in enumerate(model):
        places, values = before[name]
        kept = torch.isin(places, layer.pattern.linear_places())
        assert torch.equal(layer.values.detach(), values[kept])
        assert torch.equal(optimizer.state[layer.values]["exp_avg"], moments[name][kept])
        if not bool(kept.all()):
            norms = values.flatten(1).square().sum(1)
            assert norms[~kept].median() < norms[kept].median()
    assert train(model, optimizer, sparsifier, steps=3) == [None] * 3, "it goes on, and nothing more leaves"


def test_all_layers_give_in_proportion():
    model, optimizer, sparsifier = made(density=1.0, every=1000, budget="64MiB")
    full = counts(model)
    sparsifier.budget = int(0.5 * sparsifier.bytes)
    train(model, optimizer, sparsifier)
    shares = [now / before for now, before in zip(counts(model), full, strict=True)]
    assert abs(shares[0] - shares[1]) < 0.03 and shares[0] < 0.6
    assert shares[2] == 1, "a row of blocks, and each reaches other inputs"


@pytest.mark.parametrize("policy", [sn.Static(), sn.SET(0.3), sn.GMP()], ids=lambda p: type(p).__name__)
def test_every_policy_shrinks(policy):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, lr=0.01)
    density = sn.Cubic(0.3, 0.25, steps=10) if isinstance(policy, sn.GMP) else None
    sparsifier = sn.Sparsifier(model, optimizer, policy, density=density, every=2, budget="64MiB")
    train(model, optimizer, sparsifier)
    sparsifier.budget = int(0.7 * sparsifier.bytes)
    updates = train(model, optimizer, sparsifier, steps=5)
    assert updates[0].dropped > 0 and sparsifier.bytes <= sparsifier.budget.bytes


def test_what_is_too_little_is_refused_and_nothing_changes():
    model, _, sparsifier = made(budget="64MiB")
    with pytest.raises(ValueError, match=r"Sparsifier: budget must be at least .* KiB for the sparsest .*, got 10 KiB"):
        sparsifier.budget = "10KiB"
    assert sparsifier.budget == sn.MemoryBudget("64MiB")
    with pytest.raises(ValueError, match="Sparsifier: budget must be at least"):
        sn.Sparsifier(model, None, sn.RigL(0.3), budget="10KiB")
    with pytest.raises(TypeError, match="MemoryBudget: amount must be text"):
        sparsifier.budget = 1.5
    sparsifier.budget = None
    assert sparsifier.budget is None and sparsifier.bytes is None


def test_activations_count_once_they_were_seen():
    model, optimizer, sparsifier = made(budget="64MiB")
    assert sparsifier._holding.seen["activations"] == 0
    with torch.no_grad():
        model(torch.randn(4, 64))
    assert sparsifier._holding.seen["activations"] == 0, "no backward follows"
    train(model, optimizer, sparsifier, rows=4096)
    assert sparsifier._holding.seen["activations"] == 4 * 4096 * 512
    assert sparsifier.bytes > 4 * 4096 * 512
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_the_hook_stays_with_its_model():
    model, _, sparsifier = made(budget="64MiB")
    twin, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (twin, again):
        other(torch.randn(4, 64)).sum().backward()
    assert sparsifier._holding.seen["activations"] == 0


def test_a_limit_that_tightens(monkeypatch, caplog):
    model, optimizer, sparsifier = made(density=0.8, every=1000, budget="64MiB")
    train(model, optimizer, sparsifier)
    room = sparsifier._holding.room(sparsifier._holding.counts(), 0.3)
    monkeypatch.setattr(holding_file, "process_limit", lambda: limits.Limit(room // 4, "cgroup /made"))
    before = sum(counts(model))
    update = train(model, optimizer, sparsifier)[0]
    assert update.dropped > 0 and sum(counts(model)) < before
    assert "cgroup /made leaves" in caplog.text
    assert train(model, optimizer, sparsifier) == [None], "what is left fits, with something to spare"


def test_where_nothing_more_can_go_it_is_said_once(caplog):
    model, optimizer, sparsifier = made(every=1000, budget="1MiB")
    least = [min(l.pattern.num_blocks, max(l.pattern.block_rows, l.pattern.block_cols)) for l in model]
    train(model, optimizer, sparsifier, steps=4, rows=4096)  # the activations alone are more
    assert counts(model) == least and sparsifier.bytes > 1 * MIB
    assert sum("no fewer blocks can be" in record.message for record in caplog.records) == 1


def test_a_limit_that_shows_nothing_of_what_was_given_up_makes_the_network_shrink_once(monkeypatch):
    model, optimizer, sparsifier = made(density=0.8, every=1000, budget="64MiB")
    monkeypatch.setattr(holding_file, "process_limit", lambda: limits.Limit(100 << 10, "RLIMIT_AS"))
    updates = train(model, optimizer, sparsifier, steps=4)
    assert [update is None for update in updates] == [False, True, True, True]
    monkeypatch.setattr(holding_file, "process_limit", lambda: limits.Limit(10 << 10, "RLIMIT_AS"))
    assert train(model, optimizer, sparsifier)[0].dropped > 0, "it tightened once more"


def test_memory_that_runs_out_in_a_rewire(monkeypatch, caplog):
    model, optimizer, sparsifier = made(every=2, budget="64MiB")
    train(model, optimizer, sparsifier)
    before, real = counts(model), sparsifier._rewire

    def fails():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    sparsifier._rewire = fails
    update = train(model, optimizer, sparsifier)[0]
    assert update.dropped > 0.2 * sum(before) and "memory ran out" in caplog.text
    sparsifier._rewire = real
    assert train(model, optimizer, sparsifier, steps=2)[1].grown > 0
    sparsifier.budget, sparsifier._rewire = None, fails
    with pytest.raises(RuntimeError, match="can't allocate"):
        train(model, optimizer, sparsifier, steps=2)


def test_scores_that_are_no_numbers_leave_first():
    class Broken(sn.RigL):
        def drop_scores(self, layer):
            return super().drop_scores(layer) * float("nan")

    model, optimizer, sparsifier = made(policy=Broken(0.0), every=1000, budget="64MiB")
    sparsifier.budget = int(0.7 * sparsifier.bytes)
    assert train(model, optimizer, sparsifier)[0].dropped > 0


def test_followers_go_along_and_count():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    average = torch.optim.swa_utils.AveragedModel(model)
    alone = sn.Sparsifier(model, optimizer, sn.RigL(0.3), budget="64MiB").bytes
    sparsifier = sn.Sparsifier(model, optimizer, sn.RigL(0.3), budget="64MiB", followers=[average])
    assert sparsifier.bytes >= alone + sum(layer.values.nbytes for layer in model)
    sparsifier.budget = int(0.7 * sparsifier.bytes)
    train(model, optimizer, sparsifier)
    assert all(a.pattern == b.pattern for a, b in zip(average.module, model, strict=True))


def test_frozen_layers_stay():
    model, optimizer, sparsifier = made(every=1000, budget="64MiB")
    model[1].requires_grad_(False)
    before = counts(model)
    sparsifier.budget = int(0.8 * sparsifier.bytes)
    model[0].requires_grad_(False)
    train(model, optimizer, sparsifier)
    assert counts(model)[:2] == before[:2]


def test_saved_and_resumed_bit_for_bit(tmp_path):
    def run(resume):
        model, optimizer, _ = made()
        how = {"density": sn.Linear(0.3, 1.0, steps=8), "every": 2, "budget": "3MiB", "grace": 1}
        sparsifier = sn.Sparsifier(model, optimizer, sn.RigL(0.3), **how)
        for step in range(10):
            if step == 5 and resume:
                sn.save(tmp_path / "run", model, optimizer, sparsifier)
                model, optimizer, _ = made(density=0.5)
                sparsifier = sn.Sparsifier(model, optimizer, sn.RigL(0.3), **{**how, "budget": None})
                sn.load(tmp_path / "run", model, optimizer, sparsifier)
                assert sparsifier.budget == sn.MemoryBudget("3MiB")
            if step == 7:
                sparsifier.budget = "1.5MiB"
            torch.manual_seed(step)
            train(model, optimizer, sparsifier)
        return model, sparsifier

    (straight, first), (resumed, second) = run(False), run(True)
    assert all(
        torch.equal(a, b) for a, b in zip(straight.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    states = first.state_dict(), second.state_dict()
    young = [{name: [places.tolist() for places in grown] for name, grown in s.pop("young").items()} for s in states]
    assert states[0] == states[1] and young[0] == young[1]


def test_states_without_a_budget_and_damaged_ones():
    _, _, sparsifier = made(budget="64MiB")
    state = sparsifier.state_dict()
    json.dumps(state)
    old = {key: value for key, value in state.items() if key not in ("budget", "seen_bytes")}
    sparsifier.load_state_dict(old)
    assert sparsifier.budget == sn.MemoryBudget("64MiB"), "what says nothing of a budget changes none"
    for change in ({"seen_bytes": {"activations": "many"}}, {"budget": 10}):
        with pytest.raises(ValueError, match="Sparsifier: "):
            sparsifier.load_state_dict(state | {"steps": 99} | change)
    assert sparsifier.steps == 0


def test_under_an_address_space_that_is_too_small_it_shrinks_and_finishes(run_child):
    said = run_child(
        """
        import resource, torch, sparsenet as sn, logging
        from sparsenet.limits import is_out_of_memory
        logging.basicConfig()
        torch.set_num_threads(1)
        sn.memory.release_freed_memory()
        torch.manual_seed(0)
        model = sn.SparseMLP([784, 2048, 2048, 10], density=0.6, block_size=32)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        sparsifier = sn.Sparsifier(model, optimizer, sn.RigL(0.3), every=2, budget="1GiB")
        x, y = torch.randn(64, 784), torch.arange(64) % 10
        def step():
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            return sparsifier.step()
        for _ in range(3):
            step()
        blocks = sum(layer.pattern.num_blocks for layer in model)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (20 << 20), resource.RLIM_INFINITY))
        for _ in range(8):
            step()
        print(blocks, sum(layer.pattern.num_blocks for layer in model), sparsifier.steps)
        """
    )
    before, after, steps = map(int, said.stdout.split())
    assert after < before and steps == 11
    assert "shrinks by" in said.stderr and "RLIMIT_AS" in said.stderr


def test_largest_of_a_single_rank():
    assert distributed.largest([3, -5]) == [3, -5]
    assert isinstance(made(budget="64MiB")[2]._holding, Holding)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_a_masks_bits_count_beside_the_indices(block_size):
    layer = sn.SparseLinear(64, 48, density=0.5, block_size=block_size)
    plain = holding_file._index_bytes(layer)
    layer.set_element_mask(0.5)
    assert holding_file._index_bytes(layer) - plain == layer.topology.mask_bits.nbytes / layer.pattern.num_blocks
