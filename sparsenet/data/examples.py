"""Examples as users have them, in memory or batch by batch, and a model judged by them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsenet.data.datasets import Normalization, batches

__all__ = ["Evaluation", "Examples", "batch_of", "evaluate", "logits_of", "num_batches", "source_of"]

X_KEYS, Y_KEYS = ("x", "input", "inputs"), ("y", "label", "labels", "target")  # of a dictionary of examples


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples in memory: ``x`` [n, features...] and labels ``y`` [n]; ``indices`` [m] picks rows.

    Tensors, NumPy arrays and lists of numbers are taken; ``x`` is kept as uint8 or float32, ``y`` and ``indices`` as
    int64.

    Raises:
        TypeError: sparse, nested, quantized or complex tensors, text, labels that are no integers. ValueError: another
        shape, NaN or infinities in ``x``, negative labels, rows that are not there.

    Example:
        >>> import numpy, torch, sparsenet as sn
        >>> sn.Examples(torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 0, 1]), indices=torch.tensor([0, 1, 2])).x.shape
        torch.Size([6, 4])
        >>> sn.Examples(numpy.zeros((2, 3)), [0, 1]).x.dtype
        torch.float32
    """

    x: Tensor
    y: Tensor
    indices: Tensor | None = None

    def __post_init__(self) -> None:
        x = _tensor(self.x, "Examples: x")
        if x.dim() < 2 or (len(x) and not x[0].numel()):
            raise ValueError(f"Examples: x must be [n, features...], got {list(x.shape)}")
        if x.dtype != torch.uint8:
            x = x.float()
            if not all(bool(rows.isfinite().all()) for rows in x.split(max(1, 2**18 // max(1, x[:1].numel())))):
                raise ValueError("Examples: x must be finite in float32, got nan or inf")
        y = _labels(self.y, len(x), "Examples: y")
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "y", y)
        if len(y) and int(y.min()) < 0:
            raise ValueError(f"Examples: y must be class numbers of 0 or more, got {int(y.min())}")
        if self.indices is not None:
            rows = _tensor(self.indices, "Examples: indices")
            whole = rows.dtype != torch.bool and not rows.is_floating_point() and rows.dim() == 1
            if not whole or (len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < len(x))):
                rule = f"Examples: indices must be integers [m] in [0, {len(x)})"
                raise ValueError(f"{rule}, got {rows.dtype} {list(rows.shape)}")
            object.__setattr__(self, "indices", rows.long())

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
        ValueError: there is no example, or as :func:`logits_of`.

    Example:
        >>> import torch
        >>> from sparsenet.data import evaluate
        >>> evaluate(torch.nn.Identity(), [(torch.tensor([[9.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 1]))]).accuracy
        0.5
    """
    training = model.training
    model.eval()
    loss, right, count = 0.0, 0, 0
    try:
        for x, y in stream:
            logits = logits_of(model, x, y)
            labels = y.to(logits.device)
            loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(1) == labels).sum())
            count += len(y)
    finally:
        model.train(training)
    if not count:
        raise ValueError("evaluate: stream must have at least one example, got none")
    return Evaluation(loss / count, right / count, count)


def logits_of(model: nn.Module, x: Tensor, y: Tensor, *labels: Tensor) -> Tensor:
    """What ``model`` makes of ``x``, as float32 [b, classes], once it is sure that its labels [b] can be among them.

    Args:
        model: maps ``x`` to logits.
        x: one batch. y: its labels. labels: others that will be asked for.

    Raises:
        TypeError: the model returns something else than a tensor. ValueError: ``x`` does not fit the model, the result
        is not [b, classes], or a label is not in [0, classes).

    Example:
        >>> import torch
        >>> from sparsenet.data.examples import logits_of
        >>> logits_of(torch.nn.Linear(4, 3), torch.zeros(2, 4), torch.tensor([0, 2])).shape
        torch.Size([2, 3])
    """
    try:
        logits = model(x)
    except RuntimeError as error:
        if "shapes cannot be multiplied" not in str(error):
            raise
        raise ValueError(
            f"Trainer: x must be as wide as the model's first layer reads, got {list(x.shape)}: {error}"
        ) from error
    if not isinstance(logits, Tensor):
        raise TypeError(f"Trainer: the model must return a tensor of logits, got {type(logits).__name__}")
    if logits.dim() != 2 or len(logits) != len(y):
        raise ValueError(f"Trainer: the model must return logits [{len(y)}, classes], got {list(logits.shape)}")
    for some in (y, *labels):
        low, high = torch.stack(some.aminmax()).tolist() if len(some) else (0, -1)
        if low < 0 or high >= logits.shape[1]:
            wrong = low if low < 0 else high
            raise ValueError(f"Trainer: labels must be in [0, {logits.shape[1]}), the model's outputs, got {wrong}")
    return logits.float()


# --- what is taken ----------------------------------------------------------------------------------------------------


def source_of(examples: Any) -> Examples | Iterable:
    """Examples in memory, or an iterable of batches, of whatever a user has.

    Args:
        examples: :class:`Examples`; a pair (x, y) of tensors, arrays or lists, or a dictionary of them, which become
            Examples; or an iterable whose items :func:`batch_of` takes.

    Raises:
        TypeError: anything else; and as Examples.

    Example:
        >>> import numpy
        >>> from sparsenet.data.examples import source_of
        >>> source_of({"x": numpy.zeros((2, 3)), "label": [0, 1]}).y
        tensor([0, 1])
    """
    if isinstance(examples, Examples):
        return examples
    if isinstance(examples, Mapping):
        return Examples(*_entries(examples))
    if isinstance(examples, (tuple, list)) and len(examples) == 2 and all(map(_is_array, examples)):
        return Examples(*examples)
    if isinstance(examples, Iterable) and not _is_array(examples) and not isinstance(examples, (str, bytes)):
        return examples
    raise TypeError(
        f"Trainer: examples must be (x, y), Examples or an iterable of batches, got {type(examples).__name__}"
    )


def num_batches(source: Examples | Iterable, batch_size: int) -> int:
    """Batches in one pass over what :func:`source_of` returned, which must be there again for the next pass.

    Raises:
        TypeError: it has no length, or can be read only once.

    Example:
        >>> import torch
        >>> from sparsenet.data.examples import num_batches, source_of
        >>> num_batches(source_of((torch.zeros(10, 3), [0, 1] * 5)), batch_size=4)
        3
    """
    if isinstance(source, Examples):
        return math.ceil(len(source) / batch_size)
    rule = "Trainer: batches must have a length and be there again for every epoch, as of a list or a DataLoader"
    if not isinstance(source, Sized) or isinstance(source, Iterator):
        raise TypeError(f"{rule}, got a {type(source).__name__}")
    try:
        return len(source)
    except TypeError as error:  # a DataLoader of a data set without a length
        raise TypeError(f"{rule}, got: {error}") from error


def batch_of(batch: Any) -> tuple[Tensor, Tensor]:
    """One batch as tensors: x [b, features...] of any type of numbers, labels int64 [b].

    Args:
        batch: (x, y), a tuple or list; or a dictionary with x, input or inputs and y, label, labels or target.

    Raises:
        TypeError, ValueError: no or other entries, and as :class:`Examples`; NaN and labels are not looked at here.

    Example:
        >>> import torch
        >>> from sparsenet.data.examples import batch_of
        >>> batch_of({"input": torch.zeros(2, 3), "labels": torch.tensor([0, 1], dtype=torch.int32)})[1]
        tensor([0, 1])
    """
    if isinstance(batch, Mapping):
        x, y = _entries(batch)
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        x, y = batch
    else:
        entries = f" of {len(batch)} entries" if isinstance(batch, (tuple, list)) else ""
        raise TypeError(
            f"Trainer: a batch must be (x, y) or a dictionary of x and y, got a {type(batch).__name__}{entries}"
        )
    x = _tensor(x, "Trainer: x of a batch")
    if x.dim() < 2 or not len(x):
        raise ValueError(f"Trainer: x of a batch must be [b >= 1, features...], got {list(x.shape)}")
    return x, _labels(y, len(x), "Trainer: y of a batch")


def _entries(dictionary: Mapping) -> tuple[Any, Any]:
    """X and y; what else is there would be lost, so there must be nothing else."""
    x, y = ([key for key in keys if key in dictionary] for keys in (X_KEYS, Y_KEYS))
    if (len(x), len(y), len(dictionary)) != (1, 1, 2):
        rule = f"{' or '.join(X_KEYS)} and {' or '.join(Y_KEYS)}, and nothing else"
        raise ValueError(f"Trainer: a dictionary must hold {rule}, got {', '.join(map(str, dictionary)) or 'nothing'}")
    return dictionary[x[0]], dictionary[y[0]]


def _is_array(value: Any) -> bool:
    """A tensor, an array or something that becomes one, or lists of numbers: no iterable of batches."""
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and (
            isinstance(value[0], (int, float)) or (not isinstance(value[0], Tensor) and _is_array(value[0]))
        )
    return isinstance(value, Tensor) or hasattr(value, "__array__")


def _tensor(value: Any, name: str) -> Tensor:
    """A dense tensor of real numbers; memory is shared where it can be."""
    if not isinstance(value, Tensor):
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise TypeError(f"{name} must be an array of one shape, got a {type(value).__name__}: {error}") from error
        if array.dtype.kind not in "biuf":
            raise TypeError(f"{name} must be an array of numbers, got {array.dtype}")
        kind = np.dtype(np.float64) if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of arrays that must not be written to: nobody will
            value = torch.from_numpy(np.ascontiguousarray(array, dtype=kind).reshape(array.shape))
    kinds = {"nested": value.is_nested, "quantized": value.is_quantized, "complex": value.is_complex()}
    kinds |= {"sparse": value.layout is not torch.strided, "meta": value.is_meta}
    for kind, is_so in kinds.items():
        if is_so:
            raise TypeError(f"{name} must be a dense tensor of real numbers, got a {kind} one, {value.dtype}")
    return value.detach()


def _labels(value: Any, count: int, name: str) -> Tensor:
    """int64 [count]."""
    y = _tensor(value, name)
    if list(y.shape) != [count]:
        hint = ""
        if y.dim() == 2 and len(y) == count:
            hint = "; y.squeeze(1) makes it so" if y.shape[1] == 1 else "; y.argmax(1) makes it so of one-hot rows"
        raise ValueError(f"{name} must be one class number per example, [{count}], got {list(y.shape)}{hint}")
    if y.is_floating_point():
        raise TypeError(
            f"{name} must be class numbers of an integer type (only classifiers are trained), got {y.dtype}"
        )
    return y.long()
