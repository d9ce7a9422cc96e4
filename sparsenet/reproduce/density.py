"""``sparsenet reproduce density``: Tessera and Rosman's experiments and the acceptance checks A1 to A7.

``--parts`` runs some; see ``parts``. The tables print the published or required value beside ours.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from sparsenet import data as datasets
from sparsenet.architecture.search.estimators import compare_estimators
from sparsenet.architecture.search.run import load_dataset, retrain, search, write_report
from sparsenet.architecture.search.samplers import RandomSampler, StudySampler, random_parameters
from sparsenet.architecture.search.space import Architecture, SearchSpace
from sparsenet.architecture.search.trials import (
    TrialConfig,
    TrialData,
    effective_gradient_flow,
    train_trial,
)
from sparsenet.architecture.search.workers import SearchConfig, open_study
from sparsenet.reproduce import density_tables
from sparsenet.reproduce import parts as reproduce_parts
from sparsenet.reproduce.parts import kept_row

__all__ = ["PARTS", "add_arguments", "run"]

WIDTHS = (5, 10, 25, 50, 75, 95)  # dense hidden units; the sparse twin has 100 at density units / 100
DEPTHS = (1, 2, 4, 8, 16, 32)
SEEDS = (0, 1, 2)
UNTUNED = {"norm": "none", "learning_rate": 1e-3, "block_size": 1, "gradient_flow_samples": 0}
PUBLISHED = {"activations": ("relu",), "allow_linear": False}
MODES = {
    "plain": {},
    "small init": {"init": "small"},
    "modern": {"norm": "batch", "residual": True},
}


@dataclass(frozen=True)
class Reproduction:
    """What the parts share: data folder, output folder, how much to run.

    ``scale`` < 1 shrinks training sets, trials and seeds for a quick look; targets are stated for 1.
    """

    out: Path
    data_dir: str | None = None
    workers: int = 2
    scale: float = 1.0

    def load(self, name: str) -> datasets.Dataset:
        """A data set, with a share of its training examples where ``scale`` asks for it."""
        folder = self.data_dir
        inside = folder is not None and Path(folder, name).is_dir()
        dataset = load_dataset(name, folder if inside else None, fallback=False)
        if self.scale < 1 and len(dataset.train_y) * self.scale > 200:
            kept, _ = datasets.split(dataset.train_y, 1 - self.scale)
            dataset = replace(dataset, train_x=dataset.train_x[kept], train_y=dataset.train_y[kept])
        return dataset

    @cached_property
    def fashion(self) -> datasets.Dataset:
        """Fashion-MNIST."""
        return self.load("fashion-mnist")

    @cached_property
    def mnist(self) -> datasets.Dataset:
        """MNIST."""
        return self.load("mnist")

    def count(self, full: int, least: int = 2) -> int:
        """``full``, scaled."""
        return full if self.scale >= 1 else max(least, round(full * self.scale**0.5))

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of every point."""
        return SEEDS if self.scale >= 1 else SEEDS[:1]


# --- A1, A7: counts and formulas ---


def exact_counts(task: Reproduction) -> dict:
    """A1: N = 794 u for W = 100, u = 5..95; two full hidden layers have 89,400. Counted in the built layers."""
    rows = []
    for units in range(5, 100, 5):
        architecture = Architecture(784, 10, 100, (units / 100, units / 100))
        rows.append([units, 794 * units, architecture.active_weights, architecture.build().active_weights()])
    full = Architecture(784, 10, 100, (1.0, 1.0, 1.0)).build().active_weights()
    blocks = Architecture(784, 10, 100, (0.35, 0.35)).build(block_size=16).active_weights()
    exact = all(row[1] == row[2] == row[3] for row in rows) and full == 89400 and blocks == 794 * 35
    return {"rows": rows, "two_full_layers": full, "u35_in_blocks_of_16": blocks, "exact": exact}


def gradient_flow_formula(task: Reproduction) -> dict:
    """A7: EGF against its closed form on a two-layer linear network, where dC/dW2 = e h^T and dC/dW1 = W2^T e x^T."""
    model = Architecture(6, 3, 5, (0.5, 0.6), linear=(True,)).build(seed=1)
    x, target = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    model = model.double()
    loss = 0.5 * (model(x) - target).square().sum()
    loss.backward()
    weights = [layer.weight_dense().detach() for layer in model.linears]
    masks = model.masks()
    hidden = x @ weights[0].t() + model.linears[0].bias.detach()
    error = hidden @ weights[1].t() + model.linears[1].bias.detach() - target
    gradients = [(error @ weights[1]).t() @ x * masks[0], error.t() @ hidden * masks[1]]
    worst = 0.0
    for p in (1.0, 2.0):
        for normalise in (None, "active"):
            norms = [float(g.flatten().norm(p)) for g in gradients]
            if normalise == "active":
                norms = [n / int(m.sum()) for n, m in zip(norms, masks, strict=True)]
            closed = sum(norms) / 2
            worst = max(worst, abs(effective_gradient_flow(model, p, normalise) / closed - 1))
    return {"largest_relative_error": worst}


