"""Every reason not to swap a layer, told before anything has changed."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from sparsenet.functional.checks import check_dtype
from sparsenet.swapping.report import quoted

__all__ = [
    "check_swappable",
    "refuse_computed",
    "refuse_own_forward",
    "refuse_shared_weights",
    "refuse_watched",
    "refuse_wrapped",
]


def check_swappable(name: str, linear: nn.Linear) -> None:
    """Raises where a sparse layer would not compute what ``linear`` does, or would lose what is tied to its weight."""
    shown = quoted(name)
    refuse_own_forward("sparsify_", name, linear, nn.Linear)
    if is_lazy(linear._parameters.get("weight")):
        raise ValueError(f"sparsify_: {shown} must have its weight, got a lazy layer; run one batch through it first")
    refuse_computed("sparsify_", name, linear, "weight", "bias")
    for argument in ("weight", "bias"):
        t = linear._parameters[argument]
        if t is None:
            continue
        expected = [linear.out_features, linear.in_features] if argument == "weight" else [linear.out_features]
        argument = f"{argument} of {shown}"
        if type(t) is not nn.Parameter:
            raise TypeError(
                f"sparsify_: {argument} must be a plain torch.nn.Parameter, got {type(t).__name__}; "
                "swap before weights are sharded, quantized or wrapped"
            )
        if t.is_meta:
            raise ValueError(f"sparsify_: {argument} must hold data, got a meta tensor; load the weights first")
        check_dtype("sparsify_", argument, t)
        if list(t.shape) != expected or (t.dtype, t.device) != (linear.weight.dtype, linear.weight.device):
            raise ValueError(
                f"sparsify_: {argument} must be {expected}, on one device and of one dtype with the weight, "
                f"got {list(t.shape)}, {t.device}, {t.dtype}"
            )
    refuse_watched("sparsify_", name, linear.weight, "weight")
    if linear.weight.isnan().any():
        raise ValueError(f"sparsify_: weight of {shown} must not contain NaN")


def refuse_wrapped(op: str, model: nn.Module) -> None:
    """Raises where a wrapper watches the parameters that would be replaced."""
    for module in model.modules():
        kind = type(module).__name__
        if isinstance(module, nn.parallel.DistributedDataParallel) or kind == "FullyShardedDataParallel":
            raise ValueError(f"{op}: model must be swapped before it is wrapped: {kind} watches the parameters it got")


def refuse_own_forward(op: str, name: str, module: nn.Module, base: type[nn.Module]) -> None:
    """Raises where calling ``module`` is not calling ``base.forward``."""
    bound = next((key for key, v in vars(module).items() if getattr(v, "__self__", None) is module), None)
    if type(module).forward is not base.forward or "forward" in vars(module) or bound is not None:
        raise ValueError(
            f"{op}: {quoted(name)} must compute as any {base.__name__}, got its own {bound or 'forward'}; "
            "take that away first"
        )
    if module._compiled_call_impl is not None:
        raise ValueError(f"{op}: {quoted(name)} must be swapped before it is compiled")


def refuse_computed(op: str, name: str, module: nn.Module, *arguments: str) -> None:
    """Raises where a parameter is not stored as such, but made from others whenever it is used."""
    for argument in arguments:
        if argument in module._parameters:
            continue
        utils = "torch.nn.utils."
        if parametrize.is_parametrized(module, argument):
            what, remedy = "parametrized", f"{utils}parametrize.remove_parametrizations(module, {argument!r})"
        elif f"{argument}_mask" in module._buffers:
            what, remedy = "pruned", f"{utils}prune.remove(module, {argument!r})"
        elif f"{argument}_g" in module._parameters:
            what, remedy = "under weight norm", f"{utils}remove_weight_norm(module, {argument!r})"
        elif f"{argument}_u" in module._buffers:
            what, remedy = "under spectral norm", f"{utils}remove_spectral_norm(module, {argument!r})"
        else:
            what, remedy = "made by other code", "make it a torch.nn.Parameter again"
        raise ValueError(
            f"{op}: {argument} of {quoted(name)} must be an ordinary parameter, it is {what}; "
            f"take that away first: {remedy}"
        )


def refuse_watched(op: str, name: str, parameter: nn.Parameter, argument: str) -> None:
    """Raises where hooks of a parameter would be lost with it."""
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        raise ValueError(f"{op}: {argument} of {quoted(name)} must have no hooks, it is replaced; remove them first")


def refuse_shared_weights(model: nn.Module, chosen: dict[str, nn.Linear]) -> None:
    """A weight in two places, as one Parameter or as two over the same memory, has no pattern that serves both."""
    owners: dict[object, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(name, recurse=False, remove_duplicate=False):
            owners.setdefault(_memory(parameter), []).append(key)
    for name, linear in chosen.items():
        own = f"{name}.weight" if name else "weight"
        others = [other for other in owners[_memory(linear.weight)] if other != own]
        if others:
            raise ValueError(
                f"sparsify_: the weight of {quoted(name)} must not be shared, got it in "
                f"{', '.join(map(repr, others))} too, and one pattern cannot serve both; leave the layer out, "
                f"filter_fn=lambda name, linear: name != {name!r}, or give it a copy of the weight"
            )


def _memory(parameter: nn.Parameter) -> object:
    """Equal for parameters that begin at one address."""
    if type(parameter) is not nn.Parameter or parameter.is_meta or parameter.layout is not torch.strided:
        return id(parameter)
    return (parameter.device, parameter.data_ptr()) if parameter.numel() else id(parameter)
