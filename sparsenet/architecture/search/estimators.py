"""Cheap estimates of how good an architecture will be, and how well each ranks architectures against full training.

Zero-cost scores of an untrained network: SynFlow (Tanaka et al. 2020), NASWOT (Mellor et al. 2021), gradient norm, SNIP
(Lee et al. 2019). Partial training: fewer epochs, less data, learning-curve extrapolation, inherited weights, effective
gradient flow (Tessera, Hooker, Rosman 2021). No estimate is trusted before ``compare_estimators`` has measured it.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from sparsenet import data as datasets
from sparsenet.architecture.search.space import Architecture, DensityMLP, weights_of
from sparsenet.architecture.search.trials import (
    TrialConfig,
    TrialData,
    TrialResult,
    effective_gradient_flow,
    train_trial,
)

__all__ = [
    "EstimatorRow",
    "compare_estimators",
    "extrapolate",
    "gradient_norm",
    "kendall",
    "naswot",
    "snip",
    "spearman",
    "synflow",
]


# --- zero-cost scores: larger should mean better ---


def synflow(model: DensityMLP) -> float:
    """Log of ``sum |theta * dR/dtheta|``, ``R = 1^T (prod |theta^l|) 1``: the flow through it, without data."""
    flow = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            parameter.zero_() if name.endswith("bias") else parameter.abs_()
    x = torch.ones(1, model.architecture.in_features, dtype=torch.float64)
    for linear, _, skip in zip(flow.linears, flow.after, flow.residual, strict=True):
        y = linear(x)  # norms and activations are left out: on positive signals relu is the identity
        x = x + y if skip else y
    weights = [weights_of(layer) for layer in flow.linears]
    gradients = torch.autograd.grad(x.sum(), weights)
    total = sum(float((w.detach() * g).abs().sum()) for w, g in zip(weights, gradients, strict=True))
    return math.log(total) if total > 0 else -math.inf


@torch.no_grad()
def naswot(model: DensityMLP, x: Tensor) -> float:
    """``log |det K|``, ``K_ij = N_A - hamming(c_i, c_j)`` of the binary activation codes of the inputs ``x`` [n,
    features].

    Only neurons that compaction keeps have a code: the dead ones of a sparse network are constant, so that they make
    all inputs alike and the score follows the nominal width. 0 for a network without hidden layers.
    """
    live = model.live_neurons()
    model = copy.deepcopy(model).train()
    codes, h = [], x
    for i, (linear, after, skip) in enumerate(zip(model.linears, model.after, model.residual, strict=True)):
        y = after(linear(h))
        h = h + y if skip else y
        if i < model.architecture.depth:
            codes.append((y[:, live[i]] > 0).double())
    if not codes:
        return 0.0
    code = torch.cat(codes, 1)
    kernel = code @ code.t() + (1 - code) @ (1 - code).t()
    return float(torch.linalg.slogdet(kernel).logabsdet)


def gradient_norm(model: DensityMLP, x: Tensor, y: Tensor) -> float:
    """Euclidean norm of the gradient of the cross-entropy on one batch, over the active weights."""
    return math.sqrt(sum(float(g.double().square().sum()) for _, g in _gradients(model, x, y)))


def snip(model: DensityMLP, x: Tensor, y: Tensor) -> float:
    """``sum |theta * dC/dtheta|`` on one batch, over the active weights."""
    return sum(float((w * g).abs().double().sum()) for w, g in _gradients(model, x, y))


def _gradients(model: DensityMLP, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    model = copy.deepcopy(model).train()
    weights = [weights_of(layer) for layer in model.linears]
    detached = [w.detach() for w in weights]
    return list(zip(detached, torch.autograd.grad(nn.functional.cross_entropy(model(x), y), weights), strict=True))


# --- partial training ---


def extrapolate(curve: Sequence[float], horizon: int) -> float:
    """The value at ``horizon`` of the power law ``a + b t^-c`` (t = 1, 2, ...) that fits ``curve`` best.

    Later points weigh more; c is searched on a grid, a and b follow by least squares. With fewer than three points, or
    beyond the horizon, the last value. ValueError for an empty curve.
    """
    if not len(curve):
        raise ValueError("extrapolate: curve must have at least one value, got none")
    if len(curve) < 3 or len(curve) >= horizon:
        return float(curve[-1])
    t, y = np.arange(1, len(curve) + 1, dtype=float), np.asarray(curve, dtype=float)
    weight = np.sqrt(t)
    best, answer = math.inf, float(y[-1])
    for c in np.linspace(0.25, 3.0, 12):
        basis = np.stack([np.ones_like(t), t**-c], 1)
        (a, b), *_ = np.linalg.lstsq(basis * weight[:, None], y * weight, rcond=None)
        misfit = float((weight * (a + b * t**-c - y)).__pow__(2).sum())
        if misfit < best:
            best, answer = misfit, float(a + b * float(horizon) ** -c)
    return answer


# --- ranks ---


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 0; equal values share their mean rank."""
    array = np.asarray(values, dtype=float)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return ((ends - counts) + (ends - 1))[inverse] / 2.0


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation in [-1, 1]; NaN when one side is constant. ValueError for other lengths or NaN."""
    _check_pair("spearman", a, b)
    ra, rb = _ranks(a), _ranks(b)
    ra, rb = ra - ra.mean(), rb - rb.mean()
    norm = math.sqrt(float((ra**2).sum() * (rb**2).sum()))
    return float((ra * rb).sum()) / norm if norm else math.nan


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b in [-1, 1]; NaN when one side is constant. ValueError for other lengths or NaN."""
    _check_pair("kendall", a, b)
    x, y = _ranks(a), _ranks(b)
    sx, sy = np.sign(x[:, None] - x[None]), np.sign(y[:, None] - y[None])
    norm = math.sqrt(float((sx**2).sum() * (sy**2).sum()))
    return float((sx * sy).sum()) / norm if norm else math.nan


