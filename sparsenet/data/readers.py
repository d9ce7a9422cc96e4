"""Files of examples as tensors, checked and never unpickled: IDX, ``.npz``, ``.csv``, the binary version of CIFAR."""

from __future__ import annotations

import gzip
import math
import os
import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

__all__ = ["pair_of", "read_cifar", "read_csv", "read_idx", "read_npz", "validate_labels"]

_NPZ_KEYS = (("x_train", "y_train", "x_test", "y_test"), ("train_x", "train_y", "test_x", "test_y"), ("x", "y"))
_IDX_DTYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*(e[-+]?\d+)?|\.\d+(e[-+]?\d+)?|nan|inf(inity)?)|")


def validate_labels(y: Tensor, num_classes: int | None = None, *, name: str = "labels", min_classes: int = 2) -> None:
    """Refuse labels that nothing can be learned from: int64 [n], in [0, num_classes), ``min_classes`` different ones.

    Raises TypeError for another dtype or shape; ValueError for NaN, a label out of range, or too few classes.

    Example:
        >>> import torch
        >>> from sparsenet.data import validate_labels
        >>> validate_labels(torch.tensor([0, 1, 2, 1]), num_classes=3)
        >>> validate_labels(torch.tensor([0, 1, 3]), num_classes=3)
        Traceback (most recent call last):
        ValueError: validate_labels: labels must be in [0, 3), got 3
    """
    if y.is_floating_point() and bool(y.isnan().any()):
        raise ValueError(f"validate_labels: {name} must be class indices, got nan at {int(y.isnan().nonzero()[0, 0])}")
    if y.dtype != torch.int64 or y.dim() != 1:
        raise TypeError(f"validate_labels: {name} must be int64 [n], got {y.dtype} {list(y.shape)}")
    classes = y.unique()  # sorted
    for label in classes[:1].tolist() + classes[-1:].tolist():
        if label < 0 or (num_classes is not None and label >= num_classes):
            raise ValueError(f"validate_labels: {name} must be in [0, {num_classes or 'classes'}), got {label}")
    if len(classes) < min_classes:
        raise ValueError(f"validate_labels: {name} must have {min_classes} classes or more, got {len(classes)}")


def read_idx(path: str | Path) -> Tensor:
    """Read an IDX file (yann.lecun.com/exdb/mnist), gzipped or not, as a tensor of its own dtype and shape.

    Raises OSError when it cannot be read; ValueError for a wrong magic, a damaged gzip, or a length that differs from
    the header's: 00 00 <type> <rank>, ``rank`` big-endian uint32 sizes, then the values. A header that claims more than
    the file can hold is refused before anything is allocated.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from sparsenet.data import read_idx
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "labels.idx")
        ...     _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 0, 2]))   # uint8, one dimension of size 3
        ...     read_idx(path)
        tensor([7, 0, 2], dtype=torch.uint8)
    """
    with open(path, "rb") as raw:
        packed = raw.peek(2)[:2] == b"\x1f\x8b"  # known by its content, not its name
        most = os.fstat(raw.fileno()).st_size * (1032 if packed else 1)  # deflate expands no byte further
        try:
            return _parse_idx(gzip.GzipFile(fileobj=raw) if packed else raw, str(path), most)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"read_idx: {path} must be a whole gzip file, got: {error}") from error


def _parse_idx(stream: BinaryIO, path: str, most_bytes: int) -> Tensor:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _IDX_DTYPES or not 1 <= magic[3] <= 8:
        raise ValueError(f"read_idx: {path} must begin with the IDX magic 00 00 <type> <rank>, got [{magic.hex(' ')}]")
    dtype, rank = np.dtype(_IDX_DTYPES[magic[2]]), magic[3]
    header = stream.read(4 * rank)
    if len(header) < 4 * rank:
        raise ValueError(f"read_idx: {path} must have a header of {4 + 4 * rank} bytes, got {4 + len(header)}")
    shape = struct.unpack(f">{rank}I", header)
    wanted, received = math.prod(shape) * dtype.itemsize, 0
    values = np.empty(wanted if wanted <= most_bytes else 0, dtype=np.uint8)
    while received < len(values) and (n := stream.readinto(memoryview(values)[received : received + 2**20])):
        received += n
    if received < wanted or stream.read(1):
        got = f"at most {most_bytes}" if wanted > most_bytes else received if received < wanted else "more"
        raise ValueError(f"read_idx: {path} must hold {wanted} bytes for {list(shape)}, got {got}")
    return torch.from_numpy(values.view(dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False))


def read_cifar(path: str | Path, num_classes: int = 10) -> tuple[Tensor, Tensor]:
    """Read a *binary* CIFAR file (www.cs.toronto.edu/~kriz/cifar.html): uint8 [n, 3, 32, 32] and int64 labels [n].

    Records are <label><3072 pixels>; for CIFAR-100 <coarse label><fine label><3072 pixels>, and the fine one counts.
    Raises OSError when it cannot be read; ValueError for a partial record (any pickled "python version") or label.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from sparsenet.data import read_cifar
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "batch.bin")
        ...     _ = path.write_bytes(bytes([3]) + bytes(3072) + bytes([9]) + bytes(3072))
        ...     x, y = read_cifar(path)
        >>> x.shape, y.tolist()
        (torch.Size([2, 3, 32, 32]), [3, 9])
    """
    if num_classes not in (10, 100):
        raise ValueError(f"read_cifar: num_classes must be 10 or 100, got {num_classes!r}")
    record = 3073 if num_classes == 10 else 3074
    raw = np.fromfile(path, dtype=np.uint8)
    if len(raw) == 0 or len(raw) % record:
        raise ValueError(f"read_cifar: {path} must be records of {record} bytes, got {len(raw)} bytes")
    raw = raw.reshape(-1, record)
    y = torch.from_numpy(raw[:, -3073].astype(np.int64))
    validate_labels(y, num_classes, name=str(path), min_classes=1)
    return torch.from_numpy(raw[:, -3072:].copy()).view(-1, 3, 32, 32), y


