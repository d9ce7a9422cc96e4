"""The cells of ``sparsenet reproduce gates``: one training each, kept in a file as soon as it is done."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from sparsenet import data as datasets
from sparsenet.architecture.folding import fold_depth
from sparsenet.architecture.gates import close_gates_
from sparsenet.architecture.search.run import load_dataset
from sparsenet.compaction.compacting import compact
from sparsenet.reproduce import density as reproduce_density
from sparsenet.reproduce.gate_training import TrainingRun, TrainingSettings, on_test_set, prepare, train
from sparsenet.reproduce.gated_networks import Learn, keep_variance_, lenet, truncated_svd, widths_of
from sparsenet.reproduce.rows import kept_row

__all__ = ["Reproduction", "baseline", "direct", "finish", "learn"]

FIXED: tuple[Learn, ...] = ((False, False),) * 3
FC: tuple[Learn, ...] = ((False, False), (False, False), (True, False))
ALL: tuple[Learn, ...] = ((True, False), (True, False), (True, False))
ALL_AND_DEPTH: tuple[Learn, ...] = ((True, False), (True, False), (True, True))

CURVES = ("steps", "open", "linear", "intervals")  # of a cell: what a training noted on its way


@dataclass(frozen=True)
class Reproduction(reproduce_density.Reproduction):
    """What the parts share: folders, data, how much to run, and the cells that are done already."""

    def load(self, name: str) -> datasets.Dataset:
        """A data set from its folder in ``data_dir``; MNIST from ``data_dir`` itself where there is none."""
        folder = self.data_dir
        if folder is None or Path(folder, name).is_dir():
            return load_dataset(name, folder, fallback=False)
        return datasets.load(folder) if name == "mnist" else load_dataset(name, None, fallback=False)

    @cached_property
    def fashion_images(self) -> datasets.Dataset:
        """Fashion-MNIST, normalised; few to test on where ``scale`` is small."""
        return self._prepared(self.fashion)

    @cached_property
    def mnist_images(self) -> datasets.Dataset:
        """MNIST, in the same way."""
        return self._prepared(self.mnist)

    def _prepared(self, data: datasets.Dataset) -> datasets.Dataset:
        images, tested = prepare(data), max(1000, round(len(data.test_y) * self.scale))
        return replace(images, test_x=images.test_x[:tested], test_y=images.test_y[:tested])

    def settings(self, images: int, epochs: float, **changes) -> TrainingSettings:
        """A training on so many images, scaled, with a Compactor that looks about twice an epoch."""
        images = max(10 * TrainingSettings.batch, round(images * self.scale))
        every = max(4, images // TrainingSettings.batch // 2)
        return TrainingSettings(images=images, epochs=epochs, **{"compact_every": every, **changes})

    def cell(self, part: str, key: str, compute: Callable[[], dict], curves: bool = False) -> dict:
        """The numbers of one cell, without those over steps unless ``curves``.

        They are taken from ``<out>/cells/<part>.jsonl`` if they are there, else computed and added.
        """

        def timed() -> dict:
            began, cpu = time.perf_counter(), time.process_time()
            numbers = compute()
            wall = time.perf_counter() - began
            print(f"[{time.strftime('%H:%M:%S')}]   {part}: {key}, {wall:.0f} s", flush=True)
            return {**numbers, "cell_wall_seconds": wall, "cell_cpu_seconds": time.process_time() - cpu}

        numbers = kept_row(self.out / "cells" / f"{part}.jsonl", {"key": key, "scale": self.scale}, timed)
        return numbers if curves else {name: n for name, n in numbers.items() if name not in CURVES}


# --- one training ---------------------------------------------------------------------------------------------------


def weights_and_biases(model: nn.Module) -> int:
    """Elements of linear layers and convolutions: gates are gone in use."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return sum(p.numel() for m in layers for p in m.parameters(recurse=False))


