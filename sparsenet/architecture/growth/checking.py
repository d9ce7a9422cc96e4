"""What a Grower refuses at once, in a sentence, before it has changed anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparsenet.architecture.growth.candidates import growable_layers, reasons_against
from sparsenet.architecture.growth.fading import group_of
from sparsenet.architecture.growth.ledger import Cost, Ledger
from sparsenet.architecture.growth.placing import said_by
from sparsenet.compaction.compacting import plain_model
from sparsenet.compaction.graph import UnitGraph
from sparsenet.limits import format_bytes
from sparsenet.optimizer_state import as_optimizers, holds, with_inner_optimizers

__all__ = ["check_can_grow", "check_fits", "network_of", "one_number", "optimizers_of", "smallest"]


def network_of(model: nn.Module) -> nn.Module:
    """The network inside wrappers. Raises ValueError for a compiled one and for plain DistributedDataParallel.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth.checking import network_of
        >>> network_of(torch.nn.Linear(2, 2))
        Linear(in_features=2, out_features=2, bias=True)
    """
    for module in model.modules():
        if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                "Grower: model must not be compiled while it grows: every change of shape compiles anew; compile it "
                "when the grower is done"
            )
    with said_by("Grower"):
        return plain_model(model)


def optimizers_of(net: nn.Module, optimizer) -> tuple[torch.optim.Optimizer, ...]:
    """One or several, with those they hold. Raises ValueError where a trainable parameter is in none of them.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth.checking import optimizers_of
        >>> net = torch.nn.Linear(2, 2)
        >>> len(optimizers_of(net, torch.optim.SGD(net.parameters())))
        1
    """
    with said_by("Grower"):
        optimizers = with_inner_optimizers(as_optimizers(optimizer))
    if not optimizers:
        raise ValueError("Grower: optimizer must hold the model's parameters, got None")
    for name, p in net.named_parameters():
        if p.requires_grad and not any(holds(o, p) for o in optimizers):
            raise ValueError(f"Grower: optimizer must hold every trainable parameter, got none for {name!r}")
    return optimizers


def check_can_grow(graph: UnitGraph, levels: Sequence[str], any_sparse: bool) -> list[str]:
    """Raises ValueError, with the reasons, where nothing could ever change; returns the frozen layers that stay.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth.checking import check_can_grow
        >>> from sparsenet.compaction.graph import UnitGraph
        >>> check_can_grow(UnitGraph(torch.nn.Sequential(torch.nn.Linear(4, 2))), ("units",), any_sparse=False)
        Traceback (most recent call last):
        ValueError: Grower: model must have a layer whose units can change, got '0': the model returns it
    """
    reasons = reasons_against(graph)
    if not ("blocks" in levels and any_sparse) and all(reasons.values()):
        said = "; ".join(f"{name!r}: {reason}" for name, reason in reasons.items())
        raise ValueError(
            "Grower: model must have a layer whose units can change, got "
            + (said or "it has no linear layer or convolution")
        )
    return [name for name, reason in reasons.items() if reason is not None and reason.endswith("is frozen")]


def check_fits(now: Cost, limit: Cost) -> None:
    """Raises ValueError where the network as it is needs more bytes or parameters than it may.

    Example:
        >>> from sparsenet.architecture.growth.checking import check_fits
        >>> from sparsenet.architecture.growth.ledger import Cost
        >>> check_fits(Cost(10.0, 2.0), Cost(20.0, 5.0))
    """
    if now.bytes > limit.bytes or now.parameters > limit.parameters:
        raise ValueError(
            f"Grower: budget must be at least {format_bytes(now.bytes)} and {round(now.parameters)} parameters, which "
            f"the network needs as it is, got {format_bytes(limit.bytes)} and {limit.parameters:.0f}; lower it "
            "afterwards (grower.budget = ...) and the network shrinks"
        )


def smallest(graph: UnitGraph, ledger: Ledger, levels: Sequence[str]) -> Cost:
    """About what the network needs with one group of units in every layer that can change.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth.checking import smallest
        >>> from sparsenet.architecture.growth.ledger import Ledger
        >>> from sparsenet.compaction.graph import UnitGraph
        >>> graph = UnitGraph(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)))
        >>> smallest(graph, Ledger(graph, (), {}), ("units",)).parameters
        9.0
    """
    least = ledger.total()
    for name in growable_layers(graph) if "units" in levels else ():
        count = len(ledger.classes_of(name)) - group_of(graph, name)
        least = least - ledger.unit(name) * max(0, count)
    return least


def one_number(loss: Tensor | float) -> Tensor | float:
    """A loss as it is now, without its graph. Raises ValueError where it is not one number.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth.checking import one_number
        >>> one_number(torch.ones(1, requires_grad=True))
        tensor(1.)
    """
    if not isinstance(loss, Tensor):
        if not isinstance(loss, (int, float)):
            raise ValueError(f"Grower: loss must be one number, got {type(loss).__name__}")
        return float(loss)
    if loss.numel() != 1:
        raise ValueError(f"Grower: loss must be one number, got shape {list(loss.shape)}")
    return loss.detach().clone().reshape(())
