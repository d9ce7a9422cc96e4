"""Times the block-sparse linear layer against a dense one, in turns, so that both see the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsenet.functional import block_gradient_squared_norms, block_sparse_linear
from sparsenet.pattern import BlockPattern

__all__ = ["OPS", "BenchRow", "bench", "table"]

OPS = ("forward", "grad_input", "grad_values", "backward", "norms")
_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class BenchRow:
    """One comparison. ``efficiency``: dense time * density / sparse time, 1 where work saved is time saved."""

    op: str
    out_features: int
    in_features: int
    batch: int
    density: float
    block_size: int
    dtype: str
    sparse_ms: float
    dense_ms: float
    speedup: float
    efficiency: float
    sparse_gflops: float


def bench(
    op: str = "forward",
    shape: tuple[int, int] = (2048, 2048),
    batch: int = 512,
    density: float = 0.1,
    block_size: int = 32,
    dtype: str = "float32",
    seconds: float = 1.0,
) -> BenchRow:
    """Medians of interleaved calls over about ``seconds``.

    Args:
        op: ``forward``; ``grad_input``, ``grad_values`` or both (``backward``); ``norms``: of the dense weight
            gradient's blocks against the dense weight gradient itself.
        shape: (out, in). dtype: by name.

    Raises:
        ValueError: an unknown op or dtype, or sizes out of range.
    """
    if op not in OPS:
        raise ValueError(f"bench: op must be one of {', '.join(OPS)}, got {op!r}")
    if dtype not in _DTYPES:
        raise ValueError(f"bench: dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    if batch < 1:
        raise ValueError(f"bench: batch must be at least 1, got {batch}")
    sparse, dense, active = _calls(op, shape, batch, density, block_size, getattr(torch, dtype))
    times: dict[Callable[[], object], list[float]] = {sparse: [], dense: []}
    for call in times:
        call()
    begin = time.perf_counter()
    while len(times[dense]) < 5 or time.perf_counter() - begin < seconds:
        for call, taken in times.items():
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    sparse_s, dense_s = (statistics.median(taken) for taken in times.values())
    products = (2 if op == "backward" else 1) * batch * (shape[0] * shape[1] if op == "norms" else active)
    share = 1.0 if op == "norms" else active / max(shape[0] * shape[1], 1)
    return BenchRow(
        op, *shape, batch, density, block_size, dtype,
        sparse_ms=1e3 * sparse_s,
        dense_ms=1e3 * dense_s,
        speedup=dense_s / sparse_s,
        efficiency=dense_s * share / sparse_s,
        sparse_gflops=2e-9 * products / sparse_s,
    )  # fmt: skip


def _calls(
    op: str, shape: tuple[int, int], batch: int, density: float, block_size: int, dtype: torch.dtype
) -> tuple[Callable[[], object], Callable[[], object], int]:
    """The sparse call, the dense call, and the number of active weights."""
    generator = torch.Generator().manual_seed(0)
    pattern = BlockPattern.random(shape, density, block_size, generator)
    values = torch.randn(pattern.num_blocks, block_size, block_size, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    x = torch.randn(batch, shape[1], generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(batch, shape[0], generator=generator).to(dtype)
    active = pattern.num_blocks * block_size**2
    if op == "forward":
        return (
            _without_graph(lambda: block_sparse_linear(x, values, pattern)),
            _without_graph(lambda: x @ weight.T),
            active,
        )
    if op == "norms":
        rows = x.detach()
        return lambda: block_gradient_squared_norms(rows, grad, block_size), lambda: grad.T @ rows, active

    def backward(y: Tensor, weights: Tensor) -> Callable[[], object]:
        wanted = {"grad_input": [x], "grad_values": [weights], "backward": [x, weights]}[op]
        return lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True)

    return backward(block_sparse_linear(x, values, pattern), values), backward(x @ weight.T, weight), active


def _without_graph(call: Callable[[], object]) -> Callable[[], object]:
    @torch.no_grad()
    def quiet() -> object:
        return call()

    return quiet


def table(rows: Sequence[BenchRow]) -> str:
    """The rows as text."""
    lines = [
        f"{'op':<12}{'out x in':>14}{'batch':>7}{'density':>9}{'block':>6}{'dtype':>10}"
        f"{'sparse ms':>11}{'dense ms':>10}{'speedup':>9}{'eff':>6}{'GFLOP/s':>9}"
    ]
    for row in rows:
        shape = f"{row.out_features} x {row.in_features}"
        lines.append(
            f"{row.op:<12}{shape:>14}{row.batch:>7}{row.density:>9.3f}{row.block_size:>6}{row.dtype:>10}"
            f"{row.sparse_ms:>11.3f}{row.dense_ms:>10.3f}{row.speedup:>9.2f}{row.efficiency:>6.2f}{row.sparse_gflops:>9.1f}"
        )
    return "\n".join(lines)
