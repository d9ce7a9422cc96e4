"""The other operations: block norms of the dense gradient, candidate gradients, patterns, compaction."""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch
from torch import Tensor

from sparsenet import functional, reference
from sparsenet.benchmark.cases import Case
from sparsenet.benchmark.goals import norms_goal
from sparsenet.benchmark.rivals import Operands
from sparsenet.benchmark.timing import Contender, Timings, rotated, rotations
from sparsenet.benchmark.trial import OURS, Trial
from sparsenet.compaction.reblocking import reblock
from sparsenet.pattern import BlockPattern

__all__ = ["COMPACT_PHASES", "NORMS_PHASES", "PATTERN_PHASES", "compact_trial", "norms_trial", "pattern_trial"]

NORMS_PHASES = ("norms", "candidates")
PATTERN_PHASES = ("random", "from_places", "from_mask", "top_k")
COMPACT_PHASES = ("remove_units",)
_KEPT_UNITS = 0.75
_MOMENTS = 3  # tensors that move: values and Adam's two moments


def _share_of_dense(timings: Timings) -> dict[str, float]:
    share = timings.ratio(OURS, "dense")
    return {"share_of_dense": share.median, "share_of_dense_lower": share.lower, "share_of_dense_upper": share.upper}


# --- block_gradient_squared_norms -----------------------------------------------------------------------------------


def norms_trial(phase: str, case: Case) -> Trial:
    """``norms`` of all blocks, or ``candidates``: gradients of ``density`` of all places; against a dense product.

    ``dense``: the dense weight gradient alone. ``dense_then_norms``: that and the norms of its blocks, as RigL does it.
    """
    element = torch.finfo(case.torch_dtype).bits // 8
    operands = _operands(case.shape, case.batch, case.dtype, rotations(element * case.batch * sum(case.shape)))
    b = case.block_size
    pairs = list(zip(operands.x, operands.grad, strict=True))

    def every(function) -> Contender:
        return Contender(rotated([lambda x=x, g=g: function(x, g) for x, g in pairs]))

    places = {}
    if phase == "norms":
        ours = every(lambda x, g: functional.block_gradient_squared_norms(x, g, b))
    else:
        pattern = case.block_pattern()
        rows, cols = pattern.row_indices, pattern.col_indices
        ours = every(lambda x, g: functional.candidate_gradients(x, g, rows, cols, b))
        places = {"density": round(pattern.density, 6)}
    contenders = {OURS: ours, "dense": every(lambda x, g: g.t() @ x)}
    if phase == "norms" and not (case.shape[0] % b or case.shape[1] % b):
        contenders["dense_then_norms"] = every(lambda x, g: _norms_of_blocks(g.t() @ x, b))

    def derive(timings: Timings) -> dict[str, float]:
        metrics = _share_of_dense(timings)
        if places:
            metrics["eff"] = timings.ratio("dense", OURS).median * places["density"]
            flops = 2.0 * case.batch * pattern.num_blocks * b * b
            metrics["active_gflops"] = 1e-9 * flops / timings.time(OURS).median
        return metrics

    fields = {k: v for k, v in case.fields().items() if k not in ("density", "pattern")} | places
    return Trial(
        op="block_gradient_squared_norms",
        phase=phase,
        case=fields | {"threads": torch.get_num_threads()},
        contenders=contenders,
        derive=derive,
        goal=norms_goal(case) if phase == "norms" else None,
    )


@lru_cache(maxsize=1)
def _operands(shape: tuple[int, int], batch: int, dtype: str, copies: int) -> Operands:
    return Operands(Case(shape, batch, dtype=dtype), copies)


