"""``sparsenet reproduce embedding``: the experiments of arXiv 2410.08339 and the acceptance checks C1 to C7.

The paper's table values are not known to us, so the tables put our numbers beside the checks' thresholds and the
figures measured for METHODS.md. FVU (the fraction of variance unexplained) stands beside every percentage error,
because bias-free sigmoid networks are often nearly constant and a percentage error flatters a constant.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch

from sparsenet.architecture.embedding import (
    AutoencoderConfig,
    NetworkAutoencoder,
    evaluate_autoencoder,
    load_autoencoder,
    sample_teachers,
    save_autoencoder,
    train_autoencoder,
)
from sparsenet.architecture.embedding_search import (
    EmbeddingSearchConfig,
    RegressionData,
    SearchOutcome,
    dense_then_prune,
    descend,
    judged,
    search_embedding,
)
from sparsenet.architecture.estimators import spearman
from sparsenet.architecture.network_codec import MIXED, NetworkBatch, NetworkSpace, from_matrix, to_matrix
from sparsenet.architecture.regression_functions import FUNCTIONS, sample_function
from sparsenet.architecture.reproduce_density import read_parts, run_parts
from sparsenet.architecture.teachers import FIXTURE_WEIGHTS, fixture_network, grid_points, random_networks

__all__ = ["PARTS", "add_arguments", "run"]

STEPS = {"leaky_relu": 3000, "sigmoid": 2000, "linear": 1500}
WEIGHT_LEVELS = (4, 8, 10, 14, 20, 28, 35, 50, 70)  # rows of the tables: best error within so many weights


@dataclass(frozen=True)
class Reproduction:
    """What the parts share; ``scale`` < 1 shortens trainings and searches for a quick look."""

    out: Path
    scale: float = 1.0

    def steps(self, full: int) -> int:
        """``full`` iterations, scaled."""
        return max(3, round(full * self.scale))

    def autoencoder(self, activation: str) -> NetworkAutoencoder:
        """The trained autoencoder of one activation; trained by its part."""
        return load_autoencoder(self.out / f"autoencoder_{activation}.safetensors")


def _trained(task: Reproduction, config: AutoencoderConfig, name: str) -> dict:
    """Trains, saves, evaluates (C2, C3)."""
    started, curve = time.perf_counter(), []
    every = max(1, config.steps // 20)
    model = train_autoencoder(config, lambda step, loss, seconds: curve.append((step, loss, seconds)), every)
    seconds = time.perf_counter() - started
    save_autoencoder(task.out / f"autoencoder_{name}.safetensors", model)
    return {**evaluate_autoencoder(model), "train_seconds": seconds, "steps": config.steps, "curve": curve}


def autoencoder(task: Reproduction, activation: str) -> dict:
    """C2, C3: the probe autoencoder of one activation."""
    steps = task.steps(STEPS[activation])
    isometry = 0.3 if activation == "sigmoid" else 0.0  # the others order their codes by function without it (C7)
    config = AutoencoderConfig(NetworkSpace(activation=activation), steps=steps, isometry=isometry)
    return _trained(task, config, activation)


@torch.no_grad()
def fixture(task: Reproduction) -> dict:
    """C1: the fixture's forward pass against its formula written out in float64; pack and unpack lose nothing."""
    nets, x = fixture_network(), torch.rand(1000, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sizes = [3, 5, 5, 1]
    dense = [torch.zeros(b, a, dtype=torch.float64) for a, b in pairwise(sizes)]
    for layer, start, end, weight in FIXTURE_WEIGHTS:
        dense[layer][0 if layer == 2 else end, start] = weight
    h = (x.double() @ dense[0].t()).sigmoid()
    expected = ((h @ dense[1].t()).sigmoid() @ dense[2].t())[:, 0]
    got = nets.outputs(x)[0].double()
    again = from_matrix(nets.space, to_matrix(nets))
    lossless = all(torch.equal(a, b) for a, b in zip(nets.weights, again.weights, strict=True))
    for depth in range(1, 5):
        others = random_networks(nets.space, depth, 50, torch.Generator().manual_seed(depth))
        back = from_matrix(nets.space, to_matrix(others))
        pairs = zip((*others.effective().weights, others.neurons), (*back.weights, back.neurons), strict=True)
        lossless = lossless and all(torch.equal(a, b) for a, b in pairs)
    return {
        "largest_error": float((got - expected).abs().max()),
        "lossless": lossless,
        "mean": float(got.mean()),
        "std": float(got.std()),
        "nonzeros": int(nets.nonzeros()[0]),
        "module_error": float((nets.to_module(0)(x)[:, 0] - nets.outputs(x)[0]).abs().max()),
    }


@torch.no_grad()
def geometry(task: Reproduction, activation: str = "leaky_relu", model: NetworkAutoencoder | None = None) -> dict:
    """C7: distance of functions against distance of codes; re-permuted neurons map to the same code."""
    model = model or task.autoencoder(activation)
    generator, x = torch.Generator().manual_seed(99), grid_points(model.space.inputs)
    groups, y = sample_teachers(model.space, 256, x, generator)
    z = torch.cat([model.encode(nets) for nets in groups])
    first, second = torch.triu_indices(len(z), len(z), 1)
    chosen = torch.randperm(len(first), generator=generator)[:5000]
    first, second = first[chosen], second[chosen]
    functions = (y[first] - y[second]).square().mean(1).sqrt()
    codes = (z[first] - z[second]).norm(dim=1)
    again = torch.cat([model.encode(nets.permuted(generator)) for nets in groups])
    return {
        "spearman": spearman(functions.tolist(), codes.tolist()),
        "permutation_distance": float((again - z).abs().max()),
        "code_spread": float(z.std(0).mean()),
    }


def teacher_data(teacher: NetworkBatch, seed: int) -> RegressionData:
    """10,000 samples of a network, x ~ U(-1, 1)."""
    x = torch.rand(10000, teacher.space.inputs, generator=torch.Generator().manual_seed(1000 + seed)) * 2 - 1
    return RegressionData.from_arrays(x, teacher.outputs(x)[0], seed=seed)


def _summary(outcome: SearchOutcome, seconds: float) -> dict:
    best = outcome.best()
    levels = {}
    for count in WEIGHT_LEVELS:
        found = outcome.within(count)
        levels[count] = None if found is None else [found.nonzeros, found.depth, found.test_fvu, found.test_mpe]
    return {
        "best": [best.nonzeros, best.depth, best.test_fvu, best.test_mpe],
        "within": levels,
        "per_depth": {
            d: [[c.nonzeros, c.test_fvu, c.test_mpe] for c in SearchOutcome(own).front()]
            for d in sorted({c.depth for c in outcome.candidates})
            if (own := [c for c in outcome.candidates if c.depth == d])
        },
        "front": [[c.nonzeros, c.depth, c.test_fvu, c.test_mpe, c.stage] for c in outcome.front()],
        "seconds": seconds,
    }


def recover(task: Reproduction, activation: str, depth: int, nonzeros: int, seed: int) -> dict:
    """C4, C5: find networks for the data of one teacher, in the embedding and by the baselines at equal iterations."""
    model, tuning = task.autoencoder(activation), {"tune_iterations": task.steps(300)}
    if nonzeros == len(FIXTURE_WEIGHTS):
        teacher = fixture_network()
        config = EmbeddingSearchConfig(
            iterations=task.steps(3000), restarts=3, sparsity_weights=(1.0,), seed=seed, **tuning
        )
    else:
        generator = torch.Generator().manual_seed(seed)
        teacher = random_networks(model.space, depth, 1, generator, width=5, nonzeros=nonzeros)
        config = EmbeddingSearchConfig(
            iterations=task.steps(1500), restarts=2, sparsity_weights=(1.0, 4.0), seed=seed, **tuning
        )
    data = teacher_data(teacher, seed)
    numbers: dict = {"variance_over_mean_square": float(data.train_y.var())}
    searches: dict[str, Callable[[], SearchOutcome]] = {
        "embedding": lambda: search_embedding(model, data, config),
        "dense, pruned": lambda: dense_then_prune(model.space, data, config),
        "random restarts": lambda: dense_then_prune(
            model.space, data, replace(config, restarts=2 * config.restarts), prune=False
        ),
    }
    for name, run_search in searches.items():
        started = time.perf_counter()
        numbers[name] = _summary(run_search(), time.perf_counter() - started)
        numbers[name]["seconds"] = time.perf_counter() - started
    return numbers


def sparsity_weights(task: Reproduction) -> dict:
    """C6, figure 4: decoder 3 under three sparsity weights, before any pruning; medians over 6 starts, two teachers."""
    model, rows = task.autoencoder("leaky_relu"), []
    weights = (1.0, 10.0, 100.0)
    for seed in (0, 1):
        teacher = random_networks(model.space, 2, 1, torch.Generator().manual_seed(seed), width=5, nonzeros=14)
        data = teacher_data(teacher, seed)
        config = EmbeddingSearchConfig(iterations=task.steps(1500), seed=seed)
        repeated = torch.tensor(weights).repeat_interleave(6)
        found = judged(descend(model, data, 3, repeated, config), data, repeated, "search")
        for weight in weights:
            own = [c for c in found if c.sparsity_weight == weight]
            counts, errors = (sorted(v) for v in ([c.nonzeros for c in own], [c.test_fvu for c in own]))
            middle = [(v[(len(v) - 1) // 2] + v[len(v) // 2]) / 2 for v in (counts, errors)]
            best = min(own, key=lambda c: c.valid_fvu)
            rows.append([seed, weight, *middle, best.nonzeros, best.test_fvu, best.test_mpe])
    return {"columns": "teacher weight median_nnz median_fvu best_nnz best_fvu best_mpe", "rows": rows}


def encoders(task: Reproduction) -> dict:
    """The other encoders and decoders at equal steps, leaky ReLU: error, seconds, what re-permuting neurons does."""
    rows = {}
    for encoder, decoder in (
        ("probe", "mlp"),
        ("graph", "mlp"),
        ("conv", "mlp"),
        ("conv", "conv"),
        ("transformer", "transformer"),
    ):
        config = AutoencoderConfig(
            encoder=encoder,
            decoder=decoder,
            steps=task.steps(400),
            latent=224 if encoder == "transformer" else 128,
            hidden=128 if encoder == "transformer" else 64 if encoder == "graph" else 512,
            batch=32,
        )
        numbers = _trained(task, config, f"{encoder}_{decoder}")
        model = load_autoencoder(task.out / f"autoencoder_{encoder}_{decoder}.safetensors")
        numbers.pop("curve")
        rows[f"{encoder} / {decoder}"] = {**numbers, **geometry(task, model=model)}
    return {"rows": rows}


def modern(task: Reproduction) -> dict:
    """SWAT-NN's mode (METHODS 3.7): 2 inputs, biases, an activation per neuron; eight two-dimensional functions."""
    space = NetworkSpace(inputs=2, activation=MIXED, bias=True)
    rows: dict = {}
    for encoder, decoder, latent, hidden, steps in (
        ("probe", "mlp", 224, 512, 1500),
        ("transformer", "transformer", 224, 64, 600),
    ):
        config = AutoencoderConfig(
            space, encoder, decoder, latent=latent, hidden=hidden, steps=task.steps(steps), batch=32
        )
        name = f"modern_{encoder}"
        rows[name] = _trained(task, config, name)
        rows[name].pop("curve")
        model = load_autoencoder(task.out / f"autoencoder_{name}.safetensors")
        rows[name]["functions"] = {function: _function_row(task, model, function) for function in FUNCTIONS}
    for function in FUNCTIONS:
        data = RegressionData.from_arrays(*sample_function(function, 5000), centre=True)
        outcome = dense_then_prune(space, data, _modern_search(task), depths=(2, 3))
        rows.setdefault("dense, pruned", {})[function] = _summary(outcome, 0.0)
    return {"rows": rows}


def _modern_search(task: Reproduction) -> EmbeddingSearchConfig:
    return EmbeddingSearchConfig(
        depths=(2, 3),
        iterations=task.steps(600),
        restarts=2,
        sparsity_weights=(1.0,),
        prune_to=12,
        tune_iterations=task.steps(200),
    )


def _function_row(task: Reproduction, model: NetworkAutoencoder, function: str) -> dict:
    x, y = sample_function(function, 5000)
    data = RegressionData.from_arrays(x, y, centre=True)
    started = time.perf_counter()
    outcome = search_embedding(model, data, _modern_search(task))
    return _summary(outcome, time.perf_counter() - started)


PARTS: dict[str, Callable[[Reproduction], dict]] = {
    "c1_fixture": fixture,
    "c2_leaky_relu": lambda task: autoencoder(task, "leaky_relu"),
    "c2_sigmoid": lambda task: autoencoder(task, "sigmoid"),
    "c2_linear": lambda task: autoencoder(task, "linear"),
    "c7_leaky_relu": geometry,
    "c7_sigmoid": lambda task: geometry(task, "sigmoid"),
    "c4_leaky_relu_14_seed0": lambda task: recover(task, "leaky_relu", 2, 14, 0),
    "c4_leaky_relu_14_seed1": lambda task: recover(task, "leaky_relu", 2, 14, 1),
    "c5_leaky_relu_35": lambda task: recover(task, "leaky_relu", 3, 35, 0),
    "c5_linear_35": lambda task: recover(task, "linear", 3, 35, 0),
    "c5_sigmoid_fixture": lambda task: recover(task, "sigmoid", 2, 13, 0),
    "c5_sigmoid_35": lambda task: recover(task, "sigmoid", 3, 35, 0),
    "c5_sigmoid_14": lambda task: recover(task, "sigmoid", 2, 14, 0),
    "c5_linear_14": lambda task: recover(task, "linear", 2, 14, 0),
    "c6_sparsity_weights": sparsity_weights,
    "encoders": encoders,
    "modern": modern,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``sparsenet reproduce embedding``."""
    parser.add_argument("--out", default="reproduce-embedding", help="folder of checkpoints, numbers, tables, figures")
    parser.add_argument("--parts", default="all", help=f"comma-separated, of {', '.join(PARTS)}")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="below 1: shorter trainings and searches; a quick look"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the parts that are missing, prints the tables, draws the figures.

    Raises ValueError for an unknown part or a scale outside (0, 1].
    """
    names = list(PARTS) if args.parts == "all" else args.parts.split(",")
    unknown = [n for n in names if n not in PARTS]
    if unknown:
        raise ValueError(f"reproduce embedding: parts must be some of {', '.join(PARTS)}, got {', '.join(unknown)}")
    if not 0 < args.scale <= 1:
        raise ValueError(f"reproduce embedding: scale must lie in (0, 1], got {args.scale}")
    task = Reproduction(Path(args.out), args.scale)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run_parts(names, PARTS, task, task.out)
    finally:
        torch.set_num_threads(threads)
    from sparsenet.architecture import embedding_tables

    numbers = read_parts(task.out, PARTS)
    print(embedding_tables.tables(numbers))
    embedding_tables.figures(numbers, task.out)
    return 0
