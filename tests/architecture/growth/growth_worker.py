"""One gloo rank of the Grower's distributed tests: ``python growth_worker.py CASE RANK STORE OUT``."""

from __future__ import annotations

import gc
import sys

import torch
import torch.distributed as dist
from torch import nn

import sparsenet as sn


def train(case: str, rank: int) -> tuple[nn.Module, sn.Grower]:
    """Trains on half of each batch; cases differ in the network, in budgets by rank and in what is validated."""
    torch.manual_seed(0)
    if case == "sparse":
        net = sn.SparseMLP([16, 16, 16, 4], 0.5, 4, generator=torch.Generator().manual_seed(0))
    else:
        net = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model = nn.parallel.DistributedDataParallel(net) if case == "plain" else sn.distributed.DataParallel(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    options = {"step_ms": 1e3} if case == "milliseconds" else {}
    if case == "validate":
        options["validate"] = lambda: 1.0 + rank
    budget = {"budgets": f"{64 - 32 * rank}KiB", "sparse": "320KiB"}.get(case, "64KiB")
    grower = sn.Grower(model, optimizer, budget, steps=120, every=10, density=0.9, **options)
    generator = torch.Generator().manual_seed(rank)
    for step in range(60):
        x = torch.randn(16 + 8 * rank, 16, generator=generator)
        loss = nn.functional.cross_entropy(model(x), (x[:, :4] * x[:, 4:8]).argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if case == "later" and step == 40:
            grower.budget = grower.bytes // (2 + rank)
        grower.step(loss)
    return net, grower


def main() -> None:
    """Joins, trains, and leaves weights, events and bytes behind."""
    case, rank, store, out = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    net, grower = train(case, rank)
    said = [str(event) for event in grower.events]
    content = {"weights": net.state_dict(), "events": said, "bytes": grower.bytes, "held": grower._losses.gain.points}
    torch.save(content, f"{out}.{rank}")
    gc.collect()  # the wrapper of the model, which shares the group
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
