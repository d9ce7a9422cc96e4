"""block_sparse_linear: forward and its three gradients against float64, awkward operands, and what it must refuse."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsenet as sn
from sparsenet import functional, reference, testing
from sparsenet.functional import StaleTopologyError
from sparsenet.testing import LinearCase, check_linear, dense_weight, linear_cases, pattern_of_kind

block_sparse_linear = sn.functional.block_sparse_linear
OP, BACKWARD_OP = "block_sparse_linear", "block_sparse_linear_backward"


def operands(shape=(33, 70), block_size=16, kind="half", batch=5, dtype=torch.float32, seed=0):
    """x, values, pattern, bias, grad_y; the first two and bias require gradients."""
    x, values, pattern, bias, grad_y = LinearCase(shape, block_size, dtype, batch, kind, "none", True, seed).operands()
    return x.requires_grad_(), values.requires_grad_(), pattern, bias.requires_grad_(), grad_y


def run(x, values, pattern, bias, grad_y, activation="none", op=block_sparse_linear):
    """The output and the gradients of x, values and bias."""
    x, values, bias = (t.detach().requires_grad_() for t in (x, values, bias))
    y = op(x, values, pattern, bias, activation)
    return y.detach(), *torch.autograd.grad(y, (x, values, bias), grad_y)


# --- right ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("block_size", sn.pattern.BLOCK_SIZES)
def test_matches_float64(block_size, dtype):
    for case in linear_cases([block_size], [dtype]):
        check_linear(case)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "block_size", "batch", "kind"),
    [
        ((256, 4096), 32, 700, "few"),  # several panels of rows, several tiles a task
        ((520, 1030), 4, 513, "few"),
        ((1000, 700), 128, 515, "half"),
        ((300, 200), 1, 700, "few"),
        ((64, 5000), 8, 1, "half"),  # one row of the batch: block rows are shared out
        ((40, 40), 16, 2100, "dense"),
    ],
)
def test_large_cases_match_float64(shape, block_size, batch, kind, dtype):
    check_linear(LinearCase(shape, block_size, dtype, batch, kind, "gelu", True, 3))
    torch.set_num_threads(1)
    check_linear(LinearCase(shape, block_size, dtype, batch, kind, "relu", True, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_small_batches_match_float64(block_size, dtype):
    """Up to 16 rows have kernels of their own, chunks of 1, 2, 4, 8 and 16 rows; 17 has not."""
    activations = itertools.cycle(functional.ACTIVATIONS)
    for batch, kind in itertools.product(range(1, 18), ("half", "few")):
        shape = (3 * block_size + 5, 2 * block_size + 51)
        check_linear(LinearCase(shape, block_size, dtype, batch, kind, next(activations), batch % 2 == 0, batch))
    long = (block_size, 300_000 // block_size)  # block rows of several runs
    for shape in (long, long[::-1]):
        check_linear(LinearCase(shape, block_size, dtype, 11, "dense", "none", True, 5))


@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    block_size=st.sampled_from(sn.pattern.BLOCK_SIZES),
    dtype=st.sampled_from(testing.DTYPES),
    batch=st.integers(0, 70),
    kind=st.sampled_from(testing.PATTERN_KINDS),
    activation=st.sampled_from(sorted(functional.ACTIVATIONS)),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_case_matches_float64(shape, block_size, dtype, batch, kind, activation, bias, seed):
    check_linear(LinearCase(shape, block_size, dtype, batch, kind, activation, bias, seed))


def test_by_hand():
    """W = [[0, 0, 1, 2], [0, 0, 3, 4], ...] of 4 x 4 blocks of 1, at (0, 2), (0, 3), (1, 2), (1, 3)."""
    pattern = sn.BlockPattern([0, 2, 4], [2, 3, 2, 3], shape=(2, 4), block_size=1)
    values = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1)
    x, bias = torch.tensor([[9.0, 9.0, 1.0, 10.0], [0.0, 0.0, -1.0, 0.0]]), torch.tensor([0.5, -0.5])
    for op in (block_sparse_linear, reference.block_sparse_linear):
        y, grad_x, grad_values, grad_bias = run(x, values, pattern, bias, torch.tensor([[1.0, 0.0], [0.0, 2.0]]), op=op)
        assert y.tolist() == [[21.5, 42.5], [-0.5, -3.5]]
        assert grad_x.tolist() == [[0, 0, 1, 2], [0, 0, 6, 8]]
        assert grad_values.flatten().tolist() == [1, 10, -2, 0]
        assert grad_bias.tolist() == [1, 2]
        assert run(x, values, pattern, bias, torch.ones(2, 2), "relu", op)[0].tolist() == [[21.5, 42.5], [0, 0]]


@pytest.mark.parametrize("activation", functional.ACTIVATIONS)
@pytest.mark.parametrize("kind", testing.PATTERN_KINDS)
def test_reference_matches_dense(kind, activation):
    """The reference is an oracle of its own: nn.functional.linear on the dense weight."""

    def dense(x, values, pattern, bias, activation):
        z = torch.nn.functional.linear(x, dense_weight(values, pattern), bias)
        return reference.ACTIVATIONS[activation](z)

    problem = operands((33, 70), 16, kind, 5, torch.float64)
    for ours, theirs in zip(
        run(*problem, activation, reference.block_sparse_linear), run(*problem, activation, dense), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


WRONG_OPS = {
    "drops a block": lambda x, v, p, b, a: reference.block_sparse_linear(
        x, torch.cat([v[:-1], v[-1:].detach() * 0]), p, b, a
    ),
    "accumulates in bfloat16": lambda x, v, p, b, a: reference.block_sparse_linear(
        x.bfloat16(), v.bfloat16(), p, b.bfloat16(), a
    ).to(x.dtype),
    "loses the bias's gradient": lambda x, v, p, b, a: reference.block_sparse_linear(x, v, p, b.detach() + 0 * b, a),
    "forgets the activation": lambda x, v, p, b, a: reference.block_sparse_linear(x, v, p, b),
    "shifts by one row": lambda x, v, p, b, a: reference.block_sparse_linear(x, v, p, b, a).roll(1, 0),
    "one ulp in a thousand off": lambda x, v, p, b, a: reference.block_sparse_linear(x, v, p, b, a) * 1.0001,
}


@pytest.mark.parametrize("wrong", WRONG_OPS)
def test_the_check_notices(wrong, monkeypatch):
    case = LinearCase((33, 70), 16, torch.float32, 7, "half", "gelu", True)
    monkeypatch.setattr(functional, OP, reference.block_sparse_linear)
    check_linear(case)
    monkeypatch.setattr(functional, OP, WRONG_OPS[wrong])
    with pytest.raises(AssertionError, match="LinearCase"):
        check_linear(case)


# --- operands of every layout ---------------------------------------------------------------------------------------


def transposed(t):
    return t.t().contiguous().t() if t.dim() == 2 else t.transpose(0, -1).contiguous().transpose(0, -1)


def every_second(t):
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan, dtype=t.dtype)
    wide[..., ::2] = t
    return wide[..., ::2]


def padded_rows(t):
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), torch.nan, dtype=t.dtype)
    wide[..., : t.shape[-1]] = t
    return wide[..., : t.shape[-1]]


def offset_by_one(t):
    flat = torch.cat([torch.full((1,), torch.nan, dtype=t.dtype), t.flatten()])
    return flat[1:].view(t.shape)


def odd_address(t):
    """Not even aligned to its elements."""
    raw = bytearray(t.numel() * t.element_size() + 1)
    moved = torch.frombuffer(raw, dtype=t.dtype, count=t.numel(), offset=1).view(t.shape)
    return moved.copy_(t)


def negative_bit(t):
    """The imaginary part of a lazy conjugate: memory holds the values negated."""
    if t.dtype not in (torch.float32, torch.float64):
        return t
    lazy = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert lazy.is_neg()
    return lazy


LAYOUTS = [negative_bit, transposed, every_second, padded_rows, offset_by_one, odd_address]
if os.environ.get("SPARSENET_TEST_DEVICE"):  # no GPU reads elements at odd addresses
    LAYOUTS.remove(odd_address)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("which", ["x", "values", "bias", "grad_y"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_bits(layout, which, dtype):
    for activation in ("none", "gelu"):
        x, values, pattern, bias, grad_y = operands(dtype=dtype)
        expected = run(x, values, pattern, bias, grad_y, activation)
        moved = {"x": x, "values": values, "bias": bias, "grad_y": grad_y}
        moved[which] = layout(moved[which].detach())
        actual = run(moved["x"], moved["values"], pattern, moved["bias"], moved["grad_y"], activation)
        assert all(map(torch.equal, actual, expected))


def test_expanded_operands():
    x, values, pattern, bias, _ = operands()
    row, one, block = x.detach()[:1].expand(5, -1), torch.ones(()).expand(5, 33), values.detach()[:1]
    blocks = block.expand_as(values)
    expected = run(row.contiguous(), blocks.contiguous(), pattern, bias, one.contiguous())
    assert all(map(torch.equal, run(row, blocks, pattern, bias, one), expected))
    x.grad = None
    block_sparse_linear(x, values, pattern, bias).sum().backward()  # autograd hands over an expanded gradient
    assert torch.equal(x.grad, run(x, values, pattern, bias, one.contiguous())[1])


def test_single_column_and_row_strides():
    """A column of ones has no meaningful column stride, a batch of one no meaningful row stride."""
    pattern = sn.BlockPattern.random((8, 1), 1.0, 4)
    values, x = torch.randn(2, 4, 4), torch.randn(6, 9)[:, 3:4]
    torch.testing.assert_close(block_sparse_linear(x, values, pattern), x @ dense_weight(values, pattern).T)
    pattern = sn.BlockPattern.random((8, 9), 1.0, 4)
    values, x = torch.randn(6, 4, 4), torch.randn(9, 6).t()[2:3]
    torch.testing.assert_close(block_sparse_linear(x, values, pattern), x @ dense_weight(values, pattern).T)


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 1, 3), (0, 3), (2, 0)])
def test_leading_dimensions(leading):
    _, values, pattern, bias, _ = operands()
    x, grad_y = torch.randn(*leading, 70), torch.randn(*leading, 33)
    flat = run(x.reshape(-1, 70), values, pattern, bias, grad_y.reshape(-1, 33), "silu")
    y, grad_x, *others = run(x, values, pattern, bias, grad_y, "silu")
    assert torch.equal(y, flat[0].view(*leading, 33)) and torch.equal(grad_x, flat[1].view(*leading, 70))
    assert all(map(torch.equal, others, flat[2:]))
    if leading == (2, 3):  # a permuted batch of sequences
        swapped = run(x.transpose(0, 1), values, pattern, bias, grad_y.transpose(0, 1), "silu")
        assert torch.equal(swapped[0].transpose(0, 1), y)


def test_operands_may_share_memory():
    pattern = sn.BlockPattern.random((32, 32), 1.0, 32)
    memory = torch.randn(32, 32)
    grad_y = torch.randn(32, 32)
    expected = run(memory.clone(), memory.clone()[None], pattern, memory[0].clone(), grad_y)
    assert all(map(torch.equal, run(memory, memory[None], pattern, memory[0], grad_y), expected))
    expected = run(memory.clone(), memory.clone()[None], pattern, memory[0].clone(), memory.clone())
    assert all(map(torch.equal, run(memory, memory[None], pattern, memory[0], memory), expected))


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)))
def test_gradients_nobody_wants_are_not_computed(wanted, monkeypatch):
    calls = []

    class Spy:
        def __getattr__(self, name):
            return getattr(functional.native._C, name)

        def linear_backward(self, *arguments):
            calls.append([address != 0 for address in arguments[-1]])
            functional.native._C.linear_backward(*arguments)

    monkeypatch.setattr(functional.native, "kernels_of", lambda device: Spy())
    x, values, pattern, bias, grad_y = operands()
    expected = run(x, values, pattern, bias, grad_y, "gelu")[1:]
    calls.clear()
    for tensor, wants in zip((x, values, bias), wanted, strict=True):
        tensor.requires_grad_(wants)
    y = block_sparse_linear(x, values, pattern, bias, "gelu")
    assert y.requires_grad == any(wanted)
    if any(wanted):
        y.backward(grad_y)
        assert calls == [list(wanted)]
    for tensor, wants, gradient in zip((x, values, bias), wanted, expected, strict=True):
        assert torch.equal(tensor.grad, gradient) if wants else tensor.grad is None


def test_without_autograd():
    x, values, pattern, bias, _ = operands()
    expected = block_sparse_linear(x, values, pattern, bias, "gelu")
    with torch.no_grad():
        assert torch.equal(block_sparse_linear(x, values, pattern, bias, "gelu"), expected)
    with torch.inference_mode():
        y = block_sparse_linear(x, values, pattern, bias, "gelu")
        assert y.is_inference() and torch.equal(y, expected)


# --- autograd -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [block_sparse_linear, reference.block_sparse_linear], ids=["native", "reference"])
@pytest.mark.parametrize("activation", functional.ACTIVATIONS)
@pytest.mark.parametrize(("shape", "block_size"), [((7, 10), 4), ((3, 5), 1), ((5, 9), 8)])
def test_gradcheck(op, activation, shape, block_size):
    x, values, pattern, bias, _ = operands(shape, block_size, "half", 3, torch.float64)
    with torch.no_grad():  # away from relu's kink
        bias += 0.1 * block_sparse_linear(x, values, pattern, bias).abs().lt(1e-3).any()
    assert torch.autograd.gradcheck(lambda *t: op(t[0], t[1], pattern, t[2], activation), (x, values, bias))


def test_reference_is_differentiable_twice():
    x, values, pattern, bias, _ = operands((7, 10), 4, "half", 3, torch.float64)

    def function(x, values, bias):
        return reference.block_sparse_linear(x, values, pattern, bias, "silu")

    assert torch.autograd.gradgradcheck(function, (x, values, bias))


@pytest.mark.parametrize("index", ["owned", "foreign"])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_opcheck(activation, index):
    x, values, pattern, bias, grad_y = operands()
    crow, col = (
        (pattern.crow, pattern.col)
        if index == "owned"
        else (
            pattern.crow_indices,
            pattern.col_indices,
        )
    )
    constants = (crow, col, 33, 70, 16, activation)
    for b in (bias, None):
        torch.library.opcheck(getattr(torch.ops.sparsenet, OP).default, (x, values, b, *constants))
    y, pre = getattr(torch.ops.sparsenet, OP)(x, values, bias, *constants)
    saved = (y if activation == "relu" else pre).detach()
    x, values = x.detach(), values.detach()
    for wanted in ((True, True, True), (False, True, False), (True, False, True)):
        torch.library.opcheck(
            getattr(torch.ops.sparsenet, BACKWARD_OP).default, (grad_y, saved, x, values, *constants, *wanted)
        )


def through_library(x, values, pattern, bias, activation="none"):
    constants = (pattern.crow, pattern.col, *pattern.shape, pattern.block_size, activation)
    return getattr(torch.ops.sparsenet, OP)(x, values, bias, *constants)[0]


@pytest.mark.parametrize("activation", functional.ACTIVATIONS)
def test_library_gives_the_same_bits(activation):
    problem = operands()
    for layout in (lambda t: t, *LAYOUTS):
        x, values, pattern, bias, grad_y = problem
        moved = (layout(x.detach()), layout(values.detach()), pattern, layout(bias.detach()), layout(grad_y))
        for ours, theirs in zip(run(*moved, activation, through_library), run(*problem, activation), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("op", [block_sparse_linear, through_library])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_differentiating_twice_raises(op, activation):
    """Also where the inner gradient_output needs no gradient itself, as in a gradient penalty."""
    x, values, pattern, bias, grad_y = operands()
    for inner in (lambda y: y.sum(), lambda y: y.square().sum(), lambda y: (y * grad_y).sum()):
        for wrt in (x, values):
            y = op(x, values, pattern, bias, activation)
            (gradient,) = torch.autograd.grad(inner(y), wrt, create_graph=True)
            with pytest.raises(RuntimeError, match="twice|double|autograd formula"):
                (y.sum() + gradient.square().sum()).backward()


def test_create_graph_alone_is_fine():
    x, values, pattern, bias, grad_y = operands()
    expected = run(x, values, pattern, bias, grad_y)[1:]
    y = block_sparse_linear(x, values, pattern, bias)
    assert all(map(torch.equal, torch.autograd.grad(y, (x, values, bias), grad_y, create_graph=True), expected))


def test_forward_mode_raises():
    """No jvp is defined: an error, never a zero tangent."""
    x, values, pattern, bias, _ = operands()
    with pytest.raises((RuntimeError, NotImplementedError), match="jvp|forward|Function"):
        torch.func.jvp(lambda x: block_sparse_linear(x, values, pattern, bias), (x.detach(),), (torch.ones_like(x),))
    import torch.autograd.forward_ad as forward_ad

    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError), match="jvp|forward|Function"):
        block_sparse_linear(forward_ad.make_dual(x.detach(), torch.ones_like(x)), values, pattern, bias)


def test_backward_after_a_rewire_raises():
    layer = sn.SparseLinear(70, 33, density=0.5, block_size=16)
    for op in (block_sparse_linear, through_library):
        old = layer.pattern
        y = op(torch.randn(5, 70), layer.values, old, layer.bias)
        layer.set_pattern(sn.BlockPattern.random((33, 70), 0.5, 16))
        with pytest.raises(StaleTopologyError, match="block_sparse_linear: the layer was rewired since this forward"):
            y.sum().backward()
        with pytest.raises(StaleTopologyError, match="rewired"):
            op(torch.randn(5, 70), layer.values.detach().clone(), old, layer.bias)


def test_one_graph_uses_the_operands_twice():
    x, values, pattern, bias, grad_y = operands()
    once = run(x, values, pattern, bias, grad_y)[2]
    y = block_sparse_linear(x, values, pattern, bias) + block_sparse_linear(x, values, pattern, bias)
    torch.testing.assert_close(torch.autograd.grad(y, values, grad_y)[0], 2 * once)
    y = block_sparse_linear(x, values, pattern, bias)
    first = torch.autograd.grad(y, values, grad_y, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y, values, grad_y)[0], first)


def test_changing_an_operand_in_place_before_backward_raises():
    x, values, pattern, bias, grad_y = operands()
    y = block_sparse_linear(x, values, pattern, bias)
    with torch.no_grad():
        values.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(grad_y)


# --- special values -------------------------------------------------------------------------------------------------

SPECIALS = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("special", SPECIALS)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [1, 8, 32])
def test_nan_and_inf_spread_through_active_blocks_only(block_size, dtype, special):
    shape, batch = (3 * block_size + 1, 4 * block_size + 1), 37
    pattern = pattern_of_kind("empty_lines", shape, block_size, torch.Generator().manual_seed(1))
    active = pattern.to_mask().repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)[: shape[0], : shape[1]]
    values, bias = (
        torch.ones(pattern.num_blocks, block_size, block_size, dtype=dtype),
        torch.ones(shape[0], dtype=dtype),
    )
    for column in (0, block_size, shape[1] - 1):
        x, grad_y = torch.ones(batch, shape[1], dtype=dtype), torch.ones(batch, shape[0], dtype=dtype)
        x[20, column] = special
        y, _, grad_values, _ = run(x, values, pattern, bias, grad_y)
        assert torch.equal(~y.isfinite()[20], active[:, column]) and y[:20].isfinite().all() and y[21:].isfinite().all()
        at = grad_values[pattern.col_indices == column // block_size, :, column % block_size]
        inside = pattern.row_indices[pattern.col_indices == column // block_size].unsqueeze(1) * block_size
        at = at[inside + torch.arange(block_size) < shape[0]]
        assert not at.isfinite().any() or at.numel() == 0
        others = grad_values.clone()
        others[pattern.col_indices == column // block_size, :, column % block_size] = 0
        assert others.isfinite().all()
        if not torch.isnan(torch.tensor(special)):
            assert (y[20][active[:, column]] == special).all()
    for row in (1, block_size, shape[0] - 1):
        x, grad_y = torch.ones(batch, shape[1], dtype=dtype), torch.ones(batch, shape[0], dtype=dtype)
        grad_y[36, row] = special
        _, grad_x, grad_values, grad_bias = run(x, values, pattern, bias, grad_y)
        assert torch.equal(~grad_x.isfinite()[36], active[row]) and grad_x[:36].isfinite().all()
        in_row = pattern.row_indices == row // block_size
        outside = torch.arange(block_size) + pattern.col_indices[:, None] * block_size >= shape[1]
        assert (~grad_values[in_row, row % block_size].isfinite() | outside[in_row]).all()
        assert grad_values[~in_row].isfinite().all()
        assert torch.equal(~grad_bias.isfinite(), torch.arange(shape[0]) == row)


@pytest.mark.parametrize("activation", functional.ACTIVATIONS)
def test_nan_stays_nan_in_every_activation(activation):
    x, values, pattern, bias, grad_y = operands(kind="dense", batch=40)
    with torch.no_grad():
        x[3, 0] = torch.nan
    y, grad_x, grad_values, _ = run(x, values, pattern, bias, grad_y, activation)
    theirs = run(x, values, pattern, bias, grad_y, activation, reference.block_sparse_linear)
    assert y[3].isnan().all() and torch.equal(y.isnan(), theirs[0].isnan())
    assert torch.equal(grad_x.isnan(), theirs[1].isnan()) and torch.equal(grad_values.isnan(), theirs[2].isnan())


@pytest.mark.parametrize("activation", functional.ACTIVATIONS)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_activations_far_out(activation, dtype):
    """Large arguments saturate as torch's do: gelu(1e4) = 1e4, silu(-1e4) = 0, their slopes 1 and 0."""
    points = torch.tensor([0.0, -0.0, 1e-6, -1e-6, 5.0, -5.0, 20.0, -20.0, 89.0, -89.0, 300.0, -300.0, 1e4, -1e4])
    pattern = sn.BlockPattern.random((1, 1), 1.0, 1)
    x, one = points.to(dtype)[:, None], torch.ones(len(points), 1, dtype=dtype)
    y, grad_x, *_ = run(x, torch.ones(1, 1, 1, dtype=dtype), pattern, torch.zeros(1, dtype=dtype), one, activation)
    z = x.double().requires_grad_()
    expected = reference.ACTIVATIONS[activation](z)
    (slope,) = torch.autograd.grad(expected.sum(), z)
    bound = 1.01 * testing.unit_roundoff(dtype) * (1 + expected.abs()) + 4e-7 * (1 + z.abs().clamp(max=10))
    testing.assert_within(y, expected.detach(), bound.detach(), f"{activation} {dtype}")
    testing.assert_within(grad_x, slope, (1.01 * testing.unit_roundoff(dtype) + 4e-6 + 0 * z).detach(), "slope")


