"""What block_sparse_linear is measured against. A rival that cannot take part raises :class:`Unavailable`.

``dense``: ``nn.Linear``'s product. ``dense_onednn``: the same product by oneDNN's own kernel, which torch reaches only
through an operator that its compiler uses for frozen inference. ``equal_parameter_dense``: a smaller dense layer with
as many weights. ``masked_dense``: what libraries that simulate sparsity do. ``torch_bsr``: ``torch.sparse_bsr``.
``sparselab``: the SparseLab package, unstructured sparsity of the same density.
"""

from __future__ import annotations

import ctypes
import math
import re
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsenet.benchmark.cases import Case
from sparsenet.benchmark.timing import Contender, rotated
from sparsenet.benchmark.trial import Unavailable

__all__ = ["RIVALS", "Operands", "phase_call", "rival"]

_SPARSELAB_LARGEST = 2**24 + 1  # elements; it is built through a dense matrix
_SPARSELAB_SETTLE_SECONDS = 0.02  # its own OpenMP runtime spins for some milliseconds after each call
Multiply = Callable[[Tensor, Tensor], Tensor]


class Operands:
    """Random x [batch, in] and grad [batch, out], ``copies`` times, so that rotation leaves the caches behind."""

    def __init__(self, case: Case, copies: int):
        self.case = case
        self.generator = torch.Generator().manual_seed(1)
        self.x = [self.normal(case.batch, case.shape[1]) for _ in range(copies)]
        self.grad = [self.normal(case.batch, case.shape[0]) for _ in range(copies)]

    @property
    def copies(self) -> int:
        """Sets of operands."""
        return len(self.x)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers of the case's dtype."""
        return torch.randn(*shape, generator=self.generator).to(self.case.torch_dtype)

    def rotated(self, phase: str, multiply: Multiply, weights: Sequence[Tensor]) -> Callable[[], object]:
        """One call of ``phase`` of ``multiply``, on the next x, gradient and weight each time."""
        sets = zip(self.x, self.grad, (weights[i % len(weights)] for i in range(self.copies)), strict=True)
        return rotated([phase_call(phase, multiply, x, weight, grad) for x, grad, weight in sets])


def phase_call(phase: str, multiply: Multiply, x: Tensor, weight: Tensor, grad: Tensor) -> Callable[[], object]:
    """``phase`` of y = multiply(x, weight): forward, one gradient alone, or ``step``: forward and both gradients."""
    x, weight = x.detach(), weight.detach()
    if phase == "forward":
        return torch.no_grad()(lambda: multiply(x, weight))
    x.requires_grad_(phase != "grad_weight")
    weight.requires_grad_(phase != "grad_input")
    if phase == "step":
        return lambda: torch.autograd.grad(multiply(x, weight), (x, weight), grad)
    y, wanted = multiply(x, weight), x if phase == "grad_input" else weight
    return lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True)


