"""Two gloo processes do what one does at the same global batch, and stop when they cannot."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import make

WORKER = Path(__file__).with_name("distributed_worker.py")


def launch(case, world, folder):
    """Runs every rank; returns exit codes, stderr texts and the saved state dicts (None where a rank failed)."""
    out, store = folder / f"{case}-{world}", folder / f"store-{case}-{world}"
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), case, str(rank), str(world), str(store), str(out)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    states = [torch.load(f"{out}.{r}", weights_only=True) if p.returncode == 0 else None for r, p in enumerate(ranks)]
    return [p.returncode for p in ranks], errors, states


SLOWER = [
    pytest.param(case, marks=pytest.mark.slow)
    for case in ("same-set", "synchronized-rigl", "same-fisher", "same-taylor")
]


@pytest.mark.parametrize("case", ["same-rigl", "synchronized-gmp", "same-woodfisher", *SLOWER])
def test_two_processes_train_as_one(case, tmp_path):
    codes, errors, two = launch(case, 2, tmp_path)
    assert codes == [0, 0], errors
    _, errors, (one,) = launch(case, 1, tmp_path)
    for key in one:
        assert torch.equal(two[0][key], two[1][key]), key
        if key.endswith("indices"):
            assert torch.equal(two[0][key], one[key]), key
        else:
            torch.testing.assert_close(two[0][key], one[key], atol=2e-4, rtol=2e-3)


def test_two_processes_grow_as_one(tmp_path):
    """SNFS draws its candidates by the seed on several ranks and by energies on one: the numbers are the same."""
    codes, errors, two = launch("growth-x", 2, tmp_path)
    assert codes == [0, 0], errors
    codes, errors, (one,) = launch("growth-x", 1, tmp_path)
    assert codes == [0], errors
    assert two[0].keys() == two[1].keys() == one.keys() and any(key.endswith("element_rule") for key in one)
    for key, expected in one.items():
        assert torch.equal(two[0][key], two[1][key]), key
        if key.startswith("snfs."):
            assert two[0][key].shape == expected.shape, key
        elif expected.is_floating_point():
            torch.testing.assert_close(two[0][key], expected, atol=2e-4, rtol=2e-3, msg=key)
        else:
            assert torch.equal(two[0][key], expected), key


def test_ranks_agree_on_the_smallest_budget(tmp_path):
    codes, errors, (first, second) = launch("budget-rigl", 2, tmp_path)
    assert codes == [0, 0], errors
    for key in first:
        assert torch.equal(first[key], second[key]), key


def test_synchronize_gives_every_rank_the_network_of_rank_0(tmp_path):
    codes, errors, (first, second) = launch("alike-x", 2, tmp_path)
    assert codes == [0, 0], errors
    expected = make(seed=0).state_dict()
    assert not torch.equal(expected["1.bias"], make(seed=1).state_dict()["1.bias"]), "rank 1 began with another network"
    for key in expected:
        assert torch.equal(first[key], expected[key]) and torch.equal(second[key], expected[key]), key


def test_synchronize_gives_every_rank_the_masks_of_rank_0(tmp_path):
    codes, errors, (first, second) = launch("alike-2:4", 2, tmp_path)
    assert codes == [0, 0], errors
    assert first["1.element_rule"].tolist() == [2, 4] and "2.element_mask" not in first
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


@pytest.mark.parametrize("what", ["x", "mask"])
def test_a_diverged_topology_is_stopped_by_layer_name(tmp_path, what):
    codes, errors, _ = launch(f"diverged-{what}", 2, tmp_path)
    assert all(codes)
    for text in errors:
        assert "the topology of layer 1 must be the same on every rank, rank 1 differs from rank 0" in text


def test_the_decision_to_rewire_is_agreed(tmp_path):
    codes, errors, _ = launch("decision-x", 2, tmp_path)
    assert all(codes)
    assert "the decision to rewire must be the same on every rank" in errors[0]


def test_plain_ddp_refuses_another_number_of_blocks(tmp_path):
    codes, errors, _ = launch("refused-gmp", 2, tmp_path)
    assert all(codes)
    assert "the number of blocks of layer 0 must not change under DistributedDataParallel" in errors[0]


@pytest.mark.slow
def test_a_rank_dies_and_the_run_resumes_at_any_world_size(tmp_path):
    """ROBUSTNESS 62."""
    codes, errors, _ = launch("dies-x", 2, tmp_path)
    assert codes[1] == 9 and codes[0] not in (0, None), errors
    _, errors, (whole,) = launch("same-rigl", 1, tmp_path)
    for world in (1, 2):
        codes, errors, states = launch("resumes-x", world, tmp_path)
        assert codes == [0] * world, errors
        for key, expected in whole.items():
            if key.endswith("indices"):
                assert torch.equal(states[0][key], expected), key
            else:
                torch.testing.assert_close(states[0][key], expected, atol=2e-4, rtol=2e-3)