def test_denormals_are_not_flushed():
    """float32 and float64 sums of denormals are exact; bfloat16's pair instruction may flush them, no more."""
    pattern = sn.BlockPattern.random((32, 64), 1.0, 16)
    ones = torch.ones(pattern.num_blocks, 16, 16)
    for dtype, tiny in ((torch.float32, 2.0**-140), (torch.float64, 2.0**-1060)):
        x = torch.full((20, 64), tiny, dtype=dtype)
        y, grad_x, *_ = run(
            x,
            ones.to(dtype),
            pattern,
            torch.zeros(32, dtype=dtype),
            torch.full((20, 32), tiny).to(dtype) if dtype == torch.float32 else torch.full((20, 32), tiny, dtype=dtype),
        )
        assert (y == 64 * tiny).all() and (grad_x == 32 * tiny).all()
    half = torch.full((20, 64), 2.0**-24, dtype=torch.float16)
    assert (block_sparse_linear(half, ones.half(), pattern) == 64 * 2.0**-24).all()
    brain = torch.full((20, 64), 2.0**-130, dtype=torch.bfloat16)
    y = block_sparse_linear(brain, ones.bfloat16(), pattern)
    assert ((y == 64 * 2.0**-130) | (y == 0)).all()


def test_minus_zero():
    pattern = sn.BlockPattern.random((5, 9), 1.0, 4)
    values = torch.ones(pattern.num_blocks, 4, 4)
    for activation in functional.ACTIVATIONS:
        results = run(
            torch.full((3, 9), -0.0), values, pattern, torch.full((5,), -0.0), torch.full((3, 5), -0.0), activation
        )
        assert all((t == 0).all() for t in results)


