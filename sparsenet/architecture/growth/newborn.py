"""What new units are: how their weights start, so that the network computes what it did and they learn at once.

Every rule keeps the function. New units have random weights and are heard with weights of zero (``zero``); or they come
in pairs of equal units that are heard with opposite signs, so that they cancel and yet both sides of them have a
gradient (``pairs``); or they are copies of others that share what these said (``split``). The random weights of a pair
are mixtures of two old units' weights, disturbed: in a network that has learnt something, entirely random directions
see and say little that matters: 200 steps later their gradient is 0.39 of the others', of mixtures 0.68, and of
units that are heard with zeros at first 0.26 (an MLP on digits).
``gradient`` and ``firefly`` are pairs whose directions come from operands of one backward pass:

* ``gradient``, after GradMax (Evci et al., "GradMax: Growing Neural Networks using Gradient Information", ICLR 2022):
  with ``M = E[delta x^T]``, x what the layer reads and delta the gradient at the outputs of its reader, the singular
  vectors of the largest singular values: right ones as incoming, left ones as outgoing weights. To first order, the
  gradient that a new unit gets cannot be larger. GradMax keeps the function by zero incoming weights, which a ReLU
  does not pass a gradient to; here the signs do.
* ``firefly``, after Wu et al. ("Firefly Neural Architecture Descent", NeurIPS 2020): candidates with random incoming
  weights, and with those of present units disturbed (splits). With h what a candidate would say, it adds
  ``eps u h`` to its reader; the best u is along ``E[delta h]`` and the score ``|dL/d eps|`` is that vector's norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsenet.architecture.growth.placing import (
    Birth,
    GrowthError,
    Placing,
    alike,
    anchor_of,
    noise_over,
    readers_of,
)
from sparsenet.compaction.criteria import unit_views
from sparsenet.compaction.graph import Stage, UnitGraph
from sparsenet.compaction.rules import FUNCTION_RULES, MODULE_RULES
from sparsenet.compaction.weights import BlockWeights
from sparsenet.policies.places import layer_key

__all__ = ["HOW", "Directions"]

HOW = ("zero", "pairs", "split", "gradient", "firefly")
CANDIDATES = 8  # per direction that is kept
DISTURBANCE = 0.5  # of mixtures and split candidates, over the norm of what is disturbed
MIXED = 2  # old units in a mixture
UNEVEN = 0.25  # a copy takes its share of each outgoing weight, more or less by this part of it

Operands = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Directions:
    """Where a birth's leading units (those that mirror no other) look and speak to.

    Attributes:
        incoming: [leading units, inputs of one unit]. outgoing: [leading units, outputs of the reader].
        reader: its name.
    """

    incoming: Tensor
    outgoing: Tensor
    reader: str


def generator(seed: int, name: str, role: int) -> torch.Generator:
    """Random numbers of one layer for one use; none of them come from the global state."""
    return torch.Generator().manual_seed(layer_key(seed, role, name))


# --- who is born ----------------------------------------------------------------------------------------------------


def born(graph: UnitGraph, stage: Stage, count: int, how: str, first: int) -> Birth:
    """``count`` new units of a layer; which mirror, copy or listen only."""
    anchor = anchor_of(graph, stage)
    twin, parent = np.full(count, -1), np.full(count, -1)
    noise = noise_over(graph, anchor) if how != "zero" else None
    told = how if noise is None else f"{how} with outgoing weights of zero: {noise} draws for each unit"
    if how == "split":
        parent = _parents(graph, stage, anchor, count)
        return Birth(stage, anchor, first, twin, parent, np.full(count, noise is None), told)
    paired = 0 if how == "zero" or noise is not None else count // 2 * 2
    twin[1:paired:2] = np.arange(0, paired, 2)
    return Birth(stage, anchor, first, twin, parent, np.arange(count) < paired, told)


def _parents(graph: UnitGraph, stage: Stage, anchor: int, count: int) -> np.ndarray:
    """Classes of the units to copy, strongest first by incoming x outgoing norm; again from the start if too few."""
    view = unit_views(graph)[stage.name]
    strength = view.incoming() * view.outgoing()
    classes = graph.classes[view.units]
    can = alike(graph, anchor, classes)
    seen, order = set(), []
    for unit in strength.argsort(descending=True, stable=True).tolist():
        if can[unit] and int(classes[unit]) not in seen:
            seen.add(int(classes[unit]))
            order.append(int(classes[unit]))
    chosen = (order * (-(-count // len(order))))[:count]
    return np.array(sorted(chosen))  # neighbours share blocks


# --- their size -----------------------------------------------------------------------------------------------------


def incoming_norms(stage: Stage) -> Tensor:
    """float64 [rows]."""
    if isinstance(stage.weights, BlockWeights):
        return stage.weights.line_squares(rows=True).sqrt()
    weight = stage.module.weight.detach().flatten(1)
    return torch.linalg.vector_norm(weight, dim=1).double().cpu()


def outgoing_norms(stage: Stage) -> Tensor:
    """float64 [columns]."""
    if isinstance(stage.weights, BlockWeights):
        return stage.weights.line_squares(rows=False).sqrt()
    weight = stage.module.weight.detach()
    weight = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)
    return torch.linalg.vector_norm(weight, dim=(0, 2)).double().cpu()


def usual(norms: Tensor, otherwise: float) -> float:
    """The mean of those that are not zero."""
    norms = norms[norms > 0]
    return float(norms.mean()) if len(norms) else otherwise


def usual_incoming(stage: Stage) -> float:
    """The mean norm of a unit's incoming weights; He et al. (2015) where all are zero."""
    return usual(incoming_norms(stage), math.sqrt(2.0))


