import copy
import doctest
import gc

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

from sparsenet import after_step
from sparsenet.after_step import after_every_step


def clamp(module: nn.Module) -> None:
    module.weight.clamp_(min=0.0)


def step(*modules: nn.Module, kind=torch.optim.SGD) -> None:
    optimizer = kind([p for module in modules for p in module.parameters()], lr=10.0)
    sum(module(torch.ones(1, 3)).sum() for module in modules).backward()
    optimizer.step()


def test_doctests():
    result = doctest.testmod(after_step)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_module_is_mended_after_every_step_and_others_are_not(kind):
    mended, other = nn.Linear(3, 2), nn.Linear(3, 2)
    after_every_step(mended, clamp)
    for _ in range(2):
        step(mended, other, kind=kind)
        assert (mended.weight == 0).all() and (other.weight < -5).all()
    assert mended.weight.requires_grad


def test_the_latest_mend_counts_and_copies_register_themselves():
    module, calls = nn.Linear(3, 2), []
    after_every_step(module, lambda module: calls.append("first"))
    after_every_step(module, lambda module: calls.append("second"))
    twin = copy.deepcopy(module)
    step(module)
    assert calls == ["second"]
    after_every_step(twin, lambda module: calls.append("twin"))
    step(twin)
    assert sorted(calls) == ["second", "second", "twin"]


def test_one_hook_and_no_module_is_kept_alive():
    for _ in range(10):
        after_every_step(nn.Linear(3, 2), clamp)
    gc.collect()
    assert [hook for hook in hooks.values() if hook is after_step._mend_all] == [after_step._mend_all]
    assert not [module for module, mend in after_step._mends.items() if mend is clamp]
