"""Topology: what changes of a layer while it trains. Patterns themselves are immutable and carry no run state."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsenet.functional import native, registry
from sparsenet.pattern import BlockPattern

__all__ = ["Topology", "replace_data"]

Observer = Callable[[Tensor, Tensor], None]


class Topology:
    """The pattern that a layer has now, and everything about it that is not for ever. One object per layer, for life.

    Attributes:
        pattern: the active blocks; :meth:`replace` exchanges it, nothing changes it.
        element_mask: bool [num_blocks, b, b] on the pattern's device, or None.
        label: how errors name the layer.
        expected_calls: calls of the layer in eager forward passes since the observer began to watch, whose backward it
            has not seen; 0 where they were not counted.
        trained: whether a backward pass has ever made a gradient for the values.
        family: the layers that are copies of each other; a weak set that they share.
        written: how often the values' memory had been written to when the layer last knew what is in it.
        observer: called in every backward pass through the layer with ``(x, grad_output before the activation)``, both
            2-D, as often as the layer was called in it; None: nobody watches. An observer watches one pattern: a
            replacement takes it away.

    Example:
        >>> import torch, sparsenet as sn
        >>> layer, seen = sn.SparseLinear(32, 16, density=0.5, block_size=8), []
        >>> layer.topology.observer = lambda x, grad_output: seen.append(list(grad_output.shape))
        >>> layer(torch.randn(5, 32)).sum().backward()
        >>> seen
        [[5, 16]]
    """

    __slots__ = (
        "__weakref__", "element_mask", "expected_calls", "family", "label", "observer", "pattern", "trained", "written",
    )  # fmt: skip

    def __init__(self, pattern: BlockPattern, element_mask: Tensor | None = None, label: str = "block_sparse_linear"):
        self.pattern = pattern
        self.element_mask = element_mask
        self.label = label
        self.observer: Observer | None = None
        self.expected_calls = 0
        self.trained = False
        self.family: weakref.WeakSet = weakref.WeakSet()
        self.written = -1
        registry.installed(pattern, self)

    def replace(
        self, pattern: BlockPattern, element_mask: Tensor | None, parameter: nn.Parameter, values: Tensor
    ) -> None:
        """Exchanges pattern, mask and the parameter's memory together: a forward pass sees all of them old or all new.

        Graphs recorded before keep the old tensors, and their backward raises ``StaleTopologyError``.
        """
        with native.storage_lock:
            registry.retire(self.pattern, self.label)
            _exchange(parameter, values)
            self.pattern, self.element_mask, self.observer = pattern, element_mask, None
            registry.installed(pattern, self)

    def move(self, device: torch.device) -> None:
        """Takes pattern and mask to ``device``, where the parameters are already."""
        pattern = self.pattern.to(device)
        if pattern is not self.pattern:
            registry.release(self.pattern)
            self.pattern = pattern
            registry.installed(pattern, self)
        if self.element_mask is not None:
            self.element_mask = self.element_mask.to(device)

    def __deepcopy__(self, memo) -> Topology:
        return Topology(self.pattern.copy(), copy.deepcopy(self.element_mask, memo), self.label)

    def __reduce__(self):
        return Topology, (self.pattern, self.element_mask, self.label)


def replace_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Gives a Parameter new memory, perhaps of another size.

    The optimizer, hooks and everybody else keep the same object.

    Example:
        >>> import torch
        >>> from sparsenet.topology import replace_data
        >>> parameter = torch.nn.Parameter(torch.ones(2, 3))
        >>> loss = parameter.sum()   # a graph that still knows the old size
        >>> replace_data(parameter, torch.ones(5, 3))
        >>> parameter.sum().backward()
        >>> parameter.grad.shape
        torch.Size([5, 3])
    """
    with native.storage_lock:
        _exchange(parameter, data)


def _exchange(parameter: nn.Parameter, data: Tensor) -> None:
    """The only place that gives a Parameter other memory; the caller holds the lock.

    Autograd's gradient accumulator remembers the old size for as long as an old loss is alive. Assigning data of
    another dtype first makes autograd drop it (it checks the dtype, not the size).
    """
    if parameter.shape != data.shape:
        other = torch.float64 if data.dtype != torch.float64 else torch.float32
        parameter.data = torch.empty(0, dtype=other, device=data.device)
    parameter.data = data
