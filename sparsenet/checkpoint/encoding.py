"""Nested values as JSON beside named tensors: what a safetensors file can hold of a state dict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["decode", "encode"]


def encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON; tensors in it go to ``tensors`` under names that begin with ``name``."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value.item() if hasattr(value, "item") else value  # NumPy's float64 is a float
    if isinstance(value, Tensor):
        while name in tensors:
            name += "'"
        tensors[name] = value
        return {"@tensor": name}
    if isinstance(value, (list, tuple)):
        items = [encode(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]
        return {"@tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        items = [[encode(k, name, tensors), encode(v, f"{name}/{k}", tensors)] for k, v in value.items()]
        return {"@counter" if isinstance(value, Counter) else "@dict": items}
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return value.item()
    kind = type(value).__name__
    raise TypeError(f"save: {name[1:]} must be numbers, text, lists, dicts and tensors, got {kind}")


def decode(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    """What :func:`encode` was given; ``tensor`` finds a tensor by its name."""
    if isinstance(value, list):
        return [decode(item, tensor) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "@tensor":
        return tensor(content)
    if tag == "@tuple":
        return tuple(decode(item, tensor) for item in content)
    if tag not in ("@dict", "@counter"):
        raise ValueError(f"unknown entry {tag!r}")
    items = {decode(k, tensor): decode(v, tensor) for k, v in content}
    return Counter(items) if tag == "@counter" else items
