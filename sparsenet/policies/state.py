"""What a policy remembers of every block from step to step: it follows its block, and is saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from sparsenet.functional.blocks import take_blocks
from sparsenet.pattern import BlockPattern, carried_from
from sparsenet.policies.views import View

__all__ = ["PolicyState"]


class PolicyState:
    """By layer, tensors with one entry per block; whatever replaces a pattern, they are carried along when next asked.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.policies.state import PolicyState
        >>> from sparsenet.policies.views import View
        >>> layer = sn.SparseLinear(8, 8, pattern=sn.BlockPattern([0, 1, 2], [0, 1], (8, 8), 4))
        >>> states = PolicyState()
        >>> states.of(View("0", layer, key=0))["age"] = torch.tensor([5, 7])
        >>> _ = layer.set_pattern(sn.BlockPattern([0, 1, 2], [1, 1], (8, 8), 4))   # one block has moved
        >>> states.of(View("0", layer, key=0))["age"]
        tensor([0, 7])
    """

    def __init__(self):
        self._states: dict[str, dict[str, Tensor]] = {}
        self._patterns: dict[str, BlockPattern] = {}

    def of(self, view: View) -> dict[str, Tensor]:
        """The state of a layer's blocks as they are now."""
        state, old, new = self._states.setdefault(view.name, {}), self._patterns.get(view.name), view.pattern
        if old is not new:
            if state and old is not None and (old.shape, old.block_size) != (new.shape, new.block_size):
                state.clear()  # compaction has changed the layer
            elif state and old is not None:
                carried = carried_from(old.to(new.device), new)
                state.update({key: take_blocks(t, carried, 0) for key, t in state.items()})
            self._patterns[view.name] = new
        return state

    def tidy(self) -> None:
        """Forgets layers of which nothing is remembered; nobody may still hold their empty state."""
        for name in [name for name, state in self._states.items() if not state]:
            del self._states[name], self._patterns[name]

    def names(self) -> list[str]:
        """The layers of which something is remembered."""
        return [name for name, state in self._states.items() if state]

    def clear(self) -> None:
        """Forgets everything."""
        self._states.clear()
        self._patterns.clear()

    def state(self, views: Iterable[View]) -> dict[str, dict[str, Tensor]]:
        """By layer and name, for the layers' blocks as they are now; copies."""
        states = {view.name: self.of(view) for view in views}
        return {name: {k: t.clone() for k, t in state.items()} for name, state in states.items() if state}

    def load(self, state: Mapping[str, Mapping[str, Tensor]], views: Mapping[str, View]) -> None:
        """Takes over a :meth:`state` that was saved together with the layers' present patterns.

        Raises:
            ValueError: it is none, or of other numbers of blocks; nothing has changed.
        """
        if not isinstance(state, Mapping) or not all(
            isinstance(of_layer, Mapping) and all(isinstance(t, Tensor) and t.dim() for t in of_layer.values())
            for of_layer in state.values()
        ):
            raise ValueError(f"Sparsifier: state must have tensors by layer and name in 'policy', got {state!r}")
        for name, of_layer in state.items():
            for key, tensor in of_layer.items():
                if name in views and len(tensor) != views[name].pattern.num_blocks:
                    raise ValueError(
                        f"Sparsifier: state {key!r} of layer {name} must have one entry for each of "
                        f"{views[name].pattern.num_blocks} blocks, got {len(tensor)}; load the model first"
                    )
        self.clear()
        for name, view in views.items():
            of_layer = state.get(name, {})
            self._states[name] = {key: t.detach().to(view.device, copy=True) for key, t in of_layer.items()}
            self._patterns[name] = view.pattern
