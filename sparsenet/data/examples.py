"""Examples in memory, and a model judged by them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsenet.data.datasets import Normalization, batches

__all__ = ["Evaluation", "Examples", "evaluate"]


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples in memory: ``x`` uint8 or float32 [n, features...], ``y`` int64 [n]; ``indices`` [m] picks rows.

    Example:
        >>> import torch, sparsenet as sn
        >>> sn.Examples(torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 0, 1]), indices=torch.tensor([0, 1, 2])).x.shape
        torch.Size([6, 4])
    """

    x: Tensor
    y: Tensor
    indices: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x) if self.indices is None else len(self.indices)

    @property
    def rows(self) -> Tensor:
        """int64 [m]: the rows of ``x`` and ``y`` that are meant."""
        return torch.arange(len(self.x)) if self.indices is None else self.indices

    def batches(self, batch_size: int, normalization: Normalization | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass in order: (float32 [b, features], int64 [b]); see :func:`sparsenet.data.batches`."""
        return batches(self.x, self.y, batch_size, indices=self.indices, normalization=normalization)


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy in nats, share of right answers, and over how many examples."""

    loss: float
    accuracy: float
    examples: int

    @property
    def percent(self) -> float:
        """Right answers, in percent."""
        return 100.0 * round(self.accuracy * self.examples) / self.examples


@torch.no_grad()
def evaluate(model: nn.Module, stream: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    """Judges ``model``, in eval mode, by batches (x, int64 labels [b]); it maps x to logits [b, classes].

    Raises:
        ValueError: there is no example.

    Example:
        >>> import torch
        >>> from sparsenet.data import evaluate
        >>> evaluate(torch.nn.Identity(), [(torch.tensor([[9.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 1]))]).accuracy
        0.5
    """
    training = model.training
    model.eval()
    loss, right, count = 0.0, 0, 0
    for x, y in stream:
        logits = model(x).float()
        loss += float(nn.functional.cross_entropy(logits, y, reduction="sum"))
        right += int((logits.argmax(1) == y).sum())
        count += len(y)
    model.train(training)
    if not count:
        raise ValueError("evaluate: stream must have at least one example, got none")
    return Evaluation(loss / count, right / count, count)
