"""``sparsenet search``: the user gives a maximum depth, width and number of active weights; the densities are found.

    sparsenet search --max-depth 8 --max-width 1024 --max-active 60000 --trials 100 --sampler tpe

``--method embedding`` finds a small network for a regression table instead; see :mod:`sparsenet.commands.embedding`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from sparsenet.architecture.search.pruners import PRUNERS
from sparsenet.architecture.search.report import SearchReport
from sparsenet.architecture.search.run import load_dataset, retrain, save_network, search, torch_threads, write_report
from sparsenet.architecture.search.samplers import SAMPLERS
from sparsenet.architecture.search.space import ACTIVATIONS, DensityMLP, SearchSpace
from sparsenet.architecture.search.trials import TrialConfig, TrialData, TrialResult
from sparsenet.architecture.search.workers import SearchConfig
from sparsenet.commands import embedding

__all__ = ["add_arguments", "print_summary", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``sparsenet search``."""
    add = parser.add_argument
    add("--method", choices=("density", "embedding"), default="density", help="search densities, or in the embedding")
    add("--data", default="fashion-mnist", help="data set name, file or folder")
    add("--data-dir", help="folder with the data set's files, or with a folder of its name")
    add("--max-depth", type=int, default=3, help="most hidden layers (3)")
    add("--max-width", type=int, default=512, help="neurons of a hidden layer (512)")
    add("--max-active", type=int, help="most active weights (no limit)")
    add("--min-density", type=float, default=0.01, help="of a layer that exists (0.01)")
    add("--max-density", type=float, default=1.0, help="of a layer (1)")
    names = ",".join(ACTIVATIONS)
    add("--activations", default=names, help=f"to choose from ({names})")
    add("--linear", action=argparse.BooleanOptionalAction, default=True, help="hidden layers may have no activation")
    add("--trials", type=int, default=30, help="finished or stopped early (30)")
    add("--sampler", choices=SAMPLERS, default="tpe", help="how trials are proposed (tpe)")
    add("--pruner", choices=PRUNERS, default=None, help="default halving; none with --pareto")
    add("--pareto", action="store_true", help="minimise loss and active weights together")
    add("--epochs", type=int, default=TrialConfig.epochs, help=f"of a whole trial ({TrialConfig.epochs})")
    add("--train-fraction", type=float, default=1.0, help="share of the training examples a trial uses")
    add("--block-size", type=int, default=TrialConfig.block_size, help="of the layers; 1 scatters single weights (16)")
    add("--workers", type=int, default=1, help="processes")
    add("--threads", type=int, default=1, help="threads of each process")
    add("--inherit", action="store_true", help="start trials from the weights of similar finished ones")
    add("--seed", type=int, default=0, help="of the sampler (0)")
    add("--final-seeds", type=int, default=3, help="retrainings of the winner on all the training data; 0 for none")
    add("--out", default="search-results", help="folder of the study, the report and the plots")
    embedding.add_arguments(parser.add_argument_group("embedding"))


def run(args: argparse.Namespace) -> int:
    """``sparsenet search``: searches, retrains the winner, writes ``report.json`` and plots, prints a summary."""
    if args.method == "embedding":
        return embedding.run(args)
    dataset = load_dataset(args.data, args.data_dir)
    data = TrialData.from_dataset(dataset)
    space = SearchSpace(
        data.features,
        data.num_classes,
        max_depth=args.max_depth,
        max_width=args.max_width,
        min_density=args.min_density,
        max_density=args.max_density,
        max_active=args.max_active,
        allow_linear=args.linear,
        activations=tuple(args.activations.split(",")),
    )
    config = SearchConfig(
        trials=args.trials,
        sampler=args.sampler,
        pruner=args.pruner or ("none" if args.pareto else "halving"),
        multi_objective=args.pareto,
        workers=args.workers,
        threads=args.threads,
        inherit=args.inherit,
        seed=args.seed,
        trial=TrialConfig(epochs=args.epochs, train_fraction=args.train_fraction, block_size=args.block_size),
    )
    report = search(space, data, config, folder=args.out, progress=True)
    finals = []
    if args.final_seeds:
        models: list[DensityMLP] = []
        seeds = tuple(range(args.final_seeds))
        with torch_threads(args.threads):
            finals = retrain(report.architecture(report.best()), dataset, config.trial, seeds, models, progress=True)
        save_network(Path(args.out, "network.safetensors"), models[0], config.trial)  # choosing would need a third set
    write_report(report, finals, Path(args.out))
    print_summary(report, finals, print)
    return 0


def print_summary(report: SearchReport, finals: list[TrialResult], write: Callable[[str], None]) -> None:
    """The winner, the Pareto front and the final test results."""
    best, states = report.best(), [t.state for t in report.trials]
    counts = ", ".join(f"{states.count(s)} {s}" for s in ("finished", "pruned", "failed", "lost") if s in states)
    again = f", {report.requeued} queued again" if report.requeued else ""
    write(f"{len(states)} trials ({counts}{again}) in {report.seconds:.0f} s")
    write(f"best: trial {best.number}, {best.active_weights} active weights, {best.depth} hidden layers")
    write(f"validation loss {best.loss:.4f}, accuracy {100 * best.accuracy:.2f} %")
    architecture = report.architecture(best)
    live = [*best.live_widths, architecture.out_features]
    write("  layer  out x in      density  active weights  activation  live neurons")
    rows = zip(architecture.layers, architecture.active_per_layer, live, strict=True)
    for i, (((out, inp), density, activation), active, alive) in enumerate(rows, start=1):
        write(f"  {i:5d}  {f'{out} x {inp}':11s}  {density:7.4f}  {active:14d}  {activation:10s}  {alive:12d}")
    write("Pareto front (active weights: accuracy):")
    write("  " + "  ".join(f"{t.active_weights}: {100 * t.accuracy:.2f} %" for t in report.pareto()))
    if finals:
        write("retrained on all training data, judged on the test set:")
    for seed, final in enumerate(finals):
        write(f"  seed {seed}: accuracy {100 * final.accuracy:.2f} %, loss {final.loss:.4f}")
    if report.folder is not None:
        network = ", network.safetensors (seed 0)" if finals else ""
        write(f"in {report.folder}: report.json, plots{network}")
