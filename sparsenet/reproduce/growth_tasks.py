"""The data of ``sparsenet reproduce growth``: images, scikit-learn's tables, and small made problems unlike images.

Every task is split once into training, validation (a fifth of the training set) and test examples, and standardised by
its training examples. Tables and made problems take the same defaults as images: nothing is tuned for one of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsenet.data.datasets import Dataset, load

__all__ = ["TABLES", "Task", "image_task", "table_task"]


@dataclass(frozen=True, eq=False)
class Task:
    """One problem, ready to be trained on.

    Attributes:
        name: as in the tables. classes: of a classification; 0 for a regression with targets standardised.
        train, validation, test: (x float32 [n, ...], y int64 [n] or float32 [n, 1]).
    """

    name: str
    classes: int
    train: tuple[Tensor, Tensor] = field(repr=False)
    validation: tuple[Tensor, Tensor] = field(repr=False)
    test: tuple[Tensor, Tensor] = field(repr=False)

    @property
    def features(self) -> int:
        """Of one flattened example."""
        return self.train[0][0].numel()

    @property
    def outputs(self) -> int:
        """Logits, or one number."""
        return self.classes or 1

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy, or mean squared error."""
        if self.classes:
            return torch.nn.functional.cross_entropy(output, target)
        return torch.nn.functional.mse_loss(output, target)

    def score(self, output: Tensor, target: Tensor) -> float:
        """Accuracy in percent, or R² times 100."""
        if self.classes:
            return 100.0 * float((output.argmax(1) == target).double().mean())
        spread = (target - target.mean()).square().mean()
        return 100.0 * float(1.0 - (output - target).square().mean() / spread)


