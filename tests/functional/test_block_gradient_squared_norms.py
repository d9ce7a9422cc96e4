"""Norms of the dense gradient's blocks, and the gradient at a list of candidate blocks: right, small, checked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsenet as sn
from sparsenet import reference, testing
from sparsenet.functional import block_gradient_squared_norms, candidate_gradients
from sparsenet.testing import LinearCase, check_candidates, check_norms, linear_cases

SIZES = {"shape": st.tuples(st.integers(1, 90), st.integers(1, 90)), "batch": st.integers(0, 70)}


def operands(batch=6, shape=(33, 70), dtype=torch.float32):
    return torch.randn(batch, shape[1]).to(dtype), torch.randn(batch, shape[0]).to(dtype)


# --- right ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("block_size", sn.pattern.BLOCK_SIZES)
@pytest.mark.parametrize("check", [check_norms, check_candidates])
def test_matches_float64(check, block_size, dtype):
    for case in linear_cases([block_size], [dtype]):
        check(case)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("check", [check_norms, check_candidates])
@pytest.mark.parametrize(
    ("shape", "block_size", "batch"),
    [((200, 4096), 32, 700), ((520, 1030), 4, 513), ((300, 257), 128, 600), ((64, 3000), 8, 1), ((40, 40), 16, 5000)],
)
def test_large_cases_match_float64(shape, block_size, batch, check, dtype):
    for threads in (1, 2):
        torch.set_num_threads(threads)
        check(LinearCase(shape, block_size, dtype, batch, "none", "none", False, threads))


@pytest.mark.parametrize("check", [check_norms, check_candidates])
@given(
    **SIZES,
    block_size=st.sampled_from(sn.pattern.BLOCK_SIZES),
    dtype=st.sampled_from(testing.DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_case_matches_float64(check, shape, batch, block_size, dtype, seed):
    check(LinearCase(shape, block_size, dtype, batch, "none", "none", False, seed))


def test_by_hand():
    """dz^T x = [[1, 2, 3], [10, 20, 30]] for one example: blocks of 1 are its squares."""
    x, grad = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 10.0]])
    for module in (sn.functional, reference):
        assert module.block_gradient_squared_norms(x, grad, 1).tolist() == [[1, 4, 9], [100, 400, 900]]
        assert module.block_gradient_squared_norms(x, grad, 4).tolist() == [[1414]]
        assert module.block_gradient_squared_norms(x, grad, 1, (1, 2)).tolist() == [[100, 400, 900]]
        blocks = module.candidate_gradients(x, grad, torch.tensor([1, 0, 1]), torch.tensor([2, 0, 2]), 1)
        assert blocks.flatten().tolist() == [30, 1, 30]
        whole = module.candidate_gradients(x, grad, torch.tensor([0]), torch.tensor([0]), 4)
        assert whole.tolist() == [[[1, 2, 3, 0], [10, 20, 30, 0], [0] * 4, [0] * 4]]


def test_reference_matches_the_dense_gradient():
    x, grad = operands(dtype=torch.float64)
    blocks = testing.blocks_of(grad.T @ x, 16)
    torch.testing.assert_close(
        reference.block_gradient_squared_norms(x, grad, 16), blocks.square().sum((2, 3)).float(), rtol=1e-6, atol=0
    )
    rows, cols = torch.tensor([2, 0, 1]), torch.tensor([4, 1, 0])
    torch.testing.assert_close(reference.candidate_gradients(x, grad, rows, cols, 16), blocks[rows, cols])


@pytest.mark.parametrize("block_size", [1, 8, 32])
def test_agrees_with_the_layers_own_gradient(block_size):
    """Where a block is active, its candidate gradient is the gradient of its values, and the norm is its norm."""
    layer = sn.SparseLinear(70, 33, density=0.4, block_size=block_size)
    x = torch.randn(40, 70)
    y = layer(x)
    grad_y = torch.randn_like(y)
    y.backward(grad_y)
    p = layer.pattern
    blocks = candidate_gradients(x, grad_y, p.row_indices, p.col_indices, block_size)
    torch.testing.assert_close(blocks, layer.values.grad)
    norms = block_gradient_squared_norms(x, grad_y, block_size)[p.row_indices.long(), p.col_indices.long()]
    torch.testing.assert_close(norms, layer.values.grad.square().sum((1, 2)))


def test_the_checks_notice(monkeypatch):
    case = LinearCase((33, 70), 16, torch.float32, 7, "half", "none", False)
    norms, candidates = block_gradient_squared_norms, candidate_gradients
    wrong_norms = [
        lambda x, g, b, r=None: norms(x, g, b, r) * 1.001,
        lambda x, g, b, r=None: norms(x[:-1], g[:-1], b, r),
        lambda x, g, b, r=None: norms(x, g, b, r).sqrt(),
        lambda x, g, b, r=None: norms(x, g, b) if r is None else norms(x, g, b, r).flip(0),
    ]
    for wrong in wrong_norms:
        monkeypatch.setattr(sn.functional, "block_gradient_squared_norms", wrong)
        with pytest.raises(AssertionError, match="norms"):
            check_norms(case)
    for wrong in (
        lambda x, g, r, c, b: candidates(x, g, r, c, b).mT,
        lambda x, g, r, c, b: candidates(x, g, r, c, b).flip(0),
    ):
        monkeypatch.setattr(sn.functional, "candidate_gradients", wrong)
        with pytest.raises(AssertionError, match="candidates"):
            check_candidates(case)


# --- operands -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_layouts_give_the_same_bits(dtype):
    x, grad = operands(dtype=dtype)
    rows, cols = torch.tensor([2, 0, 1]), torch.tensor([4, 1, 0])
    layouts = [
        lambda t: t.t().contiguous().t(),
        lambda t: torch.stack([t, t * torch.nan], 2)[..., 0],
        lambda t: torch.cat([t.new_full((1,), torch.nan), t.flatten()])[1:].view(t.shape),
        lambda t: torch.nn.functional.pad(t, (0, 3), value=torch.nan)[:, : t.shape[1]],
        lambda t: t.view(2, 3, -1),
    ]
    norms, blocks = block_gradient_squared_norms(x, grad, 16), candidate_gradients(x, grad, rows, cols, 16)
    for layout in layouts:
        moved = layout(x), layout(grad)
        assert torch.equal(block_gradient_squared_norms(*moved, 16), norms)
        assert torch.equal(candidate_gradients(*moved, rows, cols, 16), blocks)
    expanded = x[:1].expand(6, -1), grad[:1].expand(6, -1)
    copies = tuple(t.contiguous() for t in expanded)
    assert torch.equal(block_gradient_squared_norms(*expanded, 16), block_gradient_squared_norms(*copies, 16))


def test_gradients_are_not_tracked():
    x, grad = (t.requires_grad_() for t in operands())
    assert not block_gradient_squared_norms(x, grad, 16).requires_grad
    assert not candidate_gradients(x, grad, torch.tensor([0]), torch.tensor([0]), 16).requires_grad


@pytest.mark.parametrize("block_size", [1, 4, 16, 64])
def test_bit_identical_whatever_the_threads(block_size):
    x, grad = operands(100, (130, 257))
    rows, cols = torch.randint(130 // block_size, (50,)), torch.randint(257 // block_size, (50,))
    torch.set_num_threads(1)
    expected = block_gradient_squared_norms(x, grad, block_size), candidate_gradients(x, grad, rows, cols, block_size)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(block_gradient_squared_norms(x, grad, block_size), expected[0])
        assert torch.equal(candidate_gradients(x, grad, rows, cols, block_size), expected[1])


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
@pytest.mark.parametrize("block_size", [1, 8, 16])
def test_nan_and_inf_stay_in_their_row_and_column(block_size, special):
    x, grad = operands()
    x[3, 40] = special
    norms = block_gradient_squared_norms(x, grad, block_size)
    assert torch.equal(~norms.isfinite(), (torch.arange(norms.shape[1]) == 40 // block_size).expand_as(norms))
    x, grad = operands()
    grad[2, 20] = special
    norms = block_gradient_squared_norms(x, grad, block_size)
    assert torch.equal(~norms.isfinite(), (torch.arange(norms.shape[0]) == 20 // block_size)[:, None].expand_as(norms))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (33, 70)])
@pytest.mark.parametrize("batch", [0, 3])
def test_empty_operands(shape, batch):
    x, grad = operands(batch, shape)
    norms = block_gradient_squared_norms(x, grad, 16)
    assert norms.shape == (-(-shape[0] // 16), -(-shape[1] // 16)) and (batch > 0 or not norms.any())
    none = torch.empty(0, dtype=torch.int64)
    assert candidate_gradients(x, grad, none, none, 16).shape == (0, 16, 16)
    assert block_gradient_squared_norms(x, grad, 16, (0, 0)).shape == (0, norms.shape[1])


def test_places_may_repeat_and_come_in_any_order():
    x, grad = operands()
    rows, cols = torch.tensor([2, 0, 2, 1, 0, 2]), torch.tensor([4, 1, 0, 3, 1, 4])
    together = candidate_gradients(x, grad, rows, cols, 16)
    for i in range(6):
        assert torch.equal(candidate_gradients(x, grad, rows[i : i + 1], cols[i : i + 1], 16)[0], together[i])
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(candidate_gradients(x, grad, rows.to(dtype), cols.to(dtype), 16), together)
    strided = torch.stack([rows, cols], 1)
    assert torch.equal(candidate_gradients(x, grad, strided[:, 0], strided[:, 1], 16), together)


# --- memory ---------------------------------------------------------------------------------------------------------


def test_the_dense_gradient_is_never_stored(run_child):
    """16384 x 16384: dense 1 GiB; measured growth of the resident high-water mark a few megabytes."""
    child = run_child(
        """
        import torch, sparsenet as sn
        from sparsenet.functional import block_gradient_squared_norms, candidate_gradients
        def high_water():
            lines = open("/proc/self/status").read().splitlines()
            return int(next(l for l in lines if l.startswith("VmHWM")).split()[1]) // 1024
        n = 16384
        x, grad = torch.randn(16, n), torch.randn(16, n)
        block_gradient_squared_norms(x[:, :64], grad[:, :64], 32)  # warm up
        for dtype in (torch.float32, torch.bfloat16):
            a, b = x.to(dtype), grad.to(dtype)
            for op in (
                lambda: block_gradient_squared_norms(a, b, 32),
                lambda: block_gradient_squared_norms(a, b, 128, (5, 9)),
                lambda: candidate_gradients(a, b, torch.arange(512), torch.arange(512), 32),
            ):
                open("/proc/self/clear_refs", "w").write("5")
                before = high_water()
                op()
                print(high_water() - before)
        """
    )
    grown = [int(line) for line in child.stdout.split()]
    assert len(grown) == 6 and max(grown) < 32, grown


# --- refused --------------------------------------------------------------------------------------------------------


def test_every_message():
    x, grad = operands()
    norms = "block_gradient_squared_norms: "
    bad = [
        (TypeError, (x.int(), grad, 16), "x must be float32, bfloat16, float16 or float64, got torch.int32"),
        (TypeError, (x, grad.double(), 16), "grad_output must have the dtype of x, torch.float32, got torch.float64"),
        (ValueError, (x, grad.to("meta"), 16), "grad_output must be on the device of x, cpu, got meta"),
        (
            ValueError,
            (x, grad[1:], 16),
            r"x and grad_output must have the same leading sizes, got \[6, 70\] and \[5, 33\]",
        ),
        (ValueError, (x[0], grad[0], 16), "x and grad_output must have the same leading sizes"),
        (ValueError, (x, grad, 17), "block_size must be one of 1, 4, 8, 16, 32, 64, 128, got 17"),
        (ValueError, (x, grad, 16, (0, 4)), r"block_rows must lie in \[0, 3\], got \(0, 4\)"),
        (ValueError, (x, grad, 16, (-1, 2)), r"block_rows must lie in \[0, 3\], got \(-1, 2\)"),
        (ValueError, (x, grad, 16, (2, 1)), r"block_rows must lie in \[0, 3\], got \(2, 1\)"),
    ]
    for error, arguments, message in bad:
        with pytest.raises(error, match="^" + norms + message):
            block_gradient_squared_norms(*arguments)
    one = torch.tensor([0])
    bad = [
        (TypeError, (x, grad, one.float(), one, 16), "rows must be integers, got torch.float32"),
        (TypeError, (x, grad, one, one.bool(), 16), "cols must be integers, got torch.bool"),
        (ValueError, (x, grad, one, torch.tensor([0, 1]), 16), "rows and cols must be lists of one length"),
        (ValueError, (x, grad, one[None], one[None], 16), "rows and cols must be lists of one length"),
        (ValueError, (x, grad, torch.tensor([3]), one, 16), r"rows must lie in \[0, 3\), got 3 to 3"),
        (ValueError, (x, grad, torch.tensor([-1]), one, 16), r"rows must lie in \[0, 3\), got -1 to -1"),
        (ValueError, (x, grad, one, torch.tensor([5]), 16), r"cols must lie in \[0, 5\), got 5 to 5"),
        (ValueError, (x, grad, one, torch.tensor([2**40]), 16), r"cols must lie in \[0, 5\), got 1099511627776"),
        (ValueError, (x, grad, torch.tensor([2**32]), one, 16), r"rows must lie in \[0, 3\), got 4294967296"),
        (ValueError, (x, grad, one, one, 5), "block_size must be one of"),
    ]
    for error, arguments, message in bad:
        with pytest.raises(error, match="^candidate_gradients: " + message):
            candidate_gradients(*arguments)
