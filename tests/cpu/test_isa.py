"""Instruction sets: each that this machine has computes rightly when forced, and a wrong name is one clear line."""

from __future__ import annotations

import os

import pytest
import torch

import sparsenet as sn

KNOWN = ("avx512bf16", "avx512", "avx2", "portable")  # best first
AVAILABLE = sn.build_info()["isa_available"]

SUITE = """
    import sys
    import torch
    import sparsenet as sn
    from sparsenet import testing
    from sparsenet.testing import LinearCase

    isa = sys.argv[1]
    assert sn.build_info()["isa"] == isa
    dtypes = testing.DTYPES if isa == "portable" else (torch.float32, torch.bfloat16)  # the others run portably anyway
    checked = testing.self_test(dtypes=dtypes)
    for dtype in dtypes:
        for shape, block, batch, kind in (
            ((160, 2100), 32, 530, "few"), ((300, 200), 4, 513, "few"), ((64, 3000), 8, 1, "half"),
            ((70, 90), 16, 2100, "half"), ((300, 257), 128, 300, "half"), ((200, 130), 1, 300, "few"),
            ((130, 200), 64, 70, "dense"),
        ):
            for activation in ("relu", "gelu", "silu"):
                case = LinearCase(shape, block, dtype, batch, kind, activation, True, batch)
                testing.check_linear(case)
            testing.check_norms(case)
            testing.check_candidates(case)
        for batch in (1, 2, 3, 7, 8, 9, 16):  # small batches have kernels of their own
            for shape, block, kind in (((70, 300), 16, "half"), ((300, 70), 32, "dense"), ((200, 260), 128, "half")):
                testing.check_linear(LinearCase(shape, block, dtype, batch, kind, "silu", True, batch))
        # the same bits whatever the threads
        x, values, pattern, bias, grad_y = LinearCase((130, 257), 16, dtype, 50, "half", "none", True).operands()
        inputs = [t.requires_grad_() for t in (x, values, bias)]
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = sn.functional.block_sparse_linear(x, values, pattern, bias, "gelu")
            results.append((y, *torch.autograd.grad(y, inputs, grad_y)))
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0]))
        # not a number stays where it came in
        x = x.detach().clone()
        x[7, 3] = torch.nan
        y = sn.functional.block_sparse_linear(x, values, pattern, bias)
        reached = testing.dense_weight(torch.ones_like(values), pattern)[:, 3] == 1
        assert torch.equal(y.isnan()[7].view(-1, 130)[0], reached)
        assert not y[:7].isnan().any() and not y[8:].isnan().any()
        # float32 accumulation of many ones
        ones = torch.ones(3, 40_000, dtype=dtype)
        if dtype != torch.float16:
            pattern = sn.BlockPattern.random((16, 40_000), 1.0, 16)
            y = sn.functional.block_sparse_linear(ones, torch.ones(2500, 16, 16, dtype=dtype), pattern)
            assert (y == torch.tensor(40_000.0).to(dtype)).all()
    # a short training, to be compared between the sets
    torch.manual_seed(0)
    x, labels = torch.randn(64, 50), torch.randint(5, (64,))
    model = sn.SparseMLP([50, 70, 5], 0.5, 16, "gelu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(checked, loss.item())
"""


@pytest.fixture(scope="module")
def results():
    """Cases checked and the training's last loss, by instruction set, as far as the tests ran."""
    return {}


@pytest.mark.parametrize("isa", KNOWN)
def test_forced_instruction_set_computes_rightly(isa, run_child, results):
    if isa not in AVAILABLE:
        pytest.skip(f"this machine has no {isa}")
    checked, loss = run_child(SUITE, isa, SPARSENET_ISA=isa, timeout=300).stdout.split()
    assert int(checked) >= 7 * 2 * 9
    results[isa] = float(loss)
    assert max(results.values()) - min(results.values()) < 1e-3, "the same training ends elsewhere"


def test_the_best_set_runs_unless_told_otherwise(run_child):
    assert tuple(n for n in KNOWN if n in AVAILABLE) == tuple(AVAILABLE), "best first"
    if not os.environ.get("SPARSENET_ISA"):
        assert sn.build_info()["isa"] == AVAILABLE[0]
    code = 'import sparsenet as sn; print(sn.build_info()["isa"])'
    assert run_child(code, SPARSENET_ISA="").stdout.strip() == AVAILABLE[0]


def test_unknown_name_is_one_clear_line(run_child):
    name = "avx51"  # the beginning of two good ones
    child = run_child("import sparsenet", SPARSENET_ISA=name, check=False)
    assert child.returncode == 1
    last = child.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: SPARSENET_ISA: must be one of ") and last.endswith(f"got {name}")
    assert all(known in last for known in AVAILABLE)


@pytest.mark.parametrize("isa", [n for n in KNOWN if n not in AVAILABLE] or ["none missing"])
def test_unsupported_set_is_one_clear_line(isa, run_child):
    if isa == "none missing":
        pytest.skip("this machine has every instruction set")
    child = run_child("import sparsenet", SPARSENET_ISA=isa, check=False)
    last = child.stderr.strip().splitlines()[-1]
    assert child.returncode == 1 and last.startswith("ValueError: SPARSENET_ISA: ") and isa in last


def test_float64_and_float16_are_served_by_every_set():
    for dtype in (torch.float64, torch.float16):
        layer = sn.SparseLinear(64, 64, density=0.5, dtype=dtype)
        assert layer(torch.ones(3, 64, dtype=dtype)).dtype == dtype
