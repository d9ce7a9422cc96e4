"""Benches of fixed size, each with its goal: the whole training step, a rewire, per-call overhead, and threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sparsenet.benchmark import linear
from sparsenet.benchmark.cases import Case
from sparsenet.benchmark.goals import GOALS
from sparsenet.benchmark.networks import NETWORKS, OPTIMIZERS, training_step
from sparsenet.benchmark.rivals import set_sparselab_threads
from sparsenet.benchmark.timing import Contender, Quartiles, Timings
from sparsenet.benchmark.trial import OURS, Trial, Unavailable
from sparsenet.layers import SparseLinear
from sparsenet.policies.policy import LayerView
from sparsenet.policies.rewiring import SET, RigL
from sparsenet.sparsifier import Sparsifier

__all__ = [
    "loader_trial", "overhead_trial", "rewire_trial", "threads_trial", "training_trial", "trials",
]  # fmt: skip

REWIRE_EVERY = 100
_MLP, _BATCH = (784, 4096, 4096, 4096, 10), 256


def trials(op: str) -> Iterator[Trial]:
    """The trials of ``training_step``, ``update``, ``overhead`` or ``threads`` at the sizes that have goals."""
    if op == "training_step":
        for optimizer in OPTIMIZERS:
            for density in (0.1, 0.05):
                yield training_trial(optimizer, density)
    elif op == "update":
        yield rewire_trial(Case((8192, 8192), density=0.01))
    elif op == "overhead":
        yield from map(overhead_trial, ("forward", "step"))
    else:
        yield from (threads_trial(phase, Case()) for phase in linear.PHASES)
        yield loader_trial()


# --- the whole training step ----------------------------------------------------------------------------------------


def training_trial(
    optimizer: str,
    density: float,
    rivals: Sequence[str] = ("dense",),
    sizes: Sequence[int] = _MLP,
    batch: int = _BATCH,
    block_size: int = 32,
) -> Trial:
    """Forward, backward, optimizer and rewiring of an MLP.

    ``sparsenet`` is a step without a rewire, ``rewiring_step`` one that ends with RigL's: scoring all places,
    exchanging 30 % of the blocks, moving optimizer state. ``speedup`` is over 99 of the one and one of the other.

    Args:
        optimizer: one of ``OPTIMIZERS``, the same on all sides.
        rivals: names in ``NETWORKS``; all but ours are never rewired.
    """
    torch.manual_seed(0)
    x, y = torch.randn(batch, sizes[0]), torch.randint(sizes[-1], (batch,))
    contenders: dict[str, Contender] = {}
    left_out: dict[str, str] = {}
    for name, every in ((OURS, 1 << 40), ("rewiring_step", 1)):
        model = NETWORKS[OURS](sizes, density, block_size)
        update = OPTIMIZERS[optimizer](list(model.parameters()))
        sparsifier = Sparsifier(model, update, RigL(drop_fraction=0.3), every=every)
        contenders[name] = Contender(training_step(model, update, x, y, sparsifier.step))
    for name in rivals:
        try:
            rival_model = NETWORKS[name](sizes, density, block_size)
        except Unavailable as reason:
            left_out[name] = str(reason)
            continue
        step = training_step(rival_model, OPTIMIZERS[optimizer](list(rival_model.parameters())), x, y)
        contenders[name] = Contender(step, settle_seconds=0.02 if name == "sparselab" else 0.0)
    set_sparselab_threads(torch.get_num_threads())

    def derive(timings: Timings) -> dict[str, float]:
        amortised = [
            ((REWIRE_EVERY - 1) * plain + rewiring) / REWIRE_EVERY
            for plain, rewiring in zip(timings.seconds[OURS], timings.seconds["rewiring_step"], strict=True)
        ]
        metrics = {"amortised_ms": 1e3 * Quartiles.of(amortised).median}
        for name in rivals:
            if name in timings.seconds:
                over = Quartiles.of([a / b for a, b in zip(timings.seconds[name], amortised, strict=True)])
                suffix = "" if name == "dense" else f"_over_{name}"
                metrics |= {f"speedup{suffix}": over.median}
                if name == "dense":
                    metrics |= {"speedup_lower": over.lower, "speedup_upper": over.upper, "eff": density * over.median}
        return metrics

    fields = {"sizes": "-".join(map(str, sizes)), "batch": batch, "density": density, "block": block_size}
    return Trial(
        op="training_step",
        phase=optimizer,
        case=fields | {"dtype": "float32", "threads": torch.get_num_threads()},
        contenders=contenders,
        derive=derive,
        goal=GOALS.get(f"training {optimizer} {density}") if tuple(sizes) == _MLP else None,
        left_out=left_out,
    )


# --- a rewire -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _KnownScores(SET):
    """Scores that are there already: what is left is the rewire itself."""

    scores: Tensor = field(default_factory=lambda: torch.empty(0))  # [places]

    def drop_scores(self, layer: LayerView) -> Tensor:
        """The first num_blocks scores."""
        return self.scores[: layer.pattern.num_blocks]

    def grow_scores(self, layer: LayerView, places: Tensor) -> Tensor:
        """The scores of the places."""
        return self.scores[places]


def rewire_trial(case: Case) -> Trial:
    """One update of a layer and its AdamW state, 30 % of the blocks exchanged; scores are not computed, only read."""
    layer = SparseLinear(case.shape[1], case.shape[0], density=case.density, block_size=case.block_size)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.randn(2, case.shape[1])).sum().backward()
    optimizer.step()
    pattern = layer.pattern
    scores = torch.rand(pattern.block_rows * pattern.block_cols, generator=torch.Generator().manual_seed(0))
    sparsifier = Sparsifier(nn.Sequential(layer), optimizer, _KnownScores(0.3, scores), every=1)
    fields = {k: v for k, v in case.fields().items() if k in ("out", "in", "density", "block")}
    return Trial(
        op="update",
        phase="rewire",
        case=fields | {"num_blocks": pattern.num_blocks, "threads": torch.get_num_threads()},
        contenders={OURS: Contender(sparsifier.step)},
        derive=lambda timings: {
            "milliseconds": 1e3 * timings.time(OURS).median,
            "ns_per_block": 1e9 * timings.time(OURS).median / max(pattern.num_blocks, 1),
        },
        goal=GOALS["rewire"] if (case.shape, case.density) == ((8192, 8192), 0.01) else None,
        reference="",
    )


# --- overhead -------------------------------------------------------------------------------------------------------


def overhead_trial(phase: str, features: int = 32) -> Trial:
    """A layer so small that only the call is left, in training mode on one thread, against ``nn.Linear``.

    Args:
        phase: ``forward`` or ``step``: forward and the gradients of input, weight and bias.
    """
    x = torch.randn(features, features, requires_grad=True)
    grad = torch.randn(features, features)

    def call(layer: nn.Module) -> Callable[[], object]:
        if phase == "forward":
            return lambda: layer(x)
        wanted = (x, *layer.parameters())
        return lambda: torch.autograd.grad(layer(x), wanted, grad)

    def derive(timings: Timings) -> dict[str, float]:
        pairs = zip(timings.seconds[OURS], timings.seconds["dense"], strict=True)
        more = Quartiles.of([1e6 * (a - b) for a, b in pairs])
        return {"overhead_us": more.median, "overhead_us_lower": more.lower, "overhead_us_upper": more.upper}

    return Trial(
        op="overhead",
        phase=phase,
        case={"out": features, "in": features, "batch": features, "block": 32, "dtype": "float32", "threads": 1},
        contenders={
            OURS: Contender(call(SparseLinear(features, features, density=1.0, block_size=32))),
            "dense": Contender(call(nn.Linear(features, features))),
        },
        derive=derive,
        goal=GOALS[f"overhead {phase}"] if features == 32 else None,
        threads=1,
    )


# --- threads --------------------------------------------------------------------------------------------------------


def threads_trial(phase: str, case: Case, threads: int = 2) -> Trial:
    """How much faster ``threads`` threads are than one, ours and dense."""
    contenders = {}
    for name, contender in linear.trial(phase, case).contenders.items():
        for suffix, count in (("", threads), ("_1_thread", 1)):
            contenders[name + suffix] = Contender(contender.call, before=lambda n=count: torch.set_num_threads(n))

    def derive(timings: Timings) -> dict[str, float]:
        ours, dense = (timings.ratio(f"{name}_1_thread", name).median for name in (OURS, "dense"))
        return {"scaling": ours, "dense_scaling": dense, "share_of_dense_scaling": ours / dense}

    return Trial(
        op="threads",
        phase=phase,
        case=case.fields() | {"threads": threads},
        contenders=contenders,
        derive=derive,
        goal=GOALS["threads"] if threads == 2 else None,
        threads=threads,
    )


class _SlowDataset(TensorDataset):
    """Examples that take some work, as decoding and augmentation do."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return (x.sort().values - x.mean()) / x.std(), y


