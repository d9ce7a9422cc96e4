"""``sparsenet reproduce gates``: Srinivas and Babu's experiments with tri-state ReLU, and the checks B1 to B10.

Every training is a cell that is kept as soon as it is done (``<out>/cells``), every part a file ``<out>/<part>.json``;
neither is computed again while it is there, so a killed run goes on where it was, and ``--parts`` runs some. The tables
put the published or required value beside ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from sparsenet.architecture.gates import TriStateReLU, architecture_penalty
from sparsenet.architecture.search.samplers import require_optuna
from sparsenet.reproduce import gate_tables
from sparsenet.reproduce import parts as reproduce_parts
from sparsenet.reproduce.gate_cells import (
    ALL,
    ALL_AND_DEPTH,
    FC,
    Reproduction,
    baseline,
    direct,
    learn,
    weights_and_biases,
)
from sparsenet.reproduce.gate_mechanics import caffenet_mechanics, running_process
from sparsenet.reproduce.gate_training import Images
from sparsenet.reproduce.gated_networks import CAFFENET, caffenet_parameters, lenet, lenet_parameters

__all__ = ["PARTS", "add_arguments", "run"]

SHORT = {"lambda_1": 1e-4, "lambda_3": 1e-3}  # beyond the paper's lambda_3 < lambda_1: only data keep a gate up
MAPS_OPEN = {"map_start": 1.0}  # gates of convolutions start open, those of hidden layers at U(0, 1)
TIMES = ("cpu_seconds", "cell_wall_seconds", "cell_cpu_seconds")
PRICE = 1e-5  # lambda of the comparison with Bayesian optimisation: cost = loss + lambda * units


# --- B1, B9: counts -------------------------------------------------------------------------------------------------


def gates_alone(task: Reproduction) -> dict:
    """B1: 500 uniform gates without data, lambda_1 = 1e-2, an epoch of steps; k = 0.4 and others."""
    rows = []
    for ratio in (0.1, 0.2, 0.4, 0.5):
        for seed in (0, 1, 2):
            unit = TriStateReLU(500, depth=False, generator=torch.Generator().manual_seed(seed))
            optimizer = torch.optim.SGD(unit.parameters(), lr=0.3, momentum=0.9)
            above = int((unit.width_gate > 0.5 + ratio / 2).sum())
            for _ in range(938):
                optimizer.zero_grad()
                architecture_penalty(unit, lambda_3=ratio * 1e-2, lambda_1=1e-2).backward()
                optimizer.step()
            predicted = 500 * (0.5 - ratio / 2)
            rows.append({"k": ratio, "seed": seed, "left": unit.num_open(), "above": above, "predicted": predicted})
    return {"rows": rows}


def parameter_counter(task: Reproduction) -> dict:
    """B9: the published architectures, counted."""
    published = {
        "CaffeNet": (CAFFENET, 60.9e6),
        "AL-fc": ((96, 256, 384, 384, 256, 1536, 1317, 1000), 19.8e6),
        "AL-conv": ((80, 127, 264, 274, 183, 4096, 4096, 1000), 47.8e6),
        "AL-conv-fc": ((96, 256, 384, 384, 237, 1761, 1661, 1000), 19.6e6),
    }
    rows = [[name, list(widths), caffenet_parameters(widths), printed] for name, (widths, printed) in published.items()]
    lenets = {"LeNet": ((20, 50, 500), 431e3), "AL2": ((20, 50, 20), 40.9e3), "AL4": ((20, 50, 70), 82.3e3)}
    rows += [[name, [*widths, 10], lenet_parameters(widths), printed] for name, (widths, printed) in lenets.items()]
    for name, widths in (("AL1", (16, 26)), ("AL3", (16, 40))):
        rows.append([name, [*widths, 10], lenet_parameters(widths), None])
    built = all(weights_and_biases(lenet(w[:-1], ((False, False),) * (len(w) - 1))) == n for _, w, n, _ in rows[4:])
    return {"rows": rows, "counted_in_built_networks": built}


# --- the LeNet-like tables ------------------------------------------------------------------------------------------


def lenet_table(task: Reproduction) -> dict:
    """The main table on MNIST: baseline, AL1 to AL4, each learnt network also trained directly, SVD at equal size."""
    images, part = task.mnist_images, "al_mnist"
    plain = task.settings(60_000, task.count(4), compact_every=0)
    cells: dict[str, list] = {"baseline": [], "learnt": [], "direct": []}
    for seed in task.seeds:
        keep = task.out / "weights" / f"mnist_{seed}.safetensors"
        cells["baseline"].append(
            task.cell(part, f"baseline {seed}", partial(baseline, images, plain, seed, (10, 40), keep))
        )
    for name, layers, strength in (
        ("AL1", ALL_AND_DEPTH, 2e-4),
        ("AL2", ALL, 2e-4),
        ("AL3", ALL_AND_DEPTH, 1e-4),
        ("AL4", ALL, 1e-4),
    ):
        gated = task.settings(60_000, plain.epochs, lambda_1=1e-4, lambda_3=strength, depth_reward=1e-4)
        for seed in task.seeds:
            compute = partial(learn, images, gated, layers, seed, depth_start=0.5, **MAPS_OPEN)
            found = task.cell(part, f"{name} {seed}", compute)
            cells["learnt"].append({**found, "name": name, "lambda_3": strength})
            again = task.cell(part, f"{name} {seed} direct", partial(direct, images, plain, found["widths"], seed))
            cells["direct"].append({**again, "name": name})
    return {**cells, "epochs": plain.epochs, "images": plain.images}


def short_budget(task: Reproduction) -> dict:
    """B2, B3, B6, B7 on Fashion-MNIST: 15,000 images, 6 epochs."""
    images, part = task.fashion_images, "b2_fashion"
    plain, gated = (task.settings(15_000, task.count(6), **how) for how in ({"compact_every": 0}, SHORT))
    cells: dict[str, list] = {"baseline": [], "learnt": [], "direct": []}
    for seed in task.seeds:
        keep = task.out / "weights" / f"fashion_{seed}.safetensors"
        cells["baseline"].append(
            task.cell(part, f"baseline {seed}", partial(baseline, images, plain, seed, (5, 10, 40), keep))
        )
    for name, layers, options in (("fc", FC, {}), ("all", ALL, MAPS_OPEN)):
        for seed in task.seeds:
            found = task.cell(part, f"{name} {seed}", partial(learn, images, gated, layers, seed, **options))
            cells["learnt"].append({**found, "name": name})
            again = task.cell(part, f"{name} {seed} direct", partial(direct, images, plain, found["widths"], seed))
            cells["direct"].append({**again, "name": name})
    return {**cells, "epochs": plain.epochs, "images": plain.images}


def strengths(task: Reproduction) -> dict:
    """Units of the 500-unit layer over training, for several lambda_1 and lambda_3; MNIST."""
    rows = []
    for one, three in ((1e-4, 1e-4), (1e-4, 3e-4), (1e-4, 1e-3), (1e-4, 3e-3), (1e-2, 1e-3), (1e-2, 5e-3)):
        gated = task.settings(8_000, task.count(6), lambda_1=one, lambda_3=three)
        for seed in task.seeds:
            key = f"lambda_1 {one:g} lambda_3 {three:g} {seed}"
            found = task.cell("strengths", key, partial(learn, task.mnist_images, gated, FC, seed), curves=True)
            rows.append({**found, "lambda_1": one, "lambda_3": three})
    return {"rows": rows}


def classes(task: Reproduction, images: Images, part: str, count_images: int) -> dict:
    """B4: neurons that the hidden layer learns for the first 2 to 10 classes; 5 epochs."""
    gated, rows = task.settings(count_images, task.count(5), **SHORT), []
    for count in range(2, 11):
        for seed in task.seeds:
            compute = partial(learn, images.of_classes(count), gated, FC, seed)
            rows.append({**task.cell(part, f"{count} classes {seed}", compute), "classes": count})
    return {"rows": rows}


def depths(task: Reproduction) -> dict:
    """B8: 20-50-(75 x n)-10 with every width and the hidden layers' depths learnable, MNIST.

    Width gates start open and depth gates at one half: the hidden layers start linear, with weights that keep
    variances, and become ReLUs where the data ask for it. A deep network of ReLUs without normalisation does not
    survive gates that close. Strengths and the rate of gates rise over the first third; the rate falls again with that
    of the weights.
    """
    strength = {"lambda_1": 3e-4, "lambda_3": 3e-3, "depth_reward": 3e-4, "warmup": 0.3, "settle": True}
    gated = task.settings(8_000, task.count(10), lr=0.01, gate_lr=0.05, **strength)
    options = {"width_start": 1.0, "depth_start": 0.5, "same_variance": True, **MAPS_OPEN}
    rows = []
    for hidden in (2, 3, 5, 7, 9, 12) if task.scale >= 1 else (2, 4):
        layers = ((True, False),) * 2 + ((True, True),) * hidden
        widths = (20, 50, *[75] * hidden)
        for seed in task.seeds:
            compute = partial(learn, task.mnist_images, gated, layers, seed, widths, **options)
            found = task.cell("b8_depth", f"{hidden} hidden {seed}", compute)
            rows.append({**found, "hidden": hidden, "initial": hidden + 3, "final": len(found["widths"]) + 1})
    return {"rows": rows}


def pretrained(task: Reproduction) -> dict:
    """Gates put into the trained baseline, started open, against a start from random weights; MNIST, short budget."""
    from safetensors.torch import load_file

    gated, rows = task.settings(15_000, task.count(6), **SHORT), []
    for seed in task.seeds:
        file = task.out / "weights" / f"mnist_{seed}.safetensors"
        if not file.exists():
            raise ValueError(f"reproduce gates: pretrained must follow al_mnist, which trains it; got no {file}")
        for name, layers in (("fc", FC), ("all", ALL)):
            for start in ("random", "pretrained"):
                options = {"start": load_file(str(file)), "width_start": 1.0} if start == "pretrained" else {}
                options |= MAPS_OPEN if name == "all" else {}
                compute = partial(learn, task.mnist_images, gated, layers, seed, **options)
                rows.append(
                    {**task.cell("pretrained", f"{name} {start} {seed}", compute), "name": name, "start": start}
                )
    return {"rows": rows}


def relatives(task: Reproduction) -> dict:
    """B10: the other gates as B2 (Fashion-MNIST, hidden layer), at strengths around those that leave as many units."""
    rows = []
    choices = (  # a hard-concrete gate that starts half open has a gradient; its parameter is a logit, hence the rate
        ("hard_concrete", (1e-3, 4e-3), {"gate_lr": 2.0}, {"width_start": 0.6}),
        ("slimming", (3e-3, 6e-3), {}, {}),
        ("straight_through", (6e-4, 8e-4, 9e-4), {}, {}),
    )
    for kind, strengths_of_kind, changes, options in choices:
        for three in strengths_of_kind:
            gated = task.settings(15_000, task.count(6), lambda_1=0.0, lambda_3=three, **changes)
            for seed in task.seeds:
                compute = partial(learn, task.fashion_images, gated, FC, seed, gates=kind, **options)
                found = task.cell("b10_relatives", f"{kind} {three:g} {seed}", compute)
                rows.append({**found, "gates": kind, "lambda_3": three})
    return {"rows": rows}


# --- against Bayesian optimisation ----------------------------------------------------------------------------------


def bayesian(task: Reproduction) -> dict:
    """20 runs of Bayesian optimisation of the widths against one run with gates, each trained alike; MNIST.

    The cost is that of the paper, loss + 1e-5 * units, the loss on 5,000 training images that are held out.
    """
    full = task.mnist_images
    images = full.held_out(min(4_000, len(full.train_x) * 5 // 6), min(5_000, len(full.train_x) // 6))
    plain = task.settings(4_000, task.count(4), compact_every=0)
    gated = task.settings(4_000, plain.epochs, **SHORT)
    runs: list[dict] = []
    learnt: list[dict] = []
    for name, layers, options in (("hidden layer", FC, {}), ("all layers", ALL, MAPS_OPEN)):
        for seed in task.seeds:
            key, compute = f"gates {name} {seed}", partial(learn, images, gated, layers, seed, **options)
            learnt.append({"name": name, "seed": seed, **_cost(task.cell("bayesian", key, compute))})
            runs.append({"name": name, "seed": seed, "costs": _optimise(task, images, plain, name, seed)})
    return {"gates": learnt, "bayesian": runs}


def _cost(cell: dict) -> dict:
    shown = {key: cell[key] for key in ("widths", "test_loss", "accuracy", *TIMES)}
    return {**shown, "cost": cell["test_loss"] + PRICE * sum(cell["widths"])}


def _optimise(task: Reproduction, images: Images, settings, name: str, seed: int) -> list[dict]:
    """The costs that a Gaussian process's proposals reach, in order."""
    optuna = require_optuna()
    study = optuna.create_study(sampler=optuna.samplers.GPSampler(seed=seed, n_startup_trials=5))
    found = []
    for number in range(task.count(20, 6)):
        trial = study.ask()
        maps = (
            [trial.suggest_int(f"maps_{i}", 1, most) for i, most in enumerate((20, 50))] if "all" in name else [20, 50]
        )
        widths = [*maps, trial.suggest_int("units", 1, 500, log=True)]
        key = f"optimised {name} {seed} {number} {widths}"
        found.append(_cost(task.cell("bayesian", key, partial(direct, images, settings, widths, seed))))
        study.tell(trial, found[-1]["cost"])
    return found


