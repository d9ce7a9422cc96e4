"""Checking the operations on the machine at hand: tolerances, awkward cases, and every operation against float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from sparsenet import functional, reference
from sparsenet.pattern import BLOCK_SIZES, BlockPattern

__all__ = ["LinearCase", "check_candidates", "check_linear", "check_norms", "linear_cases", "self_test", "tolerance"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PATTERN_KINDS = ("none", "one", "few", "half", "dense", "power_law", "empty_lines", "full_row")
# (out, in): never a multiple of every block size; smaller than a block, one row, one column, many blocks
SHAPES = ((10, 784), (33, 70), (1, 128), (70, 1), (128, 1), (3, 5), (96, 160), (130, 257), (256, 64))
BATCHES = (1, 7, 33, 0, 64, 2, 130)


# --- how far apart results may be -----------------------------------------------------------------------------------


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to ``dtype``: 2^-24 for float32, 2^-8 for bfloat16."""
    return torch.finfo(dtype).eps / 2


def tolerance(dtype: torch.dtype, terms: int, magnitude: Tensor, expected: Tensor) -> Tensor:
    """Largest error, element by element, of a sum of ``terms`` products accumulated in float32 (float64 for float64).

    Args:
        dtype: of the operands and of the result.
        terms: length of the reduction.
        magnitude: sum of the absolute values of the products, float64.
        expected: the exact result, float64.

    The error of the sum is at most ``terms`` roundings of its magnitude, and with overwhelming probability at most
    ``6 sqrt(terms)`` of them (Higham and Mary, 2019); the result is rounded once more, to ``dtype``.

    Example:
        >>> import torch
        >>> from sparsenet.testing import tolerance
        >>> exact, magnitude = torch.tensor([1.0], dtype=torch.float64), torch.tensor([10.0], dtype=torch.float64)
        >>> float32, bfloat16 = (tolerance(t, 100, magnitude, exact).item() for t in (torch.float32, torch.bfloat16))
        >>> 0 < float32 < 1e-4 < bfloat16 < 1e-2
        True
    """
    accumulate = unit_roundoff(torch.float32)
    if dtype == torch.float64:
        accumulate = 2 * unit_roundoff(dtype)  # the float64 reference errs as well
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps  # half of it is lost below the normal numbers
    return (
        accumulate * (min(terms, 6 * terms**0.5) + 4) * magnitude
        + 1.01 * unit_roundoff(dtype) * expected.abs()
        + smallest
    )


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor, what: str) -> None:
    """Raises AssertionError naming ``what`` and the worst element unless ``|actual - expected| <= bound`` for all."""
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}")
    excess = (actual.double() - expected).abs() - bound
    if not bool((excess <= 0).all()):  # NaN fails
        worst = int(torch.nan_to_num(excess, nan=torch.inf).argmax())
        got, want, allowed = (float(t.flatten()[worst]) for t in (actual, expected, bound))
        raise AssertionError(f"{what}: element {worst} is {got:.9g}, expected {want:.9g} +- {allowed:.3g}")


# --- cases ----------------------------------------------------------------------------------------------------------


