"""block_sparse_linear against dense and its rivals: forward, grad_input, grad_weight, and the step of all three."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from sparsenet.benchmark import machine
from sparsenet.benchmark.cases import Case
from sparsenet.benchmark.goals import eff_goal, sparselab_goal
from sparsenet.benchmark.rivals import RIVALS, Operands, rival
from sparsenet.benchmark.timing import Contender, Timings, rotated, rotations
from sparsenet.benchmark.trial import OURS, Trial, Unavailable
from sparsenet.functional.autograd import block_sparse_linear
from sparsenet.functional.native import native_build_info

__all__ = ["PHASES", "trial"]

PHASES = ("forward", "grad_input", "grad_weight", "step")
_PRODUCTS = {"forward": 1, "grad_input": 1, "grad_weight": 1, "step": 3}
_SMALL_BATCH = 16  # up to here bandwidth is what counts, and a plain copy runs in the race


def trial(phase: str, case: Case, rivals: Sequence[str] = ("dense",)) -> Trial:
    """A trial of one phase; no bias and no activation on either side.

    Args:
        phase: one of :data:`PHASES`; ``step`` is forward and both gradients through autograd, without an optimizer.
        rivals: names in :data:`~sparsenet.benchmark.rivals.RIVALS`.

    Raises:
        ValueError: an unknown phase or rival.
    """
    for name, known, what in ((phase, PHASES, "phase"), *((r, RIVALS, "rival") for r in rivals)):
        if name not in known:
            raise ValueError(f"bench: {what} must be one of {', '.join(known)}, got {name!r}")
    pattern = case.block_pattern()
    operands = _operands(case)
    values = [operands.normal(pattern.num_blocks, case.block_size, case.block_size) for _ in range(operands.copies)]

    def multiply(x, values):
        return block_sparse_linear(x, values, pattern)

    contenders = {OURS: Contender(operands.rotated(phase, multiply, values))}
    left_out = {}
    for name in rivals:
        try:
            contenders[name] = rival(name, phase, case, operands)
        except Unavailable as reason:
            left_out[name] = str(reason)
    traffic = _bytes_moved(case, pattern.num_blocks, phase)
    if case.batch <= _SMALL_BATCH:
        contenders["copy"] = _copy(traffic)
    goal = eff_goal(phase, case, pattern.density, native_build_info()["isa"])
    if case.block_size < 16 and "sparselab" in contenders:
        goal = sparselab_goal()
    active = pattern.num_blocks * case.block_size**2
    return Trial(
        op="block_sparse_linear",
        phase=phase,
        case=case.fields() | {"density": round(pattern.density, 6), "threads": torch.get_num_threads()},
        contenders=contenders,
        derive=lambda timings: _metrics(
            timings, case, pattern.density, 2.0 * _PRODUCTS[phase] * case.batch * active, traffic
        ),
        goal=goal,
        left_out=left_out,
    )


@lru_cache(maxsize=1)
def _operands_of(shape: tuple[int, int], batch: int, dtype: str, copies: int) -> Operands:
    return Operands(Case(shape, batch, dtype=dtype), copies)


def _operands(case: Case) -> Operands:
    element = torch.finfo(case.torch_dtype).bits // 8
    active = case.block_pattern().num_blocks * case.block_size**2
    copies = rotations(element * (case.batch * sum(case.shape) + active))
    return _operands_of(case.shape, case.batch, case.dtype, copies)


def _bytes_moved(case: Case, num_blocks: int, phase: str) -> float:
    """The least traffic of a phase: each operand read once, each result written once."""
    element = torch.finfo(case.torch_dtype).bits // 8
    values = num_blocks * case.block_size**2
    x, y = case.batch * case.shape[1], case.batch * case.shape[0]
    return element * float({"step": 3 * (values + x + y)}.get(phase, values + x + y))


def _copy(traffic: float) -> Contender:
    """A plain copy that reads and writes ``traffic`` bytes together."""
    count = max(1, round(traffic / 2))
    pairs = [(torch.ones(count, dtype=torch.uint8), torch.zeros(count, dtype=torch.uint8))]
    pairs += [(a.clone(), b.clone()) for a, b in pairs * (rotations(2 * count) - 1)]
    return Contender(rotated([lambda a=a, b=b: b.copy_(a) for a, b in pairs]))


def _metrics(timings: Timings, case: Case, density: float, flops: float, traffic: float) -> dict[str, float]:
    seconds = timings.time(OURS).median
    metrics = {"active_gflops": 1e-9 * flops / seconds}
    least = machine.ceilings().roofline_seconds(case.dtype, flops, traffic)
    if least is not None:
        metrics["roofline_share"] = least / seconds
    for name, metric in (("dense", "eff"), ("dense_onednn", "eff_onednn")):
        if name in timings.seconds:
            ratio = timings.ratio(name, OURS).scaled(density)
            metrics[metric] = ratio.median
            if name == "dense":
                metrics |= {"eff_lower": ratio.lower, "eff_upper": ratio.upper}
    if "copy" in timings.seconds:
        metrics["copy_share"] = timings.ratio("copy", OURS).median
    if "sparselab" in timings.seconds:
        metrics["speedup_over_sparselab"] = timings.ratio("sparselab", OURS).median
    return metrics
