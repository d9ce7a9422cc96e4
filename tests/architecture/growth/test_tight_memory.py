"""Limits that tighten in mid-training: the network shrinks, says so, and goes on."""

from __future__ import annotations

import sys

import pytest

# Else the heap may hold on to what a step needs, and nothing has to go.
EVERY_TENSOR_ITS_OWN_PAGES = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

TRAINING = """
    import logging, resource, sys, torch
    import sparsenet as sn
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(message)s")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    width, rows = 3000, 64
    model = torch.nn.Sequential(torch.nn.Linear(784, width), torch.nn.ReLU(), torch.nn.Linear(width, 10))
    optimizer = torch.optim.Adam(model.parameters(), fused=True)  # takes nothing for a moment
    grower = sn.Grower(model, optimizer, "1GiB", every=64, levels=("units",), idle=0.0, parameters=2_400_000)
    x, y = torch.randn(rows, 784), torch.arange(rows) % 10

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    def steps(count):
        for _ in range(count):
            loss = grower.attempt(closure)
            optimizer.step()
            grower.step(loss)
        return loss.item()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and RLIMIT_AS")
def test_an_address_space_that_tightens(run_child):
    said = run_child(
        TRAINING
        + """
    steps(3)
    before = model[0].out_features
    optimizer.zero_grad(set_to_none=True)
    sn.memory.release_freed_memory()
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (6 << 20), resource.RLIM_INFINITY))
    last = steps(20)
    print("finished", before, model[0].out_features, last == last, sum(e.pruned for e in grower.events))
    """,
        **EVERY_TENSOR_ITS_OWN_PAGES,
    ).stdout
    assert "shrinks from" in said
    finished = said.split("finished")[1].split()
    assert int(finished[1]) < int(finished[0])
    assert finished[2] == "True" and int(finished[3]) > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_a_halved_budget_halves_the_measured_peak(run_child):
    said = run_child(
        TRAINING
        + """
    def peak():
        optimizer.zero_grad(set_to_none=True)
        sn.memory.release_freed_memory()
        with sn.measure_peak() as measured:
            steps(3)
        state = sum(t.nbytes for p in model.parameters() for t in (p, *optimizer.state[p].values()))
        return measured.bytes + state, grower.bytes
    steps(3)
    first = peak()
    grower.budget = grower.bytes // 2
    steps(2)
    print("peaks", *first, *peak(), grower.budget(0))
    """
    ).stdout
    before, told, after, told_after, budget = (float(n) for n in said.split("peaks")[1].split())
    assert told_after <= budget <= told / 2
    assert after < 0.65 * before
    assert after < 1.2 * budget  # of what a step takes above weights and state, and those
