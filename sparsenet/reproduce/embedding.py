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
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from sparsenet.architecture.embedding.autoencoder import (
    AutoencoderConfig,
    NetworkAutoencoder,
    evaluate_autoencoder,
    load_autoencoder,
    sample_teachers,
    save_autoencoder,
    train_autoencoder,
)
from sparsenet.architecture.embedding.codec import MIXED, NetworkBatch, NetworkSpace, from_matrix, to_matrix
from sparsenet.architecture.embedding.search import (
    Candidate,
    EmbeddingSearchConfig,
    RegressionData,
    SearchOutcome,
    descend,
    judged,
    search_embedding,
)
from sparsenet.architecture.embedding.teachers import FIXTURE_WEIGHTS, fixture_network, grid_points, random_networks
from sparsenet.architecture.search.estimators import spearman
from sparsenet.reproduce import embedding_tables
from sparsenet.reproduce import parts as reproduce_parts
from sparsenet.reproduce.embedding_baselines import dense_then_prune
from sparsenet.reproduce.regression_functions import FUNCTIONS, sample_function

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


def _trained(task: Reproduction, config: AutoencoderConfig, name: str) -> tuple[NetworkAutoencoder, dict]:
    """Trains, saves, evaluates (C2, C3)."""
    started, curve = time.perf_counter(), []
    every = max(1, config.steps // 20)
    model = train_autoencoder(config, lambda step, loss, seconds: curve.append((step, loss, seconds)), every)
    seconds = time.perf_counter() - started
    save_autoencoder(task.out / f"autoencoder_{name}.safetensors", model)
    return model, {**evaluate_autoencoder(model), "train_seconds": seconds, "steps": config.steps, "curve": curve}


def autoencoder(task: Reproduction, activation: str) -> dict:
    """C2, C3: the probe autoencoder of one activation."""
    steps = task.steps(STEPS[activation])
    isometry = 0.3 if activation == "sigmoid" else 0.0  # the others order their codes by function without it (C7)
    config = AutoencoderConfig(NetworkSpace(activation=activation), steps=steps, isometry=isometry)
    model, numbers = _trained(task, config, activation)
    return {**numbers, "slices": match_slices(model)}


def points_on_line(inputs: int, count: int = 81) -> torch.Tensor:
    """[count, inputs]: points (t, .5, -.5, ...) for t from -1 to 1; through 0 a network without biases has one kink."""
    x = torch.tensor([0.5, -0.5]).repeat(inputs)[:inputs].repeat(count, 1)
    x[:, 0] = torch.linspace(-1, 1, count)
    return x


@torch.no_grad()
def match_slices(model: NetworkAutoencoder) -> list[dict]:
    """For two fresh networks of each depth: their outputs along a line, and those of the best decoded network."""
    x, line = grid_points(model.space.inputs), points_on_line(model.space.inputs)
    groups, y = sample_teachers(model.space, 2 * model.space.max_depth, x, torch.Generator().manual_seed(777))
    z = torch.cat([model.encode(nets) for nets in groups])
    winners = (model.errors(z, x, y).argmin(1) + 1).tolist()
    teachers = [nets.select([i]) for nets in groups for i in range(len(nets))]
    return [
        {
            "depth": teacher.depth,
            "decoder": winner,
            "input": teacher.outputs(line)[0].tolist(),
            "decoded": model.decode(code[None], winner).outputs(line)[0].tolist(),
        }
        for teacher, winner, code in zip(teachers, winners, z, strict=True)
    ]


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


def _summary(outcome: SearchOutcome) -> dict:
    """Test figures [weights, depth, FVU, MPE] of the networks that validation chooses."""

    def row(c: Candidate) -> list:
        return [c.nonzeros, c.depth, c.test_fvu, c.test_mpe]

    small = {count: outcome.within(count) for count in WEIGHT_LEVELS}
    return {
        "best": row(outcome.best()),
        "within": {count: found and row(found) for count, found in small.items()},
        "per_depth": {
            d: [row(c) for c in SearchOutcome([c for c in outcome.candidates if c.depth == d]).front()]
            for d in sorted({c.depth for c in outcome.candidates})
        },
        "front": [row(c) for c in outcome.front()],
    }


def _timed(run_search: Callable[[], SearchOutcome]) -> tuple[SearchOutcome, dict]:
    started = time.perf_counter()
    outcome = run_search()
    return outcome, {**_summary(outcome), "seconds": time.perf_counter() - started}


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
    twice = replace(config, restarts=2 * config.restarts)
    outcome, embedding = _timed(lambda: search_embedding(model, data, config))
    numbers = {
        "variance_over_mean_square": float(data.train_y.var()),
        "embedding": embedding,
        "embedding, not pruned": _summary(SearchOutcome([c for c in outcome.candidates if c.stage == "search"])),
    }
    dense, numbers["dense, pruned"] = _timed(lambda: dense_then_prune(model.space, data, config))
    _, numbers["random restarts"] = _timed(lambda: dense_then_prune(model.space, data, twice, prune=False))
    line = points_on_line(model.space.inputs)
    shown = {"sparse": outcome.within(max(14, config.prune_to)), "dense": dense.best()}
    numbers["slices"] = {
        "target": (teacher.outputs(line)[0] / data.scale).tolist(),
        **{name: c.nets.outputs(line)[0].tolist() for name, c in shown.items()},
        "weights": {name: c.nonzeros for name, c in shown.items()},
    }
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
    """Encoders and decoders on leaky ReLU networks: error, seconds, what re-permuting neurons does to the code.

    The convolutions cost ten times the others' time per step, so that they get fewer.
    """
    rows = {}
    for encoder, decoder, steps in (
        ("probe", "mlp", 1500),
        ("graph", "mlp", 1500),
        ("transformer", "mlp", 1500),
        ("transformer", "transformer", 1500),
        ("conv", "mlp", 600),
        ("conv", "conv", 300),
    ):
        hidden = {"transformer": 128, "graph": 64}.get(encoder, 512)
        config = AutoencoderConfig(
            encoder=encoder, decoder=decoder, steps=task.steps(steps), latent=224, hidden=hidden, batch=32
        )
        model, numbers = _trained(task, config, f"{encoder}_{decoder}")
        numbers.pop("curve")
        rows[f"{encoder} / {decoder}"] = {**numbers, **geometry(task, model=model)}
    return {"rows": rows}


def modern(task: Reproduction) -> dict:
    """SWAT-NN's mode (METHODS 3.7): 2 inputs, biases, an activation per neuron; twelve two-dimensional functions."""
    space = NetworkSpace(inputs=2, activation=MIXED, bias=True)
    search_config = EmbeddingSearchConfig(
        depths=(2, 3),
        iterations=task.steps(600),
        restarts=2,
        sparsity_weights=(1.0,),
        prune_to=12,
        tune_iterations=task.steps(200),
    )

    def on_every_function(run_search: Callable[[RegressionData], SearchOutcome]) -> dict:
        tables = {name: RegressionData.from_arrays(*sample_function(name, 5000), centre=True) for name in FUNCTIONS}
        return {name: _timed(partial(run_search, data))[1] for name, data in tables.items()}

    rows: dict = {}
    for encoder, decoder, hidden, steps in (("probe", "mlp", 512, 1500), ("transformer", "transformer", 64, 2500)):
        config = AutoencoderConfig(
            space, encoder, decoder, latent=224, hidden=hidden, steps=task.steps(steps), batch=32
        )
        model, numbers = _trained(task, config, f"modern_{encoder}")
        numbers.pop("curve")
        rows[encoder] = {
            **numbers,
            "functions": on_every_function(partial(search_embedding, model, config=search_config)),
        }
    dense = partial(dense_then_prune, space, config=search_config, depths=(2, 3))
    rows["dense, pruned"] = {"functions": on_every_function(dense)}
    return {"rows": rows}


PARTS: dict[str, reproduce_parts.Part] = {
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
    reproduce_parts.add_arguments(parser, "reproduce-embedding", PARTS)


def run(args: argparse.Namespace) -> int:
    """Runs the parts that are missing, prints the tables, draws the figures; errors: ``parts.reproduce``."""
    task = Reproduction(Path(args.out), args.scale)
    return reproduce_parts.reproduce("embedding", args, PARTS, task, embedding_tables.tables, embedding_tables.figures)