@lru_cache(maxsize=1)
def _dense_weight(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def _dense(phase: str, case: Case, operands: Operands) -> Contender:
    return Contender(operands.rotated(phase, F.linear, [_dense_weight(case.shape, case.torch_dtype)]))


def _dense_onednn(phase: str, case: Case, operands: Operands) -> Contender:
    try:
        linear = torch.ops.mkldnn._linear_pointwise
        linear(torch.ones(2, 2), torch.ones(2, 2), None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError) as error:
        raise Unavailable("this torch has no operator for it") from error
    if case.torch_dtype not in (torch.float32, torch.bfloat16):
        raise Unavailable(f"not for {case.dtype}")

    def multiply(a: Tensor, b: Tensor) -> Tensor:  # a @ b.T
        return linear(a, b, None, "none", [], "")

    weight = _dense_weight(case.shape, case.torch_dtype)
    products = {
        "forward": lambda x, grad: multiply(x, weight),
        "grad_input": lambda x, grad: multiply(grad, weight.t()),
        "grad_weight": lambda x, grad: multiply(grad.t(), x.t()),
    }
    chosen = list(products.values()) if phase == "step" else [products[phase]]

    def call(x: Tensor, grad: Tensor) -> Callable[[], object]:
        return torch.no_grad()(lambda: [product(x, grad) for product in chosen])

    return Contender(rotated([call(x, grad) for x, grad in zip(operands.x, operands.grad, strict=True)]))


def _masked_dense(phase: str, case: Case, operands: Operands) -> Contender:
    weight = _dense_weight(case.shape, case.torch_dtype)
    blocks = case.block_pattern().to_mask()
    mask = blocks.repeat_interleave(case.block_size, 0).repeat_interleave(case.block_size, 1)
    mask = mask[: case.shape[0], : case.shape[1]].to(weight.dtype)
    return Contender(operands.rotated(phase, lambda x, w: F.linear(x, w * mask), [weight]))


def _equal_parameter_dense(phase: str, case: Case, operands: Operands) -> Contender:
    share = math.sqrt(case.block_pattern().density)
    out_features, in_features = (max(1, round(n * share)) for n in case.shape)
    smaller = Operands(Case((out_features, in_features), case.batch, dtype=case.dtype), operands.copies)
    weights = [smaller.normal(out_features, in_features) for _ in range(operands.copies)]
    return Contender(smaller.rotated(phase, F.linear, weights))


def _torch_bsr(phase: str, case: Case, operands: Operands) -> Contender:
    if phase not in ("forward", "grad_input"):
        raise Unavailable("torch has no gradient of a BSR matrix on the CPU")
    if case.shape[0] % case.block_size or case.shape[1] % case.block_size:
        raise Unavailable("sizes must divide by the block size")
    pattern = case.block_pattern()
    rows, cols, shape = pattern.row_indices, pattern.col_indices, case.shape
    if phase == "grad_input":  # the transposed matrix, which the caller of torch has to build
        rows, cols, shape = cols, rows, shape[::-1]
        order = torch.argsort(rows.long() * (shape[1] // case.block_size) + cols.long())
        rows, cols = rows[order], cols[order]
    crow = torch.zeros(shape[0] // case.block_size + 1, dtype=torch.int32)
    crow[1:] = torch.bincount(rows.long(), minlength=len(crow) - 1).cumsum(0)
    values = operands.normal(pattern.num_blocks, case.block_size, case.block_size)
    dense_rows = operands.x if phase == "forward" else operands.grad
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is beta
            matrix = torch.sparse_bsr_tensor(crow, cols, values, shape, check_invariants=True)
        matrix @ dense_rows[0][:1].t()
    except (RuntimeError, NotImplementedError) as error:
        raise Unavailable(str(error).splitlines()[0][:100]) from error
    return Contender(rotated([torch.no_grad()(lambda x=x: (matrix @ x.t()).t()) for x in dense_rows]))


def _sparselab(phase: str, case: Case, operands: Operands) -> Contender:
    layer = _sparselab_layer(case.shape, case.block_pattern().density, case.dtype)
    if phase not in ("forward", "step"):
        raise Unavailable("its backward always makes both gradients")
    set_sparselab_threads(torch.get_num_threads())
    (weight,) = layer.parameters()

    def call(x: Tensor, grad: Tensor) -> Callable[[], object]:
        x = x.detach().requires_grad_(phase == "step")
        if phase == "forward":
            return torch.no_grad()(lambda: layer(x))
        return lambda: torch.autograd.grad(layer(x), (x, weight), grad)

    calls = [call(x, grad) for x, grad in zip(operands.x, operands.grad, strict=True)]
    return Contender(rotated(calls), settle_seconds=_SPARSELAB_SETTLE_SECONDS)


def _sparselab_layer(shape: tuple[int, int], density: float, dtype: str) -> torch.nn.Module:
    try:
        import sparselab
    except ImportError as error:
        raise Unavailable("not installed: pip install 'sparsenet[bench]'") from error
    if dtype != "float32":
        raise Unavailable("float32 only")
    if density >= 1.0 or shape[0] * shape[1] > _SPARSELAB_LARGEST:
        raise Unavailable("it is built through a dense matrix, too slow at this size or density")
    return sparselab.SparseLinear(shape[1], shape[0], bias=False, sparsity=1.0 - density)


def set_sparselab_threads(threads: int) -> None:
    """Its wheel brings an OpenMP runtime of its own, which torch.set_num_threads does not reach."""
    for path in set(re.findall(r"\S*/sparselab\.libs/libgomp\S*", Path("/proc/self/maps").read_text())):
        ctypes.CDLL(path).omp_set_num_threads(threads)


RIVALS: dict[str, Callable[[str, Case, Operands], Contender]] = {
    "dense": _dense,
    "dense_onednn": _dense_onednn,
    "equal_parameter_dense": _equal_parameter_dense,
    "masked_dense": _masked_dense,
    "torch_bsr": _torch_bsr,
    "sparselab": _sparselab,
}


def rival(name: str, phase: str, case: Case, operands: Operands) -> Contender:
    """The contender of that name; raises Unavailable when it cannot take part."""
    return RIVALS[name](phase, case, operands)