@torch.no_grad()
def finish(model: nn.Module, x: torch.Tensor) -> dict:
    """Removes closed units and merges linear layers, in place; the largest change of an output, in both precisions."""
    changes = {}
    for dtype in (torch.float64, torch.float32):
        whole = copy.deepcopy(model).to(dtype).eval()
        small = copy.deepcopy(whole)
        compact(small)
        fold_depth(small)
        expected = whole(x.to(dtype))
        changes[str(dtype).removeprefix("torch.")] = float((small(x.to(dtype)) - expected).abs().max())
    removed = compact(model).removed
    folds = fold_depth(model)
    return {
        "largest_change": changes,
        "largest_output": float(expected.abs().max()),
        "removed_at_end": removed,
        "folded": [[pair.first, pair.second, *pair.elements] for pair in folds.folded],
        "kept_linear": folds.kept,
    }


def figures(run: TrainingRun) -> dict:
    """The numbers of a run that go into a cell."""
    fields = ("accuracy", "test_loss", "loss", "steps", "open", "linear", "seconds", "cpu_seconds")
    return {name: getattr(run, name) for name in fields}


def learn(
    images: datasets.Dataset,
    settings: TrainingSettings,
    learn: Sequence[Learn],
    seed: int,
    widths: Sequence[int] = (20, 50, 500),
    start: dict[str, torch.Tensor] | None = None,
    same_variance: bool = False,
    **options,
) -> dict:
    """Trains a LeNet-like network with gates, makes it as small as it became, and tests it.

    ``start``: weights to begin with. ``same_variance``: whether they come from :func:`keep_variance_`. ``options``: of
    :func:`lenet`.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = lenet(widths, learn, images.num_classes, generator, **options)
    if same_variance:
        keep_variance_(model)
    if start is not None:
        model.load_state_dict({**model.state_dict(), **start})
    run = train(model, images, settings, seed)
    cut = _cut(model, images, settings, seed) if options.get("gates") == "slimming" else {}
    numbers = {**figures(run), "seed": seed, **cut, **finish(model, images.test_x[:1000])}
    accuracy, loss = on_test_set(model, images)
    intervals = [[i.begin, i.end, list(i.units.values()), i.bytes, i.seconds_per_step] for i in run.intervals]
    shape = {"widths": widths_of(model)[:-1], "parameters": weights_and_biases(model)}
    return {**numbers, **shape, "accuracy": accuracy, "test_loss": loss, "intervals": intervals}


def _cut(model: nn.Module, images: datasets.Dataset, settings: TrainingSettings, seed: int) -> dict:
    """Slimming: its factors get small, not zero. The small ones are closed, and an epoch makes up for it."""
    close_gates_(model, below=0.05)
    compact(model)
    tuned = train(
        model, images, TrainingSettings(images=settings.images, epochs=1, lr=0.01, lambda_1=0.0, lambda_3=0.0), seed
    )
    return {"tuning_seconds": tuned.cpu_seconds}


def direct(images: datasets.Dataset, settings: TrainingSettings, widths: Sequence[int], seed: int, **options) -> dict:
    """Trains the network of these widths from the start, without gates."""
    torch.manual_seed(seed)
    model = lenet(widths, ((False, False),) * len(widths), images.num_classes, **options)
    run = train(model, images, settings, seed)
    return {**figures(run), "seed": seed, "widths": list(widths), "parameters": weights_and_biases(model)}


def baseline(images: datasets.Dataset, settings: TrainingSettings, seed: int, ranks: Sequence[int], keep: Path) -> dict:
    """The full network; its 800 x 500 layer replaced by truncated SVDs, as they are and tuned for an epoch more.

    The weights go to ``keep``: a pre-trained start.
    """
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    model = lenet(learn=FIXED, classes=images.num_classes)
    run = train(model, images, settings, seed)
    keep.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: t.contiguous() for name, t in model.state_dict().items() if "gate" not in name}
    save_file(weights, str(keep))
    svd = []
    for rank in ranks:
        small = copy.deepcopy(model)
        small[7] = truncated_svd(small[7], rank)
        cut, _ = on_test_set(small, images)
        tuned = train(small, images, TrainingSettings(images=settings.images, epochs=1, lr=0.01), seed).accuracy
        svd.append({"rank": rank, "parameters": weights_and_biases(small), "accuracy": cut, "tuned": tuned})
    return {**figures(run), "seed": seed, "parameters": weights_and_biases(model), "svd": svd}
