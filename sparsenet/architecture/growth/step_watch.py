"""What a forward pass in training tells the Grower: when a step began, how large its batch is, and its inputs."""

from __future__ import annotations

import inspect
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["StepWatch", "rows_of"]


def rows_of(inputs: Any) -> int:
    """Rows of a batch: the first size of the first tensor with one; 0 where there is none.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth.step_watch import rows_of
        >>> rows_of(({"x": torch.zeros(5, 3)}, 2.0))
        5
    """
    return next((len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()), 0)


class StepWatch:
    """Watches the forward passes of ``net`` in training mode. ``window``: steps whose times are kept.

    Attributes:
        batch: inputs by position of one forward pass, kept when wanted; None: not seen since.
        most_rows: of the largest batch so far. larger: whether ``batch`` is one that was larger than those before.
        seen: whether any forward pass was.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth.step_watch import StepWatch
        >>> net = torch.nn.Linear(3, 2)
        >>> watch = StepWatch(net, window=20)
        >>> _ = net(torch.ones(5, 3))
        >>> watch.stop_clock()
        >>> watch.most_rows, watch.milliseconds > 0, watch.batch[0].shape
        (5, True, torch.Size([5, 3]))
    """

    def __init__(self, net: nn.Module, window: int):
        self.net, self.window = net, window
        self.batch: tuple | None = None
        self.most_rows = 0
        self.larger = False
        self.seen = False
        self.wanted = True
        self.seconds: list[float] = []
        self._began: float | None = None
        self._paused = False
        self._handle = net.register_forward_pre_hook(_Hook(self), with_kwargs=True)

    def began(self, args: tuple, kwargs: dict) -> None:
        """A forward pass in training mode begins; of several before one optimizer step, the first starts the clock."""
        if self._paused:
            return
        self.seen = True
        if self._began is None:
            self._began = time.perf_counter()
        rows = rows_of((args, kwargs))
        if self.wanted or rows > self.most_rows:
            self.batch, self.wanted = _by_position(self.net, args, kwargs), False
            self.larger = rows > self.most_rows
        self.most_rows = max(rows, self.most_rows)

    def stop_clock(self) -> None:
        """A step has ended."""
        if self._began is not None:
            self.seconds = [*self.seconds[1 - self.window :], time.perf_counter() - self._began]
        self._began = None

    @property
    def milliseconds(self) -> float:
        """Of a step: the lower quartile of the last ones seen, since what else runs only adds; 0 before."""
        return 1e3 * sorted(self.seconds)[len(self.seconds) // 4] if self.seconds else 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forward passes meanwhile are no part of training."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def close(self) -> None:
        """Takes the hook off."""
        self._handle.remove()


def _by_position(net: nn.Module, args: tuple, kwargs: dict) -> tuple:
    if not kwargs:
        return args
    bound = inspect.signature(net.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    if bound.kwargs:
        raise TypeError(
            f"Grower: model must take its inputs by position or by names that have one, got {sorted(bound.kwargs)} "
            "by name only"
        )
    return bound.args


class _Hook:
    """Does not keep the watch alive; what is copied or pickled with the model watches nothing."""

    def __init__(self, watch: StepWatch):
        self._watch = weakref.ref(watch)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        watch = self._watch()
        if watch is not None and module is watch.net and module.training:
            watch.began(args, kwargs)

    def __reduce__(self):
        return _nobody, ()


def _nobody():
    return _ignored


def _ignored(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """In a copy."""