def usual_outgoing(stage: Stage) -> float:
    """The mean norm of a column; He et al. (2015) where all are zero."""
    rows, columns = stage.weights.rows, max(stage.weights.columns, 1)
    return usual(outgoing_norms(stage), math.sqrt(2.0 * rows / columns))


def mixture(axis: Placing, lead: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """For each of the new positions ``lead``: int64 [n, MIXED] old ones (as they stand now), and float64 factors."""
    now = (axis.old >= 0).nonzero().flatten()
    chosen = torch.randint(len(now), (len(lead), MIXED), generator=draw)
    return now[chosen], torch.randn(len(lead), MIXED, generator=draw, dtype=torch.float64)


# --- directions from operands ---------------------------------------------------------------------------------------


def directions(graph: UnitGraph, birth: Birth, how: str, operands: Operands, seed: int) -> Directions:
    """Incoming and outgoing directions of a birth's leading units.

    Raises:
        GrowthError: no operands of that layer, or they do not fit it and a reader of it, or are not finite.
    """
    name = birth.stage.name
    x, grad, reader = _checked(graph, birth, operands)
    number = int((birth.twin < 0).sum())
    draw = generator(seed, name, 2)
    if how == "gradient":
        incoming, outgoing = _singular(x, grad, number, draw)
    else:
        incoming, outgoing = _firefly(graph, birth.stage, x, grad, number, draw)
    return Directions(incoming, outgoing, reader)


def _checked(graph: UnitGraph, birth: Birth, operands: Operands) -> tuple[Tensor, Tensor, str]:
    name, stage = birth.stage.name, birth.stage
    if name not in operands:
        raise GrowthError(f"widen: operands must hold (x, grad_output) of layer {name!r}, got none")
    x, grad = operands[name]
    weight = stage.module.weight
    fan_in = weight.shape[1] if isinstance(stage.weights, BlockWeights) else weight[0].numel()
    if x.dim() != 2 or x.shape[1] != fan_in or not len(x):
        raise GrowthError(f"widen: operands of {name!r} must hold x [n, {fan_in}], got {list(x.shape)}")
    sizes = {reader.name: reader.weights.rows for reader in readers_of(graph, birth.anchor)}
    reader = next((r for r, rows in sizes.items() if grad.shape == (len(x), rows)), None)
    if reader is None:
        told = ", ".join(f"[{len(x)}, {rows}] of {r!r}" for r, rows in sizes.items())
        raise GrowthError(f"widen: operands of {name!r} must hold grad_output {told}, got {list(grad.shape)}")
    dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    x, grad = x.detach().to(dtype), grad.detach().to(dtype)
    if not bool(x.isfinite().all() & grad.isfinite().all()):
        raise GrowthError(f"widen: operands of {name!r} must be finite, got NaN or Inf")
    return x, grad, reader


def _singular(x: Tensor, grad: Tensor, number: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Right and left singular vectors of grad^T x, [number, ...] each, largest first; the product is never formed.

    Randomised subspace iteration (Halko, Martinsson & Tropp, 2011). Where there are more units than directions, the
    others are random mixtures of those.
    """
    rank = min(number + 8, x.shape[1], grad.shape[1], len(x))
    basis = torch.randn(x.shape[1], rank, generator=draw, dtype=x.dtype).to(x.device)
    for _ in range(3):
        left = torch.linalg.qr(grad.T @ (x @ basis))[0]
        basis = torch.linalg.qr(x.T @ (grad @ left))[0]
    u, _, v = torch.linalg.svd((grad @ left).T @ x, full_matrices=False)
    u = left @ u
    kept = min(number, rank)
    incoming, outgoing = v[:kept], u.T[:kept]
    if kept < number:
        mixed = torch.randn(number - kept, kept, generator=draw, dtype=x.dtype).to(x.device)
        incoming, outgoing = torch.cat([incoming, mixed @ incoming]), torch.cat([outgoing, mixed @ outgoing])
    return incoming, outgoing


def _firefly(graph: UnitGraph, stage: Stage, x: Tensor, grad: Tensor, number: int, draw) -> tuple[Tensor, Tensor]:
    """The best candidates and where they pull their reader."""
    each = CANDIDATES * number
    fresh = torch.randn(each, x.shape[1], generator=draw, dtype=x.dtype).to(x.device)
    strongest = incoming_norms(stage).argsort(descending=True, stable=True)[:each]
    present = rows_of(stage, strongest).to(x)
    noise = torch.randn(present.shape, generator=draw, dtype=x.dtype).to(x.device)
    splits = F.normalize(present, dim=1) + DISTURBANCE * F.normalize(noise, dim=1)
    candidates = usual_incoming(stage) * F.normalize(torch.cat([fresh, splits]), dim=1)
    said = activation_behind(graph, stage)(x @ candidates.T)
    pulls = said.T @ grad / len(x)
    best = torch.linalg.vector_norm(pulls, dim=1).argsort(descending=True, stable=True)[:number]
    return candidates[best], -pulls[best]


def rows_of(stage: Stage, rows: Tensor) -> Tensor:
    """[rows, inputs of one unit]: their incoming weights, dense."""
    module = stage.module
    if not isinstance(stage.weights, BlockWeights):
        return module.weight.detach().flatten(1)[rows.to(module.weight.device)]
    pattern, b = module.pattern, module.block_size
    values, crow = module.values.detach(), pattern.crow.tolist()
    out = values.new_zeros(len(rows), pattern.block_cols, b)
    for number, row in enumerate(rows.tolist()):
        here = slice(crow[row // b], crow[row // b + 1])
        out[number, pattern.col[here].long()] = values[here, row % b]
    return out.flatten(1)[:, : module.in_features]


def activation_behind(graph: UnitGraph, stage: Stage) -> Callable[[Tensor], Tensor]:
    """What is applied to the outputs of a layer before anything else, element by element: fused, or modules."""
    fused = {"relu": torch.relu, "gelu": F.gelu, "silu": F.silu}.get(getattr(stage.module, "activation", "none"))
    steps: list[Callable[[Tensor], Tensor]] = [fused] if fused else []
    node = next(n for n in graph.graph.nodes if n.op == "call_module" and n.target == stage.name)
    while len(node.users) == 1 and (step := _elementwise(graph, node := next(iter(node.users)))) is not None:
        steps.append(step)

    def apply(t: Tensor) -> Tensor:
        for step in steps:
            t = step(t)
        return t

    return apply


def _elementwise(graph: UnitGraph, node: fx.Node) -> Callable[[Tensor], Tensor] | None:
    """The function of a node that treats every element alike; None of any other."""
    if node.op == "call_module":
        module = graph.modules[node.target]
        alone = MODULE_RULES.get(type(module)) is MODULE_RULES[nn.ReLU]
        return (lambda t: module(t.clone()).detach()) if alone else None
    alone = node.op == "call_function" and len(node.all_input_nodes) == len(node.args) == 1
    if alone and FUNCTION_RULES.get(node.target) is FUNCTION_RULES[torch.relu]:
        settings = {key: value for key, value in node.kwargs.items() if key != "inplace"}
        return lambda t: node.target(t, **settings)
    return None