@pytest.mark.parametrize("block_size", [1, 4, 32])
def test_long_bfloat16_reductions_accumulate_in_float32(block_size):
    """Ones summed in bfloat16 would stop at 256."""
    n = 40_000
    pattern = sn.BlockPattern.random((block_size, n), 1.0, block_size)
    ones = torch.ones(pattern.num_blocks, block_size, block_size, dtype=torch.bfloat16)
    y = block_sparse_linear(torch.ones(2, n, dtype=torch.bfloat16), ones, pattern)
    assert (y == torch.tensor(float(n)).bfloat16()).all()
    pattern = sn.BlockPattern.random((block_size, block_size), 1.0, block_size)
    ones = torch.ones(1, block_size, block_size, dtype=torch.bfloat16)
    x, grad_y = torch.ones(n, block_size, dtype=torch.bfloat16), torch.ones(n, block_size, dtype=torch.bfloat16)
    _, _, grad_values, grad_bias = run(x, ones, pattern, torch.zeros(block_size, dtype=torch.bfloat16), grad_y)
    assert (grad_values == torch.tensor(float(n)).bfloat16()).all()
    assert (grad_bias == torch.tensor(float(n)).bfloat16()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_long_reductions_of_random_numbers(dtype):
    check_linear(LinearCase((40, 20_000), 32, dtype, 6, "dense", "none", True))
    check_linear(LinearCase((20_000, 40), 32, dtype, 6, "dense", "silu", True))
    check_linear(LinearCase((40, 40), 8, dtype, 20_000, "dense", "gelu", True))


def test_float16_overflows_to_infinity():
    pattern = sn.BlockPattern.random((4, 8), 1.0, 4)
    y = block_sparse_linear(torch.full((3, 8), 1e4).half(), torch.ones(2, 4, 4).half(), pattern)
    assert (y == torch.inf).all()


# --- nothing there --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (33, 70)])
@pytest.mark.parametrize("batch", [0, 3])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_empty_matrices_and_batches(shape, batch, activation):
    x, values, pattern, bias, grad_y = operands(shape, 16, "half", batch)
    results = run(x, values, pattern, bias, grad_y, activation)
    for ours, theirs in zip(
        results, run(x, values, pattern, bias, grad_y, activation, reference.block_sparse_linear), strict=True
    ):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs)