def pattern_of_kind(kind: str, shape: tuple[int, int], block_size: int, generator: torch.Generator) -> BlockPattern:
    """A pattern of one of ``PATTERN_KINDS``; power_law: block row i has about half as many blocks as row i - 1."""
    rows, cols = (-(-n // block_size) for n in shape)
    chance = torch.rand(rows, cols, generator=generator)
    shares = {"none": 0.0, "few": 0.15, "half": 0.5, "dense": 1.0, "empty_lines": 0.6, "full_row": 0.1, "one": 0.0}
    mask = chance < (0.5 ** torch.arange(rows).unsqueeze(1) if kind == "power_law" else shares[kind])
    if kind == "empty_lines":
        mask[::2] = False
        mask[:, 1::2] = False
    if kind == "full_row":
        mask[rows // 2] = True
    if kind == "one" and mask.numel():
        mask[-1, -1] = True
    return BlockPattern.from_mask(mask, block_size, shape)


@dataclass(frozen=True)
class LinearCase:
    """One call of block_sparse_linear, forward and backward.

    Example:
        >>> import torch
        >>> from sparsenet.testing import LinearCase
        >>> case = LinearCase((48, 64), 16, torch.float32, batch=3, kind="half", activation="relu", bias=True)
        >>> x, values, pattern, bias, grad_y = case.operands()
        >>> x.shape, grad_y.shape, pattern.shape
        (torch.Size([3, 64]), torch.Size([3, 48]), (48, 64))
    """

    shape: tuple[int, int]
    block_size: int
    dtype: torch.dtype
    batch: int
    kind: str
    activation: str
    bias: bool
    seed: int = 0

    def operands(self) -> tuple[Tensor, Tensor, BlockPattern, Tensor | None, Tensor]:
        """``x``, ``values``, ``pattern``, ``bias`` and the gradient of the output. Edge blocks hold rubbish outside."""
        generator = torch.Generator().manual_seed(self.seed)
        pattern = pattern_of_kind(self.kind, self.shape, self.block_size, generator)

        def normal(*size):
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        scale = max(1.0, pattern.density * self.shape[1]) ** -0.5
        values = normal(pattern.num_blocks, self.block_size, self.block_size) * scale
        x, grad_y = normal(self.batch, self.shape[1]), normal(self.batch, self.shape[0])
        bias = normal(self.shape[0]).to(self.dtype) if self.bias else None
        return x.to(self.dtype), values.to(self.dtype), pattern, bias, grad_y.to(self.dtype)


def linear_cases(block_sizes=BLOCK_SIZES, dtypes=DTYPES, shapes=SHAPES) -> Iterator[LinearCase]:
    """Every block size with every dtype and shape; batch, pattern and activation cycle past them.

    Example:
        >>> import torch
        >>> from sparsenet.testing import linear_cases
        >>> len(list(linear_cases([16, 32], [torch.float32], [(48, 64), (5, 70)])))
        4
    """
    activations = tuple(functional.ACTIVATIONS)
    turn = count()
    for block_size in block_sizes:
        for dtype in dtypes:
            for shape in shapes:
                i = next(turn)
                yield LinearCase(
                    shape,
                    block_size,
                    dtype,
                    BATCHES[i % len(BATCHES)],
                    PATTERN_KINDS[(i + i // 8) % len(PATTERN_KINDS)],
                    activations[(i + i // 4) % len(activations)],
                    bool((i // 3) % 2),
                    i,
                )


# --- checks ---------------------------------------------------------------------------------------------------------


def dense_weight(values: Tensor, pattern: BlockPattern) -> Tensor:
    """[out, in] from [num_blocks, b, b]; what edge blocks hold outside the matrix is cut off."""
    b, rows, cols = pattern.block_size, pattern.block_rows, pattern.block_cols
    dense = values.new_zeros(rows, cols, b, b)
    dense[pattern.row_indices.long(), pattern.col_indices.long()] = values
    return dense.permute(0, 2, 1, 3).reshape(rows * b, cols * b)[: pattern.shape[0], : pattern.shape[1]]


def blocks_of(dense: Tensor, block_size: int) -> Tensor:
    """[ceil(out / b), ceil(in / b), b, b] from [out, in], zeros outside."""
    b = block_size
    padded = torch.nn.functional.pad(dense, (0, -dense.shape[1] % b, 0, -dense.shape[0] % b))
    return padded.reshape(padded.shape[0] // b, b, padded.shape[1] // b, b).permute(0, 2, 1, 3)


def _derivative(z: Tensor, activation: str) -> Tensor:
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        return torch.autograd.grad(reference.ACTIVATIONS[activation](z).sum(), z)[0]


def _activation_error(dtype: torch.dtype, z: Tensor, activation: str) -> Tensor:
    """What the fused activations and their derivatives may err before rounding: an erf good to 1.5e-7 in float32."""
    if activation in ("none", "relu"):
        return torch.zeros_like(z)
    return (4e-7 if dtype != torch.float64 else 2e-15) * (1.0 + z.abs())


def check_linear(case: LinearCase) -> None:
    """Forward and all three gradients of one case against dense float64 arithmetic.

    Raises:
        AssertionError: a result is further off than its dtype and the length of its reduction allow.

    Example:
        >>> import torch
        >>> from sparsenet.testing import LinearCase, check_linear
        >>> check_linear(LinearCase((48, 64), 16, torch.float32, batch=3, kind="half", activation="gelu", bias=True))
    """
    dtype, activation = case.dtype, case.activation
    x, values, pattern, bias, grad_y = case.operands()
    inputs = [t.requires_grad_() for t in (x, values, bias) if t is not None]
    y = functional.block_sparse_linear(x, values, pattern, bias, activation)
    grads = torch.autograd.grad(y, inputs, grad_y)

    x, values, grad_y = (t.detach().double() for t in (x, values, grad_y))
    bias = torch.zeros(case.shape[0]) if bias is None else bias.detach()
    weight = dense_weight(values, pattern)
    z = x @ weight.T + bias
    z_bound = tolerance(dtype, case.shape[1] + 1, x.abs() @ weight.abs().T + bias.abs(), z)
    approximation = _activation_error(dtype, z, activation)
    expected = reference.ACTIVATIONS[activation](z)
    assert_within(y.detach(), expected, 1.2 * z_bound + approximation, f"{case} forward")

    # relu's derivative follows the sign that y came out with; the others see z rounded to the dtype
    grad_z = grad_y * ((y > 0).double() if activation == "relu" else _derivative(z, activation))
    error = grad_y.abs() * (approximation + (0.8 * z_bound if activation in ("gelu", "silu") else 0.0))
    if dtype != torch.float64:
        error += unit_roundoff(dtype) * grad_z.abs()  # a kernel may round it to the dtype
    size, places = grad_z.abs(), (pattern.row_indices.long(), pattern.col_indices.long())
    results = {  # name: exact, sum of absolute values, error inherited from grad_z, length
        "grad_input": (grad_z @ weight, size @ weight.abs(), error @ weight.abs(), case.shape[0]),
        "grad_values": (
            *(blocks_of(t, case.block_size)[places] for t in (grad_z.T @ x, size.T @ x.abs(), error.T @ x.abs())),
            case.batch,
        ),
        "grad_bias": (grad_z.sum(0), size.sum(0), error.sum(0), case.batch),
    }
    for (name, (exact, magnitude, inherited, terms)), grad in zip(results.items(), grads, strict=False):
        bound = tolerance(dtype, terms, magnitude, exact) + inherited
        assert_within(grad, exact, bound, f"{case} {name}")
    outside = blocks_of(torch.ones(case.shape), case.block_size)[places] == 0
    if bool(grads[1][outside].any()):
        raise AssertionError(f"{case} grad_values: must be zero outside the matrix")


def _gradient_operands(case: LinearCase) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x``, ``grad_y``, and in float64 the blocks of the dense gradient and of the sum of its absolute values."""
    x, _, _, _, grad_y = case.operands()
    exact, size = (g.T @ t for g, t in ((grad_y.double(), x.double()), (grad_y.double().abs(), x.double().abs())))
    return x, grad_y, blocks_of(exact, case.block_size), blocks_of(size, case.block_size)


def check_norms(case: LinearCase) -> None:
    """block_gradient_squared_norms, whole and by slices of block rows, against float64. Raises AssertionError.

    Example:
        >>> import torch
        >>> from sparsenet.testing import LinearCase, check_norms
        >>> check_norms(LinearCase((48, 64), 16, torch.float32, batch=3, kind="none", activation="none", bias=False))
    """
    b, u = case.block_size, unit_roundoff(torch.float32)
    x, grad_y, gradient, size = _gradient_operands(case)
    norms = functional.block_gradient_squared_norms(x, grad_y, b)
    exact = gradient.square().sum((2, 3))
    # an entry g that errs by e adds at most 2 |g| e + e^2, together at most 2 |g|_2 |e|_2 + |e|_2^2
    e = (size * u * (min(case.batch, 6 * case.batch**0.5) + 4)).square().sum((2, 3)).sqrt()
    bound = 2 * exact.sqrt() * e + e.square() + exact * u * (b + 4)
    assert_within(norms, exact, bound, f"{case} norms")
    if norms.dtype != torch.float32:
        raise AssertionError(f"{case} norms: must be float32, got {norms.dtype}")
    middle = norms.shape[0] // 2
    parts = [functional.block_gradient_squared_norms(x, grad_y, b, r) for r in ((0, middle), (middle, norms.shape[0]))]
    if not torch.equal(torch.cat(parts), norms):
        raise AssertionError(f"{case} norms: slices of block rows differ from the whole")


def check_candidates(case: LinearCase) -> None:
    """candidate_gradients at unordered, repeated places against float64. Raises AssertionError.

    Example:
        >>> import torch
        >>> from sparsenet.testing import LinearCase, check_candidates
        >>> case = LinearCase((48, 64), 16, torch.float32, batch=3, kind="none", activation="none", bias=False)
        >>> check_candidates(case)
    """
    x, grad_y, gradient, size = _gradient_operands(case)
    generator = torch.Generator().manual_seed(case.seed)
    rows, cols = (torch.randint(n, (7,), generator=generator) for n in gradient.shape[:2])
    grads = functional.candidate_gradients(x, grad_y, rows, cols, case.block_size)
    exact = gradient[rows, cols]
    assert_within(grads, exact, tolerance(case.dtype, case.batch, size[rows, cols], exact), f"{case} candidates")


def self_test(block_sizes=BLOCK_SIZES, dtypes=DTYPES, shapes=SHAPES) -> int:
    """Checks every operation on every case, with one thread and with two in turns; returns how many cases ran.

    Raises:
        AssertionError: naming the case and the worst element.

    Example:
        >>> import torch
        >>> from sparsenet.testing import self_test
        >>> self_test([16], [torch.float32], [(48, 64)]) > 0   # whether this machine computes correctly
        True
    """
    checked = 0
    threads = torch.get_num_threads()
    try:
        for case in linear_cases(block_sizes, dtypes, shapes):
            torch.set_num_threads(1 + checked % 2)
            check_linear(case)
            check_norms(case)
            check_candidates(case)
            checked += 1
    finally:
        torch.set_num_threads(threads)
    return checked