# --- A2, A6: dense against sparse ---


def equal_capacity(task: Reproduction, dataset: datasets.Dataset, fraction: float = 1.0) -> dict:
    """A2: one hidden layer; dense ``u`` units against 100 units at density u / 100; three random patterns each.

    Ten epochs of Adam at a constant rate, on ``fraction`` of the training examples.
    """
    data = TrialData.from_dataset(dataset, validation=0)
    config = TrialConfig(
        epochs=task.count(10), schedule="constant", weight_decay=0.0, train_fraction=fraction, **UNTUNED
    )
    rows, file = [], task.out / f"rows_a2_{dataset.name}_{fraction:g}.jsonl"
    for units in WIDTHS:
        for kind in ("sparse", "dense"):
            width, density = (100, units / 100) if kind == "sparse" else (units, 1.0)
            for seed in task.seeds:
                architecture = Architecture(
                    data.features, data.num_classes, width, (density, density), pattern_seed=seed
                )
                key = {"active": architecture.active_weights, "kind": kind, "seed": seed}
                own = replace(config, seed=seed)
                rows.append(kept_row(file, key, partial(_trained, architecture, data, own)))
    file.unlink()
    return {"rows": rows, "epochs": config.epochs, "p_value": wilcoxon(rows, "active")}


def depths(task: Reproduction, dataset: datasets.Dataset) -> dict:
    """A6: 1 to 32 hidden layers, dense 75 against sparse W = 100 (.75; .5625; .75), three epochs, three patterns.

    ``plain`` starts with He's variance; ``small init`` with nn.Linear's default, a sixth of it, with which deep
    networks collapse as published; ``modern`` is BatchNorm and residual connections. The last two from 8 layers.
    """
    data = TrialData.from_dataset(dataset, validation=0)
    rows, file = [], task.out / f"rows_a6_{dataset.name}.jsonl"
    for depth in DEPTHS if task.scale >= 1 else DEPTHS[:3]:
        for mode in MODES if depth >= 8 else ("plain",):
            config = TrialConfig(epochs=3, **(UNTUNED | MODES[mode]))
            for kind in ("sparse", "dense"):
                width = 100 if kind == "sparse" else 75
                densities = (0.75, *[0.5625] * (depth - 1), 0.75) if kind == "sparse" else (1.0,) * (depth + 1)
                for seed in task.seeds:
                    architecture = Architecture(data.features, data.num_classes, width, densities, pattern_seed=seed)
                    key = {"depth": depth, "mode": mode, "kind": kind, "seed": seed}
                    own = replace(config, seed=seed)
                    rows.append(kept_row(file, key, partial(_trained, architecture, data, own)))
    file.unlink()
    plain = [row for row in rows if row["mode"] == "plain"]
    return {"rows": rows, "epochs": 3, "p_value": wilcoxon(plain, "depth")}


def wilcoxon(rows: list[dict], axis: str) -> float:
    """P-value of the signed-rank test that sparse and dense accuracies, paired by size and seed, are equal."""
    from scipy.stats import wilcoxon as signed_rank

    accuracy = {(r[axis], r["seed"], r["kind"]): r["accuracy"] for r in rows}
    pairs = [(v, accuracy[size, seed, "dense"]) for (size, seed, kind), v in accuracy.items() if kind == "sparse"]
    return float(signed_rank(*zip(*pairs, strict=True)).pvalue)


def _trained(architecture: Architecture, data: TrialData, config: TrialConfig) -> dict:
    result = train_trial(architecture, data, config)
    curve = [a for _, _, a in result.curve]
    return {
        "accuracy": 100 * result.accuracy,
        "loss": result.loss,
        "mean_accuracy": 100 * sum(curve) / len(curve),
        "seconds": result.seconds,
    }


# --- A3: the searches ---


