"""``sparsenet search --method embedding``: find a small network for a regression table in the embedding.

The autoencoder for the table's number of inputs is trained once (a few minutes, stated below) and kept in the output
folder; the search then gives a Pareto front of weights against error and the chosen network as an ordinary module.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsenet.architecture.embedding.autoencoder import (
    AutoencoderConfig,
    NetworkAutoencoder,
    load_autoencoder,
    save_autoencoder,
    train_autoencoder,
)
from sparsenet.architecture.embedding.codec import ACTIVATIONS, MIXED, NetworkSpace
from sparsenet.architecture.embedding.network_file import load_network, save_network
from sparsenet.architecture.embedding.search import EmbeddingSearchConfig, RegressionData, search_embedding

__all__ = ["add_arguments", "load_network", "read_table", "run", "save_network"]

DEFAULT_STEPS = 3000  # about two minutes on one core


def add_arguments(parser) -> None:
    """The options that only ``--method embedding`` reads."""
    add = parser.add_argument
    add("--activation", choices=(*ACTIVATIONS, MIXED), default="leaky_relu", help="of the embedded networks")
    add("--biases", action="store_true", help="the networks have biases; targets are centred")
    add("--checkpoint", help="autoencoder to use; else one in --out, else it is trained and kept there")
    add("--train-steps", type=int, default=DEFAULT_STEPS, help="of the autoencoder, if it has to be trained")
    add("--restarts", type=int, default=2, help="starting points per depth and sparsity weight")
    add(
        "--max-fvu",
        type=float,
        default=0.01,
        help="the fewest weights within this fraction of variance unexplained win",
    )


def read_table(path: str | Path) -> tuple[Tensor, Tensor]:
    """A regression table: ``.npz`` with x [n, inputs] and y [n], or ``.csv`` whose last column is y.

    Raises FileNotFoundError, or ValueError for another kind of file, missing arrays or cells that are not numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_table: path must be an existing .npz or .csv file, got {str(path)!r}")
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            if not {"x", "y"} <= set(file.files):
                raise ValueError(f"read_table: {path} must hold x and y, got {', '.join(file.files) or 'nothing'}")
            return torch.from_numpy(file["x"]).float(), torch.from_numpy(file["y"]).float()
    if path.suffix != ".csv":
        raise ValueError(f"read_table: path must end in .npz or .csv, got {str(path)!r}")
    table = np.genfromtxt(path, delimiter=",", dtype=float)
    if table.ndim == 2 and np.isnan(table[0]).all():
        table = table[1:]  # a header
    if table.ndim != 2 or table.shape[1] < 2:
        raise ValueError(f"read_table: {path} must be rows of two or more numbers each, got {list(table.shape)}")
    if np.isnan(table).any():
        row, column = np.argwhere(np.isnan(table))[0]
        raise ValueError(f"read_table: {path} must hold numbers only, got none in row {row + 1}, column {column + 1}")
    return torch.from_numpy(table[:, :-1]).float(), torch.from_numpy(table[:, -1]).float()


def autoencoder_for(args: argparse.Namespace, inputs: int) -> NetworkAutoencoder:
    """The checkpoint named, the one kept in the folder, or a freshly trained one."""
    kept = Path(args.out, f"autoencoder_{args.activation}_{inputs}{'_biases' if args.biases else ''}.safetensors")
    path = Path(args.checkpoint) if args.checkpoint else kept
    if path.is_file():
        return load_autoencoder(path)
    if args.checkpoint:
        raise FileNotFoundError(f"search: checkpoint must be an existing file, got {args.checkpoint!r}")
    space = NetworkSpace(inputs=inputs, width=max(7, inputs), activation=args.activation, bias=args.biases)
    print(f"training the autoencoder once: {args.train_steps} steps, about {args.train_steps * 0.04 / 60:.1f} minutes")
    config = AutoencoderConfig(space=space, steps=args.train_steps, seed=args.seed)
    model = train_autoencoder(
        config,
        lambda step, loss, seconds: print(f"  step {step}: error {loss:.4f}, {seconds:.0f} s"),
        args.train_steps // 5,
    )
    save_autoencoder(kept, model)
    return model


def run(args: argparse.Namespace) -> int:
    """Searches, prints the Pareto front, saves the chosen network (``network.safetensors``) and ``front.json``."""
    x, y = read_table(args.data)
    data = RegressionData.from_arrays(x, y, seed=args.seed, centre=args.biases, scale_inputs=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        model = autoencoder_for(args, x.shape[1])
        started = time.perf_counter()
        print(f"searching with {model.space.max_depth} decoders, {args.restarts} restarts each: about a minute")
        outcome = search_embedding(model, data, EmbeddingSearchConfig(restarts=args.restarts, seed=args.seed))
    finally:
        torch.set_num_threads(threads)
    front, best = outcome.front(), outcome.best()
    print(f"searched in {time.perf_counter() - started:.0f} s; Pareto front by validation error:")
    print("  weights  depth      FVU   median |error| / |y|   (test)")
    for c in front:
        print(f"  {c.nonzeros:7d}  {c.depth:5d}  {c.test_fvu:7.4f}   {100 * c.test_mpe:6.2f} %")
    chosen = outcome.sparsest(args.max_fvu)
    if chosen is None:
        print(f"no network has a validation FVU of at most {args.max_fvu:g} (--max-fvu): the one of the least error")
        chosen = best
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    module = chosen.module(data)
    file = folder / "network.safetensors"
    save_network(file, module, model.space)
    rows = [[c.nonzeros, c.depth, c.valid_fvu, c.test_fvu, c.test_mpe] for c in front]
    (folder / "front.json").write_text(
        json.dumps({"columns": "weights depth valid_fvu test_fvu test_mpe", "rows": rows})
    )
    print(f"chosen: {chosen.nonzeros} weights, depth {chosen.depth}, test FVU {chosen.test_fvu:.4f}")
    print(f"load it with sparsenet.commands.embedding.load_network({str(file)!r})")
    print(module)
    return 0
