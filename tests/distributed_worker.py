"""One gloo rank of the distributed tests: ``python distributed_worker.py CASE RANK WORLD STORE OUT``."""

import gc
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import sparsenet as sn
from sparsenet.policies import views

STEPS, BATCH = 9, 32


def make(seed=0, mask=None):
    torch.manual_seed(seed)
    model = sn.SparseMLP([40, 64, 64, 10], density=0.4, block_size=8)
    for layer in model if mask is not None else ():
        layer.set_element_mask(mask)
    return model


def batches(rows=BATCH):
    generator = torch.Generator().manual_seed(7)
    teacher = torch.randn(40, 10, generator=generator)
    for _ in range(STEPS):
        x = torch.randn(rows, 40, generator=generator)
        yield x, (x @ teacher).argmax(1)


def train(model, sparsifier, optimizer, rank, world, first=0, after_step=lambda step: None, rows=BATCH, micro=1):
    share = rows // micro // world
    for step, (x, y) in enumerate(batches(rows)):
        if step < first:
            continue
        optimizer.zero_grad()
        for turn in range(micro):
            part = slice((turn * world + rank) * share, (turn * world + rank + 1) * share)
            with nullcontext() if turn == micro - 1 or world == 1 else model.no_sync():
                (torch.nn.functional.cross_entropy(model(x[part]), y[part]) / micro).backward()
        optimizer.step()
        sparsifier.step()
        after_step(step + 1)


def train_with_checkpoints(kind, rank, world, checkpoint):
    """``dies``: rank 1 is gone after step 5, rank 0 has saved after step 4; ``resumes``: from there."""
    module = make()
    model = sn.distributed.DataParallel(module) if world > 1 else module
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    sparsifier = sn.Sparsifier(model, optimizer, policy("rigl"), every=3)
    first = sn.load(checkpoint, module, optimizer, sparsifier).step if kind == "resumes" else 0

    def after_step(step):
        if kind == "dies" and rank == 0 and step % 4 == 0:
            sn.save(checkpoint, module, optimizer, sparsifier, step=step)
        if kind == "dies" and rank == 1 and step == 5:
            os._exit(9)

    train(model, sparsifier, optimizer, rank, world, first, after_step)
    return module


def train_within_a_budget(rank, world):
    """The ranks are told other budgets in mid-training; their batches are of other sizes as well."""
    module = make()
    model = sn.distributed.DataParallel(module)
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    sparsifier = sn.Sparsifier(model, optimizer, policy("rigl"), every=3, budget="64MiB")
    blocks = sum(layer.pattern.num_blocks for layer in module)

    def after_step(step):
        if step == 4:
            sparsifier.budget = sparsifier.bytes * (95 - 10 * rank) // 100

    train(model, sparsifier, optimizer, rank, world, after_step=after_step)
    assert sparsifier.bytes <= sparsifier.budget.bytes
    assert sum(layer.pattern.num_blocks for layer in module) < 0.9 * blocks, "the smallest budget counts"
    return module


GROWTH = {  # by name: a policy, and how it is trained where that is not the default
    "candidates": (sn.RigL(0.1), {"rows": 256}),  # on a quarter of the rows
    "micro-batches": (sn.RigL(0.3), {"micro": 2}),
    "snfs": (sn.SNFS(0.3, momentum=0.5), {}),
    "snfs everywhere": (sn.SNFS(0.3, momentum=0.5, candidates=1000), {"micro": 2}),
    "mest": (sn.MEST(0.3, weight=1.0), {}),
    "granet": (sn.GraNet(0.3), {}),
    "elements": (sn.RigL(0.3), {}),
    "2:4": (sn.RigL(0.3), {}),
}


def train_with_each(rank, world):
    """One network after another, each with a way of growth of its own."""
    trained = torch.nn.ModuleDict()
    for name, (policy, how) in GROWTH.items():
        views.CHEAP = 0 if name == "candidates" else 1 << 24
        module = make(mask={"elements": 0.3, "2:4": "2:4"}.get(name))
        model = DistributedDataParallel(module) if world > 1 else module
        falling = {}
        if name == "granet":
            model = sn.distributed.DataParallel(module) if world > 1 else module
            falling = {"density": sn.Linear(0.4, 0.15, STEPS), "distribution": "global"}
        optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
        before = [layer.state_dict() for layer in module]
        elements = name in ("elements", "2:4")
        sparsifier = sn.Sparsifier(model, optimizer, policy, every=3, elements=elements, **falling)
        train(model, sparsifier, optimizer, rank, world, **how)
        sn.distributed.assert_same_topology(model)
        moved = "element_mask" if elements else "col_indices"
        for layer, state in zip(module, before, strict=True):
            now = layer.state_dict()[moved]
            assert layer.out_features == 10 or now.shape != state[moved].shape or not torch.equal(now, state[moved]), (
                name
            )
        trained[name] = module
    return trained


def policy(name):
    return {
        "rigl": sn.RigL(0.3),
        "set": sn.SET(0.3),
        "gmp": sn.GMP(),
        "taylor": sn.Taylor(0.3),
        "fisher": sn.Fisher(0.3),
        "woodfisher": sn.WoodFisher(0.3),
    }[name]


def run(case, rank, world, checkpoint):
    kind, name = case.split("-")
    if kind in ("dies", "resumes"):
        return train_with_checkpoints(kind, rank, world, checkpoint)
    if kind == "diverged":
        model = make()
        if rank == 1 and name == "mask":
            model[1].set_element_mask(0.5)
        elif rank == 1:
            model[1].set_pattern(sn.BlockPattern.random((64, 64), 0.4, 8))
        sn.distributed.assert_same_topology(model)
        return model
    if kind == "alike":
        model = make(seed=rank)
        if name != "x":
            model[1].set_element_mask([name, 0.3][rank])
            model[2].set_element_mask([None, "1:2"][rank])
        sn.distributed.synchronize(model)
        sn.distributed.assert_same_topology(model)
        return model
    if kind == "decision":
        model = make()
        sparsifier = sn.Sparsifier(model, None, sn.SET(0.3), every=2 + rank)
        for _ in range(3):
            sparsifier.step()
        return model
    if kind == "growth":
        return train_with_each(rank, world)
    if kind == "budget":
        return train_within_a_budget(rank, world)
    module = make(seed=rank if kind == "synchronized" else 0)
    density = sn.Linear(0.4, 0.15, STEPS) if name == "gmp" else None
    if kind == "refused":
        model = DistributedDataParallel(module)
    elif world > 1:
        model = sn.distributed.DataParallel(module) if kind == "synchronized" else DistributedDataParallel(module)
    else:
        model = module
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    sparsifier = sn.Sparsifier(model, optimizer, policy(name), density=density, every=3)
    train(model, sparsifier, optimizer, rank, world)
    if world > 1:
        sn.distributed.assert_same_topology(model)
    return module


def main():
    case, rank, world, store, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    module = run(case, rank, world, Path(out).with_name("checkpoint.safetensors"))
    torch.save(module.state_dict(), f"{out}.{rank}")
    if world > 1:
        # gloo's threads may still hold tensors: they have to end before the interpreter does, or the process aborts.
        gc.collect()  # the wrapper of the model, which shares the group
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