def headline(task: Reproduction, dataset: datasets.Dataset, sampler: str) -> dict:
    """A3: three searches of 30 trials under ASHA, W <= 512, depth <= 3, N <= 60,000; winners retrained three times."""
    data = TrialData.from_dataset(dataset)
    space = SearchSpace(data.features, data.num_classes, max_depth=3, max_width=512, max_active=60000)
    trial = TrialConfig(epochs=task.count(12), train_fraction=0.34)  # a third of the examples ranks nearly as well (A4)
    searches = []
    for seed in task.seeds:
        config = SearchConfig(trials=task.count(30, 6), sampler=sampler, workers=task.workers, trial=trial, seed=seed)
        folder = task.out / f"search_{dataset.name}_{sampler}_{seed}"
        report = search(space, data, config, folder=folder, progress=True)
        best = report.architecture(report.best())
        finals = retrain(best, dataset, trial, task.seeds)
        write_report(report, finals, folder)
        shown = {"active": best.active_weights, "depth": best.depth, "activation": best.activation}
        shown["layers"] = [
            [active, activation] for active, (_, _, activation) in zip(best.active_per_layer, best.layers, strict=True)
        ]
        shown |= {"accuracy": [100 * f.accuracy for f in finals], "loss": [f.loss for f in finals]}
        shown |= {"trial": report.best().number, "trials": len(report.trials), "finished": len(report.finished())}
        searches.append(shown)
    return {"searches": searches}


def pareto(task: Reproduction) -> dict:
    """Loss and active weights minimised together on MNIST: 60 trials of TPE, all trained in full, of any size."""
    data = TrialData.from_dataset(task.mnist)
    space = SearchSpace(data.features, data.num_classes, max_depth=3, max_width=512, min_density=0.003)
    trial = TrialConfig(epochs=task.count(6), train_fraction=0.34)
    config = SearchConfig(trials=task.count(60, 6), pruner="none", multi_objective=True, trial=trial)
    folder = task.out / "search_pareto"
    report = search(space, data, config, folder=folder, progress=True)
    write_report(report, [], folder)
    return {
        "trials": len(report.trials),
        "front": [[t.active_weights, t.depth, 100 * t.accuracy, t.loss] for t in report.pareto()],
    }


# --- A4, A5: estimators and samplers ---


def estimators(task: Reproduction, **bounds: object) -> dict:
    """A4: rank correlation of every estimator with full training, 16 architectures over capacity, Fashion-MNIST."""
    data = TrialData.from_dataset(task.fashion)
    space = SearchSpace(784, 10, max_depth=3, max_width=256, min_density=0.02, **bounds)
    count = 16 if task.scale >= 1 else 4
    architectures = []
    for i in range(count):  # sizes from 4,000 to 80,000, shapes at random
        shape = RandomSampler(space, seed=100 + i).ask().architecture
        architectures.append(shape.scaled_to(round(4000 * 20 ** (i / (count - 1)))))
    config = TrialConfig(epochs=task.count(6))
    rows, truth = compare_estimators(architectures, data, config, report=print)
    return {
        "rows": [vars(row) for row in rows],
        "truth": truth,
        "active": [a.active_weights for a in architectures],
        "epochs": config.epochs,
    }


TABLE_LEVELS = (0.02, 0.06, 0.15, 0.4, 1.0)


def regret(task: Reproduction) -> dict:
    """A5: TPE and GP against random search, 30 evaluations, 10 repeats, on a cached table of real (short) trainings.

    The table holds depth 1 and 2 with densities on 5 levels; a proposal is read at the nearest level. The objective is
    error + 0.2 * active / largest, so that neither the densest nor the sparsest network wins.
    """
    space = SearchSpace(
        784,
        10,
        max_depth=2,
        max_width=64,
        min_density=TABLE_LEVELS[0],
        pattern_seeds=1,
        **PUBLISHED,
    )
    data = TrialData.from_dataset(task.fashion)
    config = TrialConfig(epochs=2, train_fraction=min(1.0, 0.15 / task.scale), gradient_flow_samples=0)
    table: dict[str, float] = {}
    largest = Architecture(784, 10, 64, (1.0, 1.0, 1.0)).active_weights

    def value(architecture: Architecture) -> float:
        levels = tuple(min(TABLE_LEVELS, key=lambda v: abs(v / d - 1)) if d else 0.0 for d in architecture.densities)
        key = repr(levels)
        if key not in table:
            result = train_trial(Architecture(784, 10, 64, levels), data, config)
            table[key] = 1 - result.accuracy + 0.2 * result.active_weights / largest
        return table[key]

    evaluations, repeats = (30, 10) if task.scale >= 1 else (12, 2)
    curves: dict[str, list[list[float]]] = {}
    for kind in ("random", "tpe", "gp"):
        for seed in range(repeats):
            sampler = RandomSampler(space, seed) if kind == "random" else StudySampler(space, kind, seed)
            best, curve = float("inf"), []
            for _ in range(evaluations):
                proposal = sampler.ask()
                result = value(proposal.architecture)
                sampler.tell(proposal, result)
                best = min(best, result)
                curve.append(best)
            curves.setdefault(kind, []).append(curve)
    optimum = min(table.values())
    mean = {k: statistics.fmean(c[-1] - optimum for c in v) for k, v in curves.items()}
    return {"mean_regret": mean, "optimum": optimum, "table_entries": len(table), "curves": curves}