PARTS: dict[str, Callable[[Reproduction], dict]] = {
    "b1_gates_alone": gates_alone,
    "b9_parameters": parameter_counter,
    "b2_fashion": short_budget,
    "b8_depth": depths,
    "al_mnist": lenet_table,
    "b4_classes_mnist": lambda task: classes(task, task.mnist_images, "b4_classes_mnist", 4_000),
    "b4_classes_fashion": lambda task: classes(task, task.fashion_images, "b4_classes_fashion", 8_000),
    "b10_relatives": relatives,
    "strengths": strengths,
    "pretrained": pretrained,
    "bayesian": bayesian,
    "running_process": running_process,
    "caffenet": caffenet_mechanics,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``sparsenet reproduce gates``."""
    parser.add_argument(
        "--data-dir", help="folder with mnist/ and fashion-mnist/, or of MNIST's files; default: as sparsenet.data.load"
    )
    parser.add_argument("--out", default="reproduce-gates", help="folder of numbers, tables and figures")
    parser.add_argument("--parts", default="all", help=f"comma-separated, of {', '.join(PARTS)}")
    parser.add_argument("--scale", type=float, default=1.0, help="below 1: fewer images, epochs, seeds; a quick look")
    parser.add_argument("--quick", dest="scale", action="store_const", const=0.05, help="the same as --scale 0.05")


def run(args: argparse.Namespace) -> int:
    """Runs the parts that are missing, prints the tables, draws the figures; errors: ``parts.reproduce``."""
    task = Reproduction(Path(args.out), args.data_dir, scale=args.scale)
    return reproduce_parts.reproduce("gates", args, PARTS, task, gate_tables.tables, gate_tables.figures)
