"""What modules mend after every step of every ``torch.optim`` optimizer.

An optimizer knows nothing of elements that must stay zero or of gates that must stay in their range. A module with such
a rule says so once, with :func:`after_every_step`; one hook serves them all, whichever optimizer steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

__all__ = ["after_every_step"]

Module = TypeVar("Module", bound=nn.Module)

_mends: weakref.WeakKeyDictionary[nn.Module, Callable[[nn.Module], None]] = weakref.WeakKeyDictionary()
_hooks: list[RemovableHandle] = []  # at most one, from the first module on


def after_every_step(module: Module, mend: Callable[[Module], None]) -> None:
    """From now on calls ``mend(module)``, without gradients, after every step of any ``torch.optim`` optimizer.

    Args:
        module: is not kept alive by this; a module that was registered before gets the new ``mend``.
        mend: a function that does not refer to the module, or the module would never be freed.

    Copies of a module (``copy.deepcopy``, ``pickle``) must be registered themselves.

    Example:
        >>> import torch
        >>> from sparsenet.after_step import after_every_step
        >>> linear = torch.nn.Linear(2, 2)
        >>> after_every_step(linear, lambda module: module.weight.clamp_(min=0.0))
        >>> linear(torch.ones(1, 2)).sum().backward()
        >>> torch.optim.SGD(linear.parameters(), lr=1.0).step()
        >>> bool((linear.weight >= 0).all())
        True
    """
    if not _hooks:
        _hooks.append(register_optimizer_step_post_hook(_mend_all))
    _mends[module] = mend


@torch.no_grad()
def _mend_all(*_) -> None:
    for module, mend in list(_mends.items()):
        mend(module)