def test_no_blocks_and_empty_rows_give_the_bias():
    x, values, pattern, bias, grad_y = operands(kind="none")
    y, grad_x, grad_values, grad_bias = run(x * torch.nan, values, pattern, bias, grad_y)
    assert torch.equal(y, bias.detach().expand(5, 33))
    assert torch.equal(grad_x, torch.zeros(5, 70)) and grad_values.shape == (0, 16, 16)
    torch.testing.assert_close(grad_bias, grad_y.sum(0))
    assert torch.equal(block_sparse_linear(x, values, pattern), torch.zeros(5, 33))


def test_offsets_beyond_32_bits():
    """rows * cols = 2^40: only block numbers and places inside x and y may be used as offsets."""
    n = 2**20
    pattern = sn.BlockPattern.from_places(
        torch.tensor([n // 128 - 1, 0, n // 128 - 1]), torch.tensor([n // 128 - 1, n // 128 - 1, 0]), (n, n), 128
    )
    values, x = torch.randn(3, 128, 128, requires_grad=True), torch.randn(2, n, requires_grad=True)
    y = block_sparse_linear(x, values, pattern)
    first, last = x.detach()[:, :128], x.detach()[:, -128:]
    v = values.detach()
    torch.testing.assert_close(y[:, :128], last @ v[0].T)
    torch.testing.assert_close(y[:, -128:], first @ v[1].T + last @ v[2].T)
    assert not y[:, 128:-128].any()
    y[:, -128:].sum().backward()
    torch.testing.assert_close(x.grad[:, -128:], v[2].sum(0).expand(2, 128))
    assert not x.grad[:, 128:-128].any()


@pytest.mark.slow
@pytest.mark.skipif(
    os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 20 << 30, reason="needs 20 GiB of memory"
)
def test_more_than_2_to_the_31_weights():
    shape = (128 * 8194, 128 * 16)
    pattern = sn.BlockPattern.random(shape, 1.0, 128)
    assert pattern.num_blocks * 128 * 128 > 2**31
    values = torch.zeros(pattern.num_blocks, 128, 128, dtype=torch.bfloat16)  # pages of zeros cost nothing
    values[-1] = torch.randn(128, 128)
    values[0] = torch.randn(128, 128)
    values.requires_grad_()
    x = torch.randn(2, shape[1]).bfloat16().requires_grad_()
    y = block_sparse_linear(x, values, pattern)
    exact = x.detach()[:, -128:].double() @ values.detach()[-1].double().T
    torch.testing.assert_close(y[:, -128:].double(), exact, rtol=0.01, atol=0.05)
    grad_y = torch.zeros_like(y)
    grad_y[:, -128:] = 1.0
    grad_x, grad_values = torch.autograd.grad(y, (x, values), grad_y)
    exact = values.detach()[-1].double().sum(0).expand(2, -1)
    torch.testing.assert_close(grad_x[:, -128:].double(), exact, rtol=0.01, atol=0.05)
    exact = x.detach()[:, -128:].double().sum(0).expand(128, -1)
    torch.testing.assert_close(grad_values[-1].double(), exact, rtol=0.01, atol=0.05)
    assert not grad_values[: -16 * 8].any()


# --- determinism ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [1, 4, 16, 64])
def test_bit_identical_whatever_the_threads(block_size, dtype):
    for batch, shape in ((1, (200, 300)), (7, (130, 257)), (300, (96, 160))):
        problem = operands(shape, block_size, "half", batch, dtype)
        torch.set_num_threads(1)
        expected = run(*problem, "gelu")
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            for ours, theirs in zip(run(*problem, "gelu"), expected, strict=True):
                assert torch.equal(ours, theirs), threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_a_row_does_not_depend_on_its_batch(block_size, dtype):
    """The rest of the batch changes nothing: not even the bits."""
    x, values, pattern, bias, grad_y = operands((200, 300), block_size, "half", 100, dtype)
    whole, whole_grad_x, *_ = run(x, values, pattern, bias, grad_y, "gelu")
    for rows in (slice(0, 1), slice(17, 18), slice(2, 5), slice(30, 38), slice(50, 64), slice(3, 50)):
        y, grad_x, *_ = run(x[rows], values, pattern, bias, grad_y[rows], "gelu")
        assert torch.equal(y, whole[rows]) and torch.equal(grad_x, whole_grad_x[rows])


# --- refused --------------------------------------------------------------------------------------------------------


def test_every_message():
    x, values, pattern, bias, _ = operands()
    good = {"x": x, "values": values, "pattern": pattern, "bias": bias}
    n = pattern.num_blocks
    meta = torch.empty(n, 16, 16, device="meta")
    bad = [
        (ValueError, {"x": torch.randn(5, 71)}, r"x must have 70 columns, got \[5, 71\]"),
        (ValueError, {"x": torch.tensor(1.0)}, r"x must have 70 columns, got \[\]"),
        (
            TypeError,
            {"x": torch.ones(5, 70, dtype=torch.int64)},
            "x must be float32, bfloat16, float16 or float64, got torch.int64",
        ),
        (TypeError, {"x": torch.ones(5, 70, dtype=torch.complex64)}, "x must be float32, .* got torch.complex64"),
        (TypeError, {"x": torch.ones(5, 70).bool()}, "x must be float32, .* got torch.bool"),
        (TypeError, {"x": x.double()}, "values must have the dtype of x, torch.float64, got torch.float32"),
        (
            TypeError,
            {"values": values.bfloat16()},
            "values must have the dtype of x, torch.float32, got torch.bfloat16",
        ),
        (ValueError, {"values": values[1:]}, rf"values must have shape \[{n}, 16, 16\], got \[{n - 1}, 16, 16\]"),
        (ValueError, {"values": values[:, 1:]}, rf"values must have shape \[{n}, 16, 16\], got \[{n}, 15, 16\]"),
        (ValueError, {"values": values.flatten()}, rf"values must have shape \[{n}, 16, 16\], got"),
        (ValueError, {"bias": torch.randn(34)}, r"bias must have shape \[33\], got \[34\]"),
        (ValueError, {"bias": torch.randn(1, 33)}, r"bias must have shape \[33\], got \[1, 33\]"),
        (TypeError, {"bias": bias.double()}, "bias must have the dtype of x, torch.float32, got torch.float64"),
        (ValueError, {"activation": "tanh"}, "activation must be one of none, relu, gelu, silu, got 'tanh'"),
        (ValueError, {"values": meta}, "device of x, cpu, got meta"),
        (ValueError, {"bias": torch.randn(33, device="meta")}, "bias must be on the device of x, cpu, got meta"),
    ]
    for error, change, message in bad:
        with pytest.raises(error, match="^block_sparse_linear: .*" + message):
            block_sparse_linear(**{**good, **change})
    assert block_sparse_linear(**good).shape == (5, 33)


def test_library_refuses_hostile_indices():
    """What reaches the registered op without going through a BlockPattern is validated there."""
    x, values, pattern, bias, _ = operands()
    op = getattr(torch.ops.sparsenet, OP)
    for change in (
        lambda c, k: k.__setitem__(0, 10**6),
        lambda c, k: k.__setitem__(0, -1),
        lambda c, k: c.__setitem__(1, 99),
    ):
        crow, col = pattern.crow_indices, pattern.col_indices
        change(crow, col)
        with pytest.raises(ValueError, match="BlockPattern: (col|crow)_indices must"):
            op(x, values, bias, crow, col, 33, 70, 16, "none")
    with pytest.raises(ValueError, match="values must have shape"):
        op(x, values[1:], bias, pattern.crow_indices, pattern.col_indices, 33, 70, 16, "none")
    with pytest.raises(ValueError, match="x must have 69 columns"):
        op(x, values, bias, pattern.crow_indices, pattern.col_indices, 33, 69, 16, "none")
    with pytest.raises(ValueError, match="block_size must be one of"):
        op(x, values, bias, pattern.crow_indices, pattern.col_indices, 33, 70, 17, "none")


def test_library_backward_refuses_what_does_not_fit():
    """torch.ops is public: no shape may reach a kernel unchecked."""
    x, values, pattern, _, grad_y = operands()
    x, values = x.detach(), values.detach()
    op = getattr(torch.ops.sparsenet, BACKWARD_OP)
    constants = (pattern.crow, pattern.col, 33, 70, 16, "relu", True, True, True)
    good = {"grad_y": grad_y, "saved": grad_y, "x": x, "values": values}
    op(*good.values(), *constants)
    for change in (
        {"grad_y": grad_y[:, 1:]},
        {"grad_y": grad_y[1:]},
        {"grad_y": grad_y.double()},
        {"saved": grad_y[:1]},
        {"saved": grad_y.double()},
        {"x": x[:, 1:]},
        {"x": x[1:]},
        {"x": x.double()},
        {"values": values[1:]},
        {"values": values[:, :8]},
        {"values": values.double()},
    ):
        with pytest.raises((ValueError, TypeError), match="block_sparse_linear"):
            op(*{**good, **change}.values(), *constants)


@pytest.mark.parametrize(
    "call",
    [
        ((0, 0), (0, 3, 16, 16), (0, 0), (0, 0)),  # two numbers where three are due
        ((0, 0, 1), (0, 3, 16), (0, 0), (0, 0)),
        ((0, 0, 1), [0, 3, 16, 16], (0, 0), (0, 0)),  # a list
        ((0, 0, 1.0), (0, 3, 16, 16), (0, 0), (0, 0)),
        ((0, 0, 1), (1 << 64, 3, 16, 16), (0, 0), (0, 0)),
    ],
)
def test_the_native_call_takes_whole_tuples_of_integers_only(call):
    """What crosses into the native module is read strictly: nothing is guessed from a tuple that does not fit."""
    pattern = sn.BlockPattern.random((8, 16), 1.0, 8)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        functional.native._C.linear_forward(pattern.native, *call)
