"""What a rewire costs: the time of a step that rewires beside an ordinary one, and the peak memory of both."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsenet.layers import SparseLinear
from sparsenet.memory import measure_peak
from sparsenet.models import SparseMLP
from sparsenet.policies import SET, Policy, RigL
from sparsenet.reproduce.growth_cells import Growth
from sparsenet.sparsifier import Sparsifier

__all__ = ["NETWORKS", "POLICIES", "costs"]

EVERY, ROUNDS = 5, 8
POLICIES: dict[str, Callable[[], Policy]] = {
    "SET": lambda: SET(0.3),
    "RigL": lambda: RigL(0.3),
    "RigL, all places": lambda: RigL(0.3, candidates=None),
}


class GPTBlock(nn.Module):
    """Attention and feed-forward part of a transformer, 30 and 10 % dense, blocks of 16."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads, self.before, self.between = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (
            SparseLinear(width, width, density=0.3, block_size=16) for _ in range(4)
        )
        self.up = SparseLinear(width, hidden, density=0.1, block_size=16, activation="gelu")
        self.down = SparseLinear(hidden, width, density=0.1, block_size=16)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, places, width] -> the same."""
        y = self.before(x)
        heads = (f(y).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(self.up(self.between(x)))


def _mlp(scale: float) -> tuple[nn.Module, Tensor, Tensor]:
    width = max(64, round(4096 * scale) // 64 * 64)
    model = SparseMLP([784, width, width, width, 10], density=0.1, block_size=32)
    return model, torch.randn(256, 784), torch.randint(10, (256,))


def _gpt(scale: float) -> tuple[nn.Module, Tensor, Tensor]:
    width = max(40, round(640 * scale) // 40 * 40)
    blocks = [GPTBlock(width, 10, 4 * width) for _ in range(max(1, round(8 * scale)))]
    model = nn.Sequential(nn.Embedding(256, width), *blocks, nn.Linear(width, 256), nn.Flatten(0, 1))
    return model, torch.randint(256, (8, 128)), torch.randint(256, (8 * 128,))


NETWORKS: dict[str, Callable[[float], tuple[nn.Module, Tensor, Tensor]]] = {
    "MLP 784-4096-4096-4096-10, 10 %, batch 256": _mlp,
    "GPT of 39.6M weights, 30 and 10 %, 8 x 128 tokens": _gpt,
}


class _Training:
    """A network that is trained step by step on one made batch."""

    def __init__(self, network: str, policy: str, scale: float):
        torch.manual_seed(0)
        self.model, self.x, self.y = NETWORKS[network](scale)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3, fused=True)
        self.sparsifier = Sparsifier(self.model, self.optimizer, POLICIES[policy](), every=EVERY)

    def step(self) -> tuple[float, bool]:
        """Milliseconds of the processor, and whether it rewired."""
        started = time.thread_time()
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()
        update = self.sparsifier.step()
        return 1e3 * (time.thread_time() - started), update is not None


def times(network: str, scale: float) -> list[dict]:
    """Of every policy, in turns: medians of an ordinary and of a rewiring step, and the median of their ratios."""
    trainings = {name: _Training(network, name, scale) for name in POLICIES}
    ratios: dict[str, list[float]] = {name: [] for name in POLICIES}
    seen: dict[tuple[str, bool], list[float]] = {}
    for turn in range(ROUNDS):
        for name, training in trainings.items():
            took = [training.step() for _ in range(EVERY)]
            if not turn:
                continue
            ordinary = statistics.median(ms for ms, rewired in took if not rewired)
            rewiring = next(ms for ms, rewired in took if rewired)
            ratios[name].append(rewiring / ordinary)
            seen.setdefault((name, False), []).append(ordinary)
            seen.setdefault((name, True), []).append(rewiring)
    return [
        {
            "network": network,
            "policy": name,
            "step_ms": statistics.median(seen[name, False]),
            "rewiring_ms": statistics.median(seen[name, True]),
            "ratio": statistics.median(ratios[name]),
        }
        for name in POLICIES
    ]


def peak_bytes(network: str, policy: str, scale: float) -> int:
    """High-water mark of two rewires and the steps between, above that before the network was built."""
    torch.set_num_threads(1)
    with measure_peak() as peak:
        training = _Training(network, policy, scale)
        for _ in range(2 * EVERY):
            training.step()
    return peak.bytes


def costs(run: Growth) -> dict:
    """Times in turns in this process, peaks each in one of its own."""
    rows = []
    for network in NETWORKS:
        found = run.cell("cost", f"times, {network}", lambda n=network: {"rows": times(n, run.scale)})["rows"]
        for row in found:
            key = f"peak, {network}, {row['policy']}"
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                call = (network, row["policy"], run.scale)
                peak = run.cell("cost", key, lambda c=call, w=pool: {"bytes": w.apply(peak_bytes, c)})
            rows.append({**row, "peak_bytes": peak["bytes"]})
    return {"rows": rows}