def read_csv(path: str | Path, label_column: int | None = None) -> tuple[Tensor, Tensor]:
    """Read rows of comma-separated numbers, with or without a header row: x float32 [n, columns - 1], y int64 [n].

    ``label_column``: None is the column that a header calls label, class or target, else the last. A header is a first
    row without numbers, or with such a name. Raises OSError when it cannot be read; ValueError for text, NaN,
    infinities, ragged rows, labels that are not whole numbers >= 0, no rows, or no such column.

    Example:
        >>> import os, tempfile
        >>> from pathlib import Path
        >>> from sparsenet.data import read_csv
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "table.csv")
        ...     _ = path.write_text(os.linesep.join(["label,width,height", "1,0.5,2", "0,1.5,3"]))
        ...     x, y = read_csv(path)
        >>> x.tolist(), y.tolist()
        ([[0.5, 2.0], [1.5, 3.0]], [1, 0])
    """
    with open(path, encoding="utf-8-sig") as lines, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "input contained no data" is an error below
        try:
            names = [cell.strip(" \"'\n").lower() for cell in lines.readline().split(",")]
            label = next((names.index(name) for name in ("label", "class", "target") if name in names), None)
            header = int(label is not None or not any(map(_NUMBER.fullmatch, names)))
            lines.seek(0)
            table = np.loadtxt(lines, np.float32, delimiter=",", quotechar='"', comments=None, ndmin=2, skiprows=header)
        except ValueError as error:
            raise ValueError(f"read_csv: {path} must be rows of numbers of one length, got: {error}") from error
    column = next(c for c in (label_column, label, -1) if c is not None)
    if len(table) == 0 or table.shape[1] < 2 or not -table.shape[1] <= column < table.shape[1]:
        raise ValueError(f"read_csv: {path} must have a row, two columns and column {column}, got {list(table.shape)}")
    y = _labels(table[:, column], f"read_csv: labels of {path}")
    return _features(np.delete(table, column, axis=1), f"read_csv: {path}"), y


def read_npz(path: str | Path) -> tuple[Tensor, ...]:
    """Read a NumPy ``.npz`` of arrays x_train, y_train, x_test, y_test (or train_x, ...; or only x, y) in that order.

    Returns examples as uint8 or float32 [n, ...], labels as int64 [n]. Raises OSError when it cannot be read; TypeError
    or ValueError for missing arrays, values that are no numbers, NaN, infinities, labels that are not whole numbers
    >= 0, a damaged file, or one with pickled objects, which are never unpickled.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from sparsenet.data import read_npz
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/ours.npz", x=np.random.rand(6, 4), y=np.arange(6) % 2)
        ...     x, y = read_npz(f"{folder}/ours.npz")
        >>> x.dtype, y.tolist()
        (torch.float32, [0, 1, 0, 1, 0, 1])
    """
    with open(path, "rb") as stream:
        try:
            archive = np.load(stream, allow_pickle=False)
            keys = next((keys for keys in _NPZ_KEYS if set(keys) <= set(archive.files)), None)
            arrays = [np.asarray(archive[key]) for key in keys or ()]
        except Exception as error:  # NumPy's and zipfile's parsers raise a dozen types on hostile bytes
            raise ValueError(f"read_npz: {path} must be a zip of plain arrays, got: {error}") from error
    if keys is None:
        raise ValueError(f"read_npz: {path} must hold arrays {', '.join(_NPZ_KEYS[0])}, or x, y, got {archive.files}")
    parts = zip(arrays[::2], arrays[1::2], keys[::2], keys[1::2], strict=True)
    return tuple(
        part for x, y, *names in parts for part in pair_of("read_npz", x, y, *(f"{n} of {path}" for n in names))
    )


def pair_of(op: str, x: np.ndarray, y: np.ndarray, x_name: str | Path, y_name: str | Path) -> tuple[Tensor, Tensor]:
    """Examples and their labels as tensors, checked to be equally many."""
    examples, labels = _features(x, f"{op}: {x_name}"), _labels(y, f"{op}: {y_name}")
    if len(examples) != len(labels):
        raise ValueError(f"{op}: {y_name} must hold {len(examples)} labels, one per example, got {len(labels)}")
    return examples, labels


def _features(array: np.ndarray, name: str) -> Tensor:
    """Examples as uint8 or finite float32; ``name`` begins the message."""
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be an array of numbers, got {array.dtype}")
    with np.errstate(over="ignore"):
        x = torch.from_numpy(np.ascontiguousarray(array, dtype=np.uint8 if array.dtype == np.uint8 else np.float32))
    if x.dtype != torch.uint8 and not all(bool(rows.isfinite().all()) for rows in x.split(4096)):
        raise ValueError(f"{name} must be finite in float32, got nan or inf")
    return x


def _labels(array: np.ndarray, name: str) -> Tensor:
    """Labels [n] or [n, 1] as int64 [n]; ``name`` begins the message."""
    if array.dtype.kind not in "biuf" or array.shape[:1] != (array.size,):
        raise TypeError(f"{name} must be one whole number per example, got {array.dtype} {list(array.shape)}")
    array = array.reshape(-1)
    bad = array[~((array >= 0) & (array < 2**31) & (np.floor(array) == array))]  # NaN fails each
    if len(bad):
        raise ValueError(f"{name} must be whole numbers in [0, 2147483648), got {bad[0]}")
    return torch.from_numpy(array.astype(np.int64))