def _check_pair(owner: str, a: Sequence[float], b: Sequence[float]) -> None:
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"{owner}: a and b must have one length of at least 2, got {len(a)} and {len(b)}")
    if any(math.isnan(v) for v in (*a, *b)):
        raise ValueError(f"{owner}: a and b must not contain nan, got nan")


# --- the comparison ---


@dataclass(frozen=True)
class EstimatorRow:
    """One estimator against the truth: rank correlations with accuracy and negative loss, seconds per network."""

    name: str
    spearman_accuracy: float
    kendall_accuracy: float
    spearman_loss: float
    seconds: float
    scores: list[float]


class _Scores:
    """What every estimator said about every architecture, and the seconds it took."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}
        self.seconds: dict[str, float] = {}

    def add(self, name: str, measure: Callable[[], float], seconds: float | None = None) -> None:
        """Scores one architecture; ``seconds``: what it took, where ``measure`` only reads it off."""
        started = time.perf_counter()
        self.values.setdefault(name, []).append(measure())
        taken = time.perf_counter() - started if seconds is None else seconds
        self.seconds[name] = self.seconds.get(name, 0.0) + taken


def compare_estimators(
    architectures: Sequence[Architecture],
    data: TrialData,
    config: TrialConfig,
    *,
    short_epochs: int = 2,
    report: Callable[[str], None] | None = None,
) -> tuple[list[EstimatorRow], list[tuple[float, float]]]:
    """Scores every architecture with every estimator and trains it in full.

    Returns the table and the truth, (loss, accuracy) per architecture. ValueError for fewer than 4 architectures.
    """
    if len(architectures) < 4:
        raise ValueError(f"compare_estimators: architectures must be at least 4, got {len(architectures)}")
    full = replace(config, train_fraction=1.0)
    models: list[DensityMLP] = []
    results: list[TrialResult] = []
    for architecture in architectures:
        results.append(train_trial(architecture, data, full, model_out=models))
        if report is not None:
            done = f"{len(results)}/{len(architectures)} {architecture.active_weights} weights"
            report(f"{done}: {results[-1].accuracy:.4f}")
    scores = _Scores()
    for i, (architecture, result) in enumerate(zip(architectures, results, strict=True)):
        others = [m for j, m in enumerate(models) if j != i and m.architecture.depth == architecture.depth]
        donor = min(others, key=lambda m: architecture.distance(m.architecture), default=None)
        _zero_cost(architecture, data, config, scores)
        _short(architecture, data, full, short_epochs, donor, scores)
        _early(result, full.epochs, scores)
    truth = [(result.loss, result.accuracy) for result in results]
    scores.values["full training"] = [accuracy for _, accuracy in truth]
    scores.seconds["full training"] = sum(result.seconds for result in results)
    accuracy, gain = [a for _, a in truth], [-loss for loss, _ in truth]
    rows = [
        EstimatorRow(
            name,
            spearman(values, accuracy),
            kendall(values, accuracy),
            spearman(values, gain),
            scores.seconds[name] / len(values),
            values,
        )
        for name, values in scores.values.items()
    ]
    return rows, truth


def _zero_cost(architecture: Architecture, data: TrialData, config: TrialConfig, scores: _Scores) -> None:
    """Scores of the untrained network, on one batch of 128 examples."""
    model = architecture.build(
        block_size=config.block_size, norm=config.norm, residual=config.residual, seed=config.seed
    )
    x, y = next(
        datasets.batches(
            data.train.x,
            data.train.y,
            128,
            normalization=data.normalization,
            shuffle=True,
            generator=torch.Generator().manual_seed(config.seed),
        )
    )
    scores.add("active weights (no network)", lambda: float(architecture.active_weights))
    scores.add("SynFlow", lambda: synflow(model))
    scores.add("NASWOT", lambda: naswot(model, x))
    scores.add("gradient norm", lambda: gradient_norm(model, x, y))
    scores.add("SNIP", lambda: snip(model, x, y))
    scores.add("effective gradient flow, untrained", lambda: gradient_flow_at(model, x, y))


def _short(
    architecture: Architecture,
    data: TrialData,
    full: TrialConfig,
    epochs: int,
    donor: DensityMLP | None,
    scores: _Scores,
) -> None:
    """Scores of trainings of their own: fewer epochs, less data, weights of the nearest other architecture."""
    short = replace(full, epochs=epochs)
    fifth, single = replace(short, train_fraction=0.2), replace(short, epochs=1, train_fraction=0.2)
    flows: list[float] = []

    def few_examples() -> float:
        result = train_trial(architecture, data, fifth)
        flows.append(result.gradient_flow)
        return result.accuracy

    scores.add(f"{epochs} epochs", lambda: train_trial(architecture, data, short).accuracy)
    scores.add(f"20 % of the data, {epochs} epochs", few_examples)
    scores.add("effective gradient flow of that run", flows.pop, 0.0)
    scores.add("20 % of the data, 1 epoch", lambda: train_trial(architecture, data, single).accuracy)
    scores.add(
        "20 % of the data, 1 epoch, inherited weights",
        lambda: train_trial(architecture, data, single, donor=donor).accuracy,
    )


def _early(result: TrialResult, epochs: int, scores: _Scores) -> None:
    """What the pruners see: the first epochs of the full training itself."""
    curve = [accuracy for _, _, accuracy in result.curve]
    third = max(1, min(3, epochs - 1))
    each = result.seconds / epochs
    scores.add("epoch 1 of the full training (first rung)", lambda: curve[0], each)
    scores.add(f"epoch {third} of the full training (second rung)", lambda: curve[third - 1], third * each)
    scores.add(f"extrapolated from epochs 1 to {third}", lambda: extrapolate(curve[:third], epochs), third * each)


def gradient_flow_at(model: nn.Module, x: Tensor, y: Tensor, p: float = 2.0, normalise: str | None = None) -> float:
    """Effective gradient flow of ``model`` on one batch; its gradients are left as they were."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    nn.functional.cross_entropy(twin(x), y).backward()
    return effective_gradient_flow(twin, p, normalise)
