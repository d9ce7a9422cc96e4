"""The goals that figures are held against, in one place.

``eff`` is (density x dense time) / sparse time: 1 where work saved is time saved. Dense is ``nn.Linear``'s own product
in the same dtype, race and number of threads. A goal that is missed fails nothing: it is shown beside the figure.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsenet.benchmark.cases import Case

__all__ = ["GOALS", "Goal", "eff_goal", "norms_goal", "sparselab_goal"]

_LEAST_FLOPS = 1e9  # smaller calls have no goal of eff
_AVX2_SHARE = 0.9
_BFLOAT16_EFF = {16: 0.75, 32: 0.90, 64: 0.95, 128: 0.95}


@dataclass(frozen=True)
class Goal:
    """``metric`` must be at least ``value``, or at most."""

    metric: str
    value: float
    at_most: bool = False

    def met(self, measured: float) -> bool:
        """Whether ``measured`` reaches it."""
        return measured <= self.value if self.at_most else measured >= self.value

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.value:.3g}"


GOALS = {
    "rewire": Goal("milliseconds", 10.0, at_most=True),  # 8192 x 8192 at 1 %, scores excluded
    "overhead forward": Goal("overhead_us", 10.0, at_most=True),  # 32 x 32, over nn.Linear, one thread
    "overhead step": Goal("overhead_us", 20.0, at_most=True),
    "threads": Goal("share_of_dense_scaling", 1.85 / 1.95),  # 1 to 2 threads; dense scales by 1.95 on an idle machine
    "training adamw 0.1": Goal("speedup", 9.5),  # 784-4096-4096-4096-10, batch 256, b=32, rewired every 100 steps
    "training adamw 0.05": Goal("speedup", 16.0),
    "training adamw_fused 0.1": Goal("speedup", 8.5),
}


def eff_goal(phase: str, case: Case, density: float, isa: str) -> Goal | None:
    """The goal of a phase of ``block_sparse_linear``; None where there is none.

    Up to batch 16 it is the bandwidth of a plain copy that counts, above that ``eff``.

    Args:
        phase: forward, grad_input or grad_weight.
        density: active blocks / all, of the pattern that was made; limits are of the density asked for.
        isa: the instruction set in use.
    """
    b, (out_features, in_features) = case.block_size, case.shape
    if phase not in ("forward", "grad_input", "grad_weight") or b < 16:
        return None
    if case.batch <= 16:
        return Goal("copy_share", 0.80 if case.batch <= 8 else 0.65)
    if 2 * case.batch * out_features * in_features * density < _LEAST_FLOPS:
        return None
    if case.dtype == "float32":
        width = in_features if phase == "grad_input" else out_features
        value = None if phase == "grad_weight" and case.density < 0.05 else _float32_eff(phase, b, density, width)
    elif case.dtype == "bfloat16" and isa == "avx512bf16":
        value = _BFLOAT16_EFF[b] if case.density >= 0.1 and out_features >= 2048 else None
    else:
        value = None
    if value is None or isa == "portable":
        return None
    return Goal("eff", value * (_AVX2_SHARE if isa == "avx2" else 1.0))


def _float32_eff(phase: str, b: int, density: float, width: int) -> float:
    if phase == "grad_weight":
        return 1.05 if b == 16 else 1.10
    return 1.15 / (1 + 45 / (width * density)) * (0.92 if b == 16 else 1.0)


def norms_goal(case: Case) -> Goal:
    """Time of the block norms / time of a dense weight gradient."""
    gram = case.batch <= 512 and case.block_size >= 32 and case.dtype == "float32"
    return Goal("share_of_dense", 0.35 if gram else 1.1, at_most=True)


def sparselab_goal() -> Goal:
    """Block sizes 1, 4 and 8: SparseLab's time / ours."""
    return Goal("speedup_over_sparselab", 1.0)