_LOADER_STEPS = 8  # steps a call: more than a loader has at hand when its turn comes


def loader_trial(sizes: Sequence[int] = (784, 2048, 2048, 10), batch: int = 128, workers: int = 2) -> Trial:
    """Training with ``DataLoader`` workers and without: workers must not fight with the kernels for the processors.

    ``slowdown`` is the time of a step with workers / without, ours; ``dense_slowdown`` the same of ``nn.Linear``.
    """
    torch.manual_seed(0)
    examples = _SlowDataset(torch.randn(4096, sizes[0]), torch.randint(sizes[-1], (4096,)))
    contenders = {}
    for name in (OURS, "dense"):
        for suffix, count in (("", workers), ("_no_workers", 0)):
            model = NETWORKS[name](sizes, 0.1, 32)
            optimizer = OPTIMIZERS["adamw_fused"](list(model.parameters()))
            contenders[name + suffix] = Contender(_loop(model, optimizer, examples, batch, count))

    def derive(timings: Timings) -> dict[str, float]:
        ours, dense = (timings.ratio(name, f"{name}_no_workers").median for name in (OURS, "dense"))
        return {"slowdown": ours, "dense_slowdown": dense}

    return Trial(
        op="threads",
        phase="data_loader",
        case={"sizes": "-".join(map(str, sizes)), "batch": batch, "density": 0.1, "workers": workers,
              "threads": torch.get_num_threads()},
        contenders=contenders,
        derive=derive,
    )  # fmt: skip


def _loop(model: nn.Module, optimizer, examples: TensorDataset, batch: int, workers: int) -> Callable[[], object]:
    loader = DataLoader(examples, batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0)

    def forever():
        while True:
            yield from loader

    batches = forever()

    def steps() -> None:
        for _ in range(_LOADER_STEPS):
            x, y = next(batches)
            training_step(model, optimizer, x, y)()

    return steps