def same_seed(task: Reproduction) -> dict:
    """Same seed, same trials: two TPE searches told the same losses propose the same parameters."""
    space = SearchSpace(784, 10, max_depth=3, max_width=128)
    runs = []
    for _ in range(2):
        sampler, asked = StudySampler(space, "tpe", seed=5), []
        for _ in range(14):
            proposal = sampler.ask()
            sampler.tell(proposal, abs(proposal.parameters["density_0"] - 0.3))
            asked.append(proposal.parameters)
        runs.append(asked)
    return {"same": runs[0] == runs[1], "random": random_parameters(space, 5, 3) == random_parameters(space, 5, 3)}


def workers(task: Reproduction) -> dict:
    """Trials per minute of one and of two worker processes, one thread each, from the first start to the last end.

    In turns, three rounds; reported are the medians, of the ratio within each round as well.
    """
    data = TrialData.from_dataset(task.fashion)
    space = SearchSpace(784, 10, max_depth=2, min_depth=2, max_width=256, min_density=0.15, max_density=0.2)
    trial = TrialConfig(epochs=task.count(6), train_fraction=min(1.0, 0.5 / task.scale))
    load = os.getloadavg()[0]

    def rate(count: int) -> float:
        config = SearchConfig(trials=task.count(12, 4), sampler="random", pruner="none", workers=count, trial=trial)
        folder = task.out / f"workers_{count}_{time.time_ns()}"
        search(space, data, config, folder=folder)
        done = open_study(space, config, folder / "search.db").get_trials(deepcopy=False)
        seconds = (max(t.datetime_complete for t in done) - min(t.datetime_start for t in done)).total_seconds()
        return 60 * len(done) / seconds

    rounds = [(rate(1), rate(2)) for _ in range(3 if task.scale >= 1 else 1)]
    ratios = [two / one for one, two in rounds]
    medians = [statistics.median(rates) for rates in zip(*rounds, strict=True)]
    return {
        "trials_per_minute": dict(zip((1, 2), medians, strict=True)),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "load": load,
    }


PARTS: dict[str, reproduce_parts.Part] = {
    "a1_counts": exact_counts,
    "a7_gradient_flow": gradient_flow_formula,
    "same_seed": same_seed,
    "a3_mnist_random": lambda task: headline(task, task.mnist, "random"),
    "a3_mnist_tpe": lambda task: headline(task, task.mnist, "tpe"),
    "a3_fashion_random": lambda task: headline(task, task.fashion, "random"),
    "a3_fashion_tpe": lambda task: headline(task, task.fashion, "tpe"),
    "pareto": pareto,
    "a4_estimators": lambda task: estimators(task, **PUBLISHED),
    "a4_whole_space": estimators,
    "a5_regret": regret,
    "a2_fashion": lambda task: equal_capacity(task, task.fashion),
    "a2_mnist": lambda task: equal_capacity(task, task.mnist),
    "a2_mnist_tenth": lambda task: equal_capacity(task, task.mnist, min(1.0, 0.1 / task.scale)),
    "a6_fashion": lambda task: depths(task, task.fashion),
    "a6_mnist": lambda task: depths(task, task.mnist),
    "workers": workers,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``sparsenet reproduce density``."""
    reproduce_parts.add_arguments(parser, "reproduce-density", PARTS)
    parser.add_argument("--data-dir", help="folder with mnist/ and fashion-mnist/; default: as sparsenet.data.load")
    parser.add_argument("--workers", type=int, default=2, help="processes of the searches, one thread each")


def run(args: argparse.Namespace) -> int:
    """Runs the parts that are missing, prints the tables, draws the figures; errors: ``parts.reproduce``."""
    task = Reproduction(Path(args.out), args.data_dir, args.workers, args.scale)
    return reproduce_parts.reproduce("density", args, PARTS, task, density_tables.tables, density_tables.figures)
