"""A network that builds itself to fit: from 8 units per layer to 64 MiB or 20 ms a step, then told to halve.

    python examples/grow_to_fit.py

Fashion-MNIST, a block-sparse network 784-8-8-8-10. It grows units and blocks while it trains, until a training step
takes 64 MiB or 20 milliseconds; at 60 % of the training both limits are halved, and it shrinks at once and goes on.
At the end the dense network of the same depth and the same bytes is trained for as many epochs; both accuracies are
printed, and ``grow_to_fit.png`` is drawn. Takes two to four minutes on two cores.

Milliseconds are measured, so the run depends on the machine and on what else it does: where other programs take the
cores, the limit of milliseconds keeps the network small. ``--step-ms 1000`` leaves the budget of bytes alone.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from pathlib import Path

import torch

import sparsenet as sn
from sparsenet.data import load
from sparsenet.memory import step_bytes
from sparsenet.plotting import COLOURS, new_axes, save_figure

HIDDEN = 3


def parse() -> argparse.Namespace:
    """The command line; the defaults are the story above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="fashion-mnist", help="name or path, as for sparsenet.data.load")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--budget", default="64MiB")
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", default="grow_to_fit.png")
    return parser.parse_args()


def prepared(name: str) -> tuple[torch.Tensor, ...]:
    """Standardised vectors and labels: training, held out (a tenth), test."""
    data = load(name)
    train, test = (x.flatten(1).float() for x in (data.train_x, data.test_x))
    mean, deviation = train.mean(), train.std()
    train, test = (train - mean) / deviation, (test - mean) / deviation
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    held, kept = order[: len(order) // 10], order[len(order) // 10 :]
    return train[kept], data.train_y[kept], train[held], data.train_y[held], test, data.test_y


@torch.no_grad()
def accuracy(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """In percent. In eval mode: what runs in training mode counts as a step, with its batch of 2000."""
    model.eval()
    found = torch.cat([model(rows) for rows in x.split(2000)]).argmax(1)
    model.train()
    return 100.0 * float((found == y).float().mean())


def density(model: torch.nn.Module) -> float:
    """Of all layers together."""
    layers = list(model)
    return sum(m.num_active for m in layers) / sum(m.in_features * m.out_features for m in layers)


def train_grown(args: argparse.Namespace, data: tuple[torch.Tensor, ...]) -> tuple[torch.nn.Module, sn.Grower, list]:
    """The grown network, its Grower and what was noted on the way."""
    x, y, held_x, held_y = data[:4]
    classes = int(y.max()) + 1
    generator = torch.Generator().manual_seed(args.seed)
    model = sn.SparseMLP([x.shape[1], *[8] * HIDDEN, classes], [0.1, 1.0, 1.0, 1.0], 16, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)
    steps = args.epochs * (len(x) // args.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    every = max(2, min(25, steps // 20))
    grower = sn.Grower(
        model,
        optimizer,
        args.budget,
        args.step_ms,
        steps=steps,
        levels=("blocks", "units"),
        every=every,
        seed=args.seed,
    )
    notes, started = [], time.perf_counter()
    for step in range(steps):
        if step % (len(x) // args.batch) == 0:
            order = torch.randperm(len(x), generator=generator)
        rows = order[step % (len(x) // args.batch) * args.batch :][: args.batch]
        if step == int(0.6 * steps):
            grower.budget = sn.MemoryBudget(args.budget).bytes // 2
            grower.step_ms = args.step_ms / 2
            print(f"step {step}: the limits are halved", flush=True)
        loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        event = grower.step(loss)
        schedule.step()
        if event is not None:
            shown = accuracy(model, held_x, held_y) if step % 250 < every or step == steps - 1 else None
            units = [layer.out_features for layer in model][:-1]
            milliseconds = event.milliseconds or float("nan")  # not known right after it shrank
            notes.append((step, units, density(model), event.bytes, milliseconds, shown))
            if shown is not None:
                print(f"{event}; units {units}; held out {shown:.2f} %", flush=True)
    print(f"trained in {time.perf_counter() - started:.0f} s", flush=True)
    return model, grower, notes


def train_dense(args: argparse.Namespace, data: tuple[torch.Tensor, ...], budget: int) -> tuple[float, int]:
    """Test accuracy and width of the widest dense network whose step fits ``budget`` bytes."""
    x, y = data[:2]
    classes = int(y.max()) + 1

    def build(width: int) -> torch.nn.Sequential:
        torch.manual_seed(args.seed)
        sizes = [x.shape[1], *[width] * HIDDEN, classes]
        layers: list[torch.nn.Module] = []
        for inp, out in pairwise(sizes):
            layers += [torch.nn.Linear(inp, out), torch.nn.ReLU()]
        return torch.nn.Sequential(*layers[:-1])

    def needs(width: int) -> int:
        model = build(width)
        return step_bytes(model, torch.optim.AdamW(model.parameters(), fused=True), x[: args.batch]).at_once

    low, high = 1, 4096
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needs(middle) <= budget else (low, middle - 1)
    model = build(low)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)
    steps = args.epochs * (len(x) // args.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(args.seed)
    for step in range(steps):
        if step % (len(x) // args.batch) == 0:
            order = torch.randperm(len(x), generator=generator)
        rows = order[step % (len(x) // args.batch) * args.batch :][: args.batch]
        loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return accuracy(model, *data[4:]), low


def draw(notes: list, args: argparse.Namespace) -> None:
    """Units, density, bytes, milliseconds and accuracy over time."""
    figure, axes = new_axes(9.0, 7.0, nrows=5, sharex=True)
    steps = [note[0] for note in notes]
    for layer in range(HIDDEN):
        label = f"layer {layer + 1}"
        axes[0].plot(steps, [note[1][layer] for note in notes], color=COLOURS[layer], label=label)
    axes[0].set_ylabel("units")
    axes[0].legend(loc="center right")
    axes[1].plot(steps, [100 * note[2] for note in notes], color=COLOURS[0])
    axes[1].set_ylabel("density, %")
    axes[2].plot(steps, [note[3] / 2**20 for note in notes], color=COLOURS[0])
    axes[2].set_ylabel("MiB a step")
    axes[3].plot(steps, [note[4] for note in notes], color=COLOURS[0])
    axes[3].set_ylabel("ms a step")
    last = max(steps)
    for ax, limit in ((axes[2], sn.MemoryBudget(args.budget).bytes / 2**20), (axes[3], args.step_ms)):
        ax.step([0, 0.6 * last, last], [limit, limit / 2, limit / 2], where="post", color=COLOURS[3], linestyle="--")
    shown = [(note[0], note[5]) for note in notes if note[5] is not None]
    axes[4].plot(*zip(*shown, strict=True), "o-", color=COLOURS[2])
    axes[4].set(ylabel="held out, %", xlabel="step")
    axes[0].set_title("Grown to fit; at 60 % both limits (dashed) are halved")
    print(save_figure(figure, Path(args.plot)))


def main() -> None:
    """Grows, compares, draws."""
    args = parse()
    data = prepared(args.data)
    model, grower, notes = train_grown(args, data)
    grown = accuracy(model, *data[4:])
    half = sn.MemoryBudget(sn.MemoryBudget(args.budget).bytes // 2)
    print(f"grown    {grown:.2f} %, {sn.MemoryBudget(grower.bytes)} of {half}, {grower.milliseconds:.1f} ms")
    dense, width = train_dense(args, data, grower.bytes)
    print(f"dense    {dense:.2f} %, {width} units per layer, equal bytes")
    draw(notes, args)


if __name__ == "__main__":
    main()
