"""What a forward pass keeps for its backward, in bytes: counted exactly, as autograd keeps it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["SavedBytes"]


class SavedBytes:
    """Counts, in a ``with`` block, the memory that autograd keeps for backward passes.

    Each piece of memory counts once and whole, however many tensors look at it. Tensors of user-made
    ``autograd.Function``s are seen as far as they go through ``save_for_backward``, as sparsenet's do.

    Args:
        excluded: tensors whose memory does not count: parameters, buffers, the input.

    Attributes:
        by_owner: bytes by the ``owner`` that was set when they were first seen.
        owner: whom what follows is put down to; set it at any time. What :meth:`claim` was told goes before.
        inputs: ``inputs[a][b]`` are bytes put down to b that a was the first to keep: what a reads of b.

    Example:
        >>> import torch
        >>> from sparsenet.limits import SavedBytes
        >>> layer, x = torch.nn.Linear(8, 4), torch.randn(3, 8)
        >>> with SavedBytes([*layer.parameters(), x]) as saved:
        ...     loss = layer(x).tanh().sum()   # tanh keeps its output, 3 x 4 float32
        >>> saved.bytes
        48
    """

    def __init__(self, excluded: Iterable[Tensor] = ()):
        self.owner = ""
        self.by_owner: dict[str, int] = {}
        self.inputs: dict[str, dict[str, int]] = {}
        self._excluded = {_address(tensor) for tensor in excluded}
        self._seen: dict[tuple, Tensor] = {}  # keeps them alive: memory that is freed and taken anew counts twice
        self._owners: dict[tuple, str] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._saw, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        """Of all owners."""
        return sum(self.by_owner.values())

    def claim(self, tensor: Tensor, owner: str) -> None:
        """Puts the memory of ``tensor`` down to ``owner``, should it be kept."""
        self._owners.setdefault(_address(tensor), owner)
        self._seen.setdefault(("claimed", *_address(tensor)), tensor.detach())

    def owner_of(self, tensor: Tensor) -> str:
        """Whom its memory was put down to; the present ``owner`` where it was not."""
        return self._owners.get(_address(tensor), self.owner)

    def _saw(self, tensor: Tensor) -> Tensor:
        address = _address(tensor)
        if address not in self._seen and address not in self._excluded:
            self._seen[address] = tensor.detach()
            owner = self._owners.setdefault(address, self.owner)
            self.by_owner[owner] = self.by_owner.get(owner, 0) + _storage_bytes(tensor)
            if owner != self.owner:
                taken = self.inputs.setdefault(self.owner, {})
                taken[owner] = taken.get(owner, 0) + _storage_bytes(tensor)
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._hooks.__exit__(*error)
        self._seen.clear()


def _address(tensor: Tensor) -> tuple:
    """What tells one piece of memory from another."""
    try:
        return tensor.device.type, tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse and other tensors without memory of their own
        return "object", id(tensor)


def _storage_bytes(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):
        return tensor.nbytes
