"""Any architecture: what a decision adds changes no output, in train and in eval mode, and bytes stay in the budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_networks import random_network
from torch import nn

from sparsenet.architecture.growth import surgery
from sparsenet.architecture.growth.grower import Grower

FAMILIES = st.sampled_from(["dense", "block_sparse", "mixed", "cnn"])


def outputs(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """In train and eval mode; statistics of norms are left as they were."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    training, found = model.training, []
    for mode in (True, False):
        model.train(mode)
        with torch.no_grad():
            found.append(model(x))
    model.train(training)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in before and buffer.shape == before[name].shape:
                buffer.copy_(before[name])
    return found


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10_000), family=FAMILIES)
def test_two_decisions_of_any_architecture(seed, family):
    model, x = random_network(seed, family)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    changed: list[float] = []

    def watched(method):
        def called(self, *args):
            before = outputs(model, x)
            report = method(self, *args)
            scale = max(1.0, *(float(y.abs().max()) for y in before))
            together = zip(before, outputs(model, x), strict=True)
            changed.append(max(float((a - b).abs().max()) for a, b in together) / scale)
            return report

        return called

    with pytest.MonkeyPatch.context() as patch:
        for name in ("widen", "deepen"):
            patch.setattr(surgery.Surgery, name, watched(getattr(surgery.Surgery, name)))
        try:
            grower = Grower(model, optimizer, "4MiB", steps=40, every=4, density=1.0, idle=0.05, seed=seed)
        except ValueError as error:
            assert "whose units can change" in str(error)
            return
        for _ in range(9):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            grower.step(loss)
    assert all(event.bytes <= 4 << 20 for event in grower.events)
    assert len(grower.events) == 2
    assert max(changed, default=0.0) < 1e-9