def _task(
    name: str, classes: int, x: Tensor, y: Tensor, test: tuple[Tensor, Tensor] | None = None, seed: int = 0
) -> Task:
    """Splits and standardises; without a test set every fourth example of a fixed shuffle becomes one."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    if test is None:
        held, order = order[: len(x) // 4], order[len(x) // 4 :]
        test = x[held], y[held]
    held, kept = order[: len(order) // 5], order[len(order) // 5 :]
    spatial = [0, *range(2, x.dim())]
    mean, deviation = x[kept].mean(spatial, keepdim=True), x[kept].std(spatial, keepdim=True).clamp(min=1e-6)
    parts = []
    for given, target in ((x[kept], y[kept]), (x[held], y[held]), test):
        if not classes:
            target = ((target - y[kept].mean()) / y[kept].std()).reshape(-1, 1)
        parts.append((((given - mean) / deviation).contiguous(), target))
    return Task(name, classes, *parts)


def image_task(data: Dataset | str, *, flat: bool = True, scale: float = 1.0) -> Task:
    """A set of images; ``flat``: as vectors, else [1 or 3, height, width]. ``scale`` below 1: that share of them."""
    data = load(data, fallback=False) if isinstance(data, str) else data
    train, test = (x.float() / (255 if x.dtype == torch.uint8 else 1) for x in (data.train_x, data.test_x))
    if flat:
        train, test = train.flatten(1), test.flatten(1)
        # one mean and one deviation for all pixels: rare pixels are not blown up
        mean, deviation = train.mean(), train.std()
        train, test = (train - mean) / deviation, (test - mean) / deviation
    elif train.dim() == 3:
        train, test = train.unsqueeze(1), test.unsqueeze(1)
    n, m = (max(100, round(scale * len(x))) for x in (train, test))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:n]
    y, test_y = data.train_y.long(), data.test_y.long()[:m]
    if not flat:
        return _task(data.name, data.num_classes, train[order], y[order], (test[:m], test_y))
    held, kept = order[: n // 10], order[n // 10 :]
    return Task(data.name, data.num_classes, (train[kept], y[kept]), (train[held], y[held]), (test[:m], test_y))


# --- tables and made problems -----------------------------------------------------------------------------------------


def _sklearn(name: str, classes: int) -> Callable[[], Task]:
    def make() -> Task:
        bunch = getattr(importlib.import_module("sklearn.datasets"), f"load_{name}")()
        x, y = torch.as_tensor(bunch.data).float(), torch.as_tensor(bunch.target)
        return _task(name.replace("_", " "), classes, x, y.long() if classes else y.float())

    return make


def _friedman() -> Task:
    """Friedman-1 (Friedman, 1991) with noise of deviation 1."""
    datasets = importlib.import_module("sklearn.datasets")
    x, y = datasets.make_friedman1(2000, 10, noise=1.0, random_state=0)
    return _task("Friedman-1", 0, torch.as_tensor(x).float(), torch.as_tensor(y).float())


def _spirals() -> Task:
    """Two spirals of three half turns (Lang & Witbrock, 1988), 2000 points with noise."""
    generator = torch.Generator().manual_seed(0)
    n = 2000
    turn = torch.rand(n, generator=generator).sqrt() * 3 * torch.pi
    y = torch.arange(n) % 2
    sign = (1 - 2 * y).float()
    x = torch.stack([turn * turn.cos(), turn * turn.sin()], 1) * sign.unsqueeze(1)
    return _task("two spirals", 2, x + 0.15 * torch.randn(n, 2, generator=generator), y)


def _parity() -> Task:
    """The parity of the first five of ten bits, 4000 draws."""
    bits = torch.randint(2, (4000, 10), generator=torch.Generator().manual_seed(0))
    return _task("parity of 5 in 10 bits", 2, bits.float() * 2 - 1, bits[:, :5].sum(1) % 2)


def _mackey_glass() -> Task:
    """The Mackey-Glass equation (1977) with delay 17; the value six steps ahead of four that lie six steps apart."""
    x = [1.2] * 18
    for _ in range(3500):
        x.append(x[-1] + 0.2 * x[-18] / (1 + x[-18] ** 10) - 0.1 * x[-1])
    series = torch.tensor(x[300:])
    at = torch.arange(18, len(series) - 6)
    given = torch.stack([series[at - lag] for lag in (18, 12, 6, 0)], 1)
    return _task("Mackey-Glass", 0, given, series[at + 6])


def _permuted_digits() -> Task:
    """scikit-learn's 8 x 8 digits, their pixels in one random order."""
    bunch = importlib.import_module("sklearn.datasets").load_digits()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    x = torch.as_tensor(bunch.data).float()[:, order]
    return _task("permuted digits", 10, x, torch.as_tensor(bunch.target).long())


def _characters() -> Task:
    """The next character of Python's own help texts after eight others, one-hot, letters and space."""
    topics = importlib.import_module("pydoc_data.topics").topics
    text = " ".join(" ".join(topics[key].lower().split()) for key in sorted(topics))[:40_000]
    codes = torch.tensor([ord(c) - 96 if "a" <= c <= "z" else 0 for c in text])
    at = torch.randperm(len(codes) - 8, generator=torch.Generator().manual_seed(0))[:12_000]
    given = torch.nn.functional.one_hot(torch.stack([codes[at + i] for i in range(8)], 1), 27).flatten(1).float()
    return _task("characters", 27, given, codes[at + 8])


TABLES: dict[str, Callable[[], Task]] = {
    "wine": _sklearn("wine", 3),
    "breast cancer": _sklearn("breast_cancer", 2),
    "diabetes": _sklearn("diabetes", 0),
    "Friedman-1": _friedman,
    "two spirals": _spirals,
    "parity": _parity,
    "Mackey-Glass": _mackey_glass,
    "permuted digits": _permuted_digits,
    "characters": _characters,
}


def table_task(name: str) -> Task:
    """One of ``TABLES``."""
    if name not in TABLES:
        raise ValueError(f"table_task: name must be one of {', '.join(TABLES)}, got {name!r}")
    return TABLES[name]()