def _norms_of_blocks(gradient: Tensor, b: int) -> Tensor:
    rows, cols = gradient.shape
    return gradient.float().square_().reshape(rows // b, b, cols // b, b).sum((1, 3))


# --- block_pattern --------------------------------------------------------------------------------------------------


def pattern_trial(phase: str, case: Case) -> Trial:
    """Building a pattern, validated and transposed: ``random``, ``from_places``, ``from_mask``; and choosing ``top_k``.

    ``torch_bsr``: ``to_sparse_bsr`` of a dense matrix, for what torch offers instead. ``torch_topk``: the rival of
    ``top_k``, which has to break ties by index and therefore does more.
    """
    shape, b = case.shape, case.block_size
    pattern = case.block_pattern()
    shuffle = torch.randperm(pattern.num_blocks, generator=torch.Generator().manual_seed(0))
    rows, cols, mask = pattern.row_indices[shuffle], pattern.col_indices[shuffle], pattern.to_mask()
    scores = torch.rand(mask.numel(), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    ours = {
        "random": lambda: BlockPattern.random(shape, case.density, b, generator),
        "from_places": lambda: BlockPattern.from_places(rows, cols, shape, b),
        "from_mask": lambda: BlockPattern.from_mask(mask, b, shape),
        "top_k": lambda: functional.select_extreme(scores, pattern.num_blocks, largest=True),
    }
    contenders, reference_name = {OURS: Contender(ours[phase])}, ""
    if phase == "top_k":
        reference_name = "torch_topk"
        contenders[reference_name] = Contender(lambda: scores.topk(pattern.num_blocks).indices.sort().values)
    elif phase == "from_mask" and not (shape[0] % b or shape[1] % b) and shape[0] * shape[1] <= 2**26:
        reference_name = "torch_bsr"
        weight = mask.repeat_interleave(b, 0).repeat_interleave(b, 1).float()
        contenders[reference_name] = Contender(lambda: weight.to_sparse_bsr((b, b)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is beta, said once
            contenders[reference_name].call()
    counted = mask.numel() if phase == "top_k" else pattern.num_blocks
    fields = {k: v for k, v in case.fields().items() if k not in ("batch", "dtype")}
    return Trial(
        op="block_pattern",
        phase=phase,
        case=fields | {"density": round(pattern.density, 6)},
        contenders=contenders,
        derive=lambda timings: {"ns_per_block": 1e9 * timings.time(OURS).median / max(counted, 1)},
        reference=reference_name,
    )


# --- compact_blocks -------------------------------------------------------------------------------------------------


def compact_trial(phase: str, case: Case) -> Trial:
    """A quarter of the units goes, at random on both sides: values and two moments gathered into the new blocks.

    ``dense``: the same rows and columns taken from three dense matrices. ``reference``: sparsenet.reference's gather.
    """
    old, b = case.block_pattern(), case.block_size
    generator = torch.Generator().manual_seed(0)
    rows, cols = (torch.randperm(n, generator=generator)[: round(_KEPT_UNITS * n)].sort().values for n in case.shape)
    new = reblock(old, rows, cols).pattern()
    operands = Operands(Case(case.shape, 1, dtype=case.dtype), 1)
    tensors = [operands.normal(old.num_blocks, b, b) for _ in range(_MOMENTS)]
    dense = [operands.normal(*case.shape) for _ in range(_MOMENTS)]
    element = tensors[0].element_size()
    bytes_moved = element * _MOMENTS * b * b * (old.num_blocks + new.num_blocks)
    contenders = {
        OURS: Contender(lambda: functional.compact_blocks(tensors, old, rows, cols, new)),
        "dense": Contender(lambda: [t[rows][:, cols] for t in dense]),
        "reference": Contender(lambda: reference.compact_blocks(tensors, old, rows, cols, new)),
    }

    def derive(timings: Timings) -> dict[str, float]:
        return {
            "gbytes": 1e-9 * bytes_moved / timings.time(OURS).median,
            "eff": timings.ratio("dense", OURS).median * old.density,
        }

    fields = {k: v for k, v in case.fields().items() if k != "batch"}
    case_fields = fields | {"density": round(old.density, 6), "threads": torch.get_num_threads()}
    return Trial("compact_blocks", phase, case_fields, contenders, derive)
