"""Data sets in memory: a checked download, normalised batches made on the fly.

``load`` finds a data set, ``batches`` yields float32 batches of it. Images stay uint8 in memory: there is never a float
copy of more than one batch, because what is trained here trains inside a memory budget. Formats: IDX, gzipped or not;
``.npz``; ``.csv``; the *binary* version of CIFAR-10/100. A file that is not what it should be: ValueError, naming it.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import math
import os
import tarfile
import tempfile
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sparsenet.data.readers import pair_of, read_cifar, read_csv, read_idx, read_npz, validate_labels
from sparsenet.schedules import as_integer, number_of

# Published files: data set, file, bytes, sha256. Fashion-MNIST's were recomputed here from Debian's copy, with the name
# and date put back into the gzip headers; the others are those that independent public projects agree on.
_MANIFEST = """
fashion-mnist train-images-idx3-ubyte.gz 26421880 3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84
fashion-mnist train-labels-idx1-ubyte.gz 29515 a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845
fashion-mnist t10k-images-idx3-ubyte.gz 4422102 346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073
fashion-mnist t10k-labels-idx1-ubyte.gz 5148 67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5
mnist train-images-idx3-ubyte.gz 9912422 440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609
mnist train-labels-idx1-ubyte.gz 28881 3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c
mnist t10k-images-idx3-ubyte.gz 1648877 8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6
mnist t10k-labels-idx1-ubyte.gz 4542 f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6
cifar10 cifar-10-binary.tar.gz 170052171 c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd
cifar100 cifar-100-binary.tar.gz 168513733 58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec
"""
_URLS = {  # the folders that hold the files above
    "fashion-mnist": "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    **dict.fromkeys(("cifar10", "cifar100"), "https://www.cs.toronto.edu/~kriz/"),
}
_NUM_CLASSES = {"fashion-mnist": 10, "mnist": 10, "cifar10": 10, "cifar100": 100}
_PACKAGED = Path("/usr/share/datasets")  # Debian's dataset-fashion-mnist and its like
_CIFAR_FILES = {  # classes -> where the published archive has the files; the last one is the test set
    10: [f"cifar-10-batches-bin/{name}.bin" for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")],
    100: ["cifar-100-binary/train.bin", "cifar-100-binary/test.bin"],
}


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification data set in memory, checked at construction.

    ``train_x``, ``test_x``: uint8 or float32 [n, features...]; ``train_y``, ``test_y``: int64 [n], in [0, num_classes).
    ``source`` says where it came from. Raises ValueError or TypeError when that is not so.

    Example:
        >>> import torch
        >>> from sparsenet.data import Dataset
        >>> x, y = torch.randn(10, 4), torch.arange(10) % 2
        >>> Dataset("ours", x[:8], y[:8], x[8:], y[8:], num_classes=2, source="drawn at random").train_x.shape
        torch.Size([8, 4])
    """

    name: str
    train_x: Tensor = field(repr=False)
    train_y: Tensor = field(repr=False)
    test_x: Tensor = field(repr=False)
    test_y: Tensor = field(repr=False)
    num_classes: int
    source: str

    def __post_init__(self) -> None:
        num_classes = as_integer("Dataset", "num_classes", self.num_classes, at_least=1)
        object.__setattr__(self, "num_classes", num_classes)
        features = list(self.train_x.shape[1:])
        for part, x, y in (("train", self.train_x, self.train_y), ("test", self.test_x, self.test_y)):
            alike = x.dim() > 1 and len(x) > 0 and list(x.shape[1:]) == features
            if x.dtype not in (torch.uint8, torch.float32) or not alike:
                rule = f"uint8 or float32 [n >= 1, *{features}]"
                raise ValueError(f"Dataset: {part}_x of {self.source} must be {rule}, got {x.dtype} {list(x.shape)}")
            if list(y.shape) != [len(x)]:
                raise ValueError(f"Dataset: {part}_y of {self.source} must be [{len(x)}] labels, got {list(y.shape)}")
            validate_labels(y, num_classes, name=f"{part}_y of {self.source}", min_classes=1)

    @property
    def num_features(self) -> int:
        """Length of one flattened example."""
        return self.train_x[0].numel()


def load(name_or_path: str | Path = "fashion-mnist", *, download: bool = True, fallback: bool = True) -> Dataset:
    """Load ``fashion-mnist``, ``mnist``, ``cifar10``, ``cifar100``, ``digits``, or the data at a path.

    A name is looked for in ``$SPARSENET_DATA/<name>/``, in ``sparsenet/<name>/`` of the user cache (``$XDG_CACHE_HOME``
    or ``~/.cache``) and in Debian's ``/usr/share/datasets/<name>/``. Else, with ``download``, it is fetched into the
    cache and checked against its published sha256. Else, with ``fallback``, scikit-learn's bundled digits come instead,
    with one warning that says why. A path is a ``.npz`` or ``.csv`` file, or a folder of IDX files, CIFAR binary files,
    ``train.csv`` and ``test.csv``, or one ``.npz``. Without a test set, always the same stratified fifth becomes one.
    Raises FileNotFoundError when nothing is found; ValueError or TypeError, naming the file, for bad data.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from sparsenet.data import load
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/ours.npz", x=np.random.rand(20, 4), y=np.arange(20) % 2)
        ...     data = load(f"{folder}/ours.npz")
        >>> data.num_classes, len(data.train_y), len(data.test_y)
        (2, 16, 4)
    """
    name = str(name_or_path).lower().replace("_", "-")
    if name == "digits":
        return _digits()
    if name not in _NUM_CLASSES:
        return _load_path(Path(name_or_path).expanduser())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sparsenet")
    folders = [Path(root, name) for root in (os.environ.get("SPARSENET_DATA"), cache, _PACKAGED) if root]
    for folder in folders:
        if arrays := _read_folder(folder):
            return Dataset(name, *arrays, _NUM_CLASSES[name], str(folder))
    reason = "download=False"
    if download:
        try:
            return Dataset(name, *_download(name, cache / name), _NUM_CLASSES[name], f"{cache / name}, downloaded")
        except (OSError, http.client.HTTPException) as error:
            reason = f"downloading {_URLS[name]} failed ({error})"
    missing = f"load: {name} is in none of {', '.join(map(str, folders))} and {reason}"
    if not fallback or importlib.util.find_spec("sklearn") is None:
        raise FileNotFoundError(missing + "; scikit-learn is not installed either" * fallback)
    warnings.warn(f"{missing}; using scikit-learn's bundled digits instead", stacklevel=2)
    return _digits()


def _load_path(path: Path) -> Dataset:
    if not path.exists():
        names = ", ".join([*_NUM_CLASSES, "digits"])
        raise FileNotFoundError(f"load: name_or_path must be one of {names}, or an existing path, got {str(path)!r}")
    arrays = {".npz": read_npz, ".csv": read_csv}.get(path.suffix.lower(), _read_folder)(path)
    if arrays is None:
        raise ValueError(f"load: {path} must be a .npz or .csv file or a folder of IDX, CIFAR, csv or npz files")
    validate_labels(arrays[1], name=f"labels of {path}")
    if len(arrays) == 2:
        rows = split(arrays[1], 0.2)
        arrays = [part[chosen] for chosen in rows for part in arrays]
    num_classes = 1 + max(int(y.max()) if len(y) else 0 for y in (arrays[1], arrays[3]))
    if num_classes > len(arrays[1]):
        raise ValueError(f"load: labels of {path} must be below the number of examples, got {num_classes - 1}")
    return Dataset(path.stem, *arrays, num_classes=num_classes, source=str(path))


def _read_folder(folder: Path) -> tuple[Tensor, ...] | None:
    """The arrays of the first complete set of files found in ``folder``, or None."""
    idx = [
        next((f for f in (folder / name, folder / f"{name}.gz") if f.is_file()), None)
        for name in (f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
    ]
    if all(idx):
        arrays = [read_idx(file).numpy() for file in idx]
        return (*pair_of("load", *arrays[:2], *idx[:2]), *pair_of("load", *arrays[2:], *idx[2:]))
    for classes, files in _CIFAR_FILES.items():
        for paths in ([folder / f for f in files], [folder / Path(f).name for f in files]):
            if all(f.is_file() for f in paths):
                *train, test = (read_cifar(f, classes) for f in paths)
                return (torch.cat([x for x, _ in train]), torch.cat([y for _, y in train]), *test)
    if all((folder / f).is_file() for f in ("train.csv", "test.csv")):
        return (*read_csv(folder / "train.csv"), *read_csv(folder / "test.csv"))
    npz = list(folder.glob("*.npz"))
    return read_npz(npz[0]) if len(npz) == 1 else None


def _download(name: str, folder: Path) -> tuple[Tensor, ...] | None:
    """Fetch the published files that ``folder`` lacks and read them. OSError or HTTPException when that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    for dataset, file, size, sha256 in map(str.split, _MANIFEST.strip().split("\n")):
        if dataset == name and not (folder / file).is_file():
            request = urllib.request.Request(_URLS[name] + file, headers={"User-Agent": "sparsenet"})
            with (
                urllib.request.urlopen(request, timeout=15) as response,
                tqdm.wrapattr(response, "read", total=int(size), desc=file, disable=None) as stream,
            ):
                _write(folder / file, stream, int(size), sha256)
        if dataset == name and file.endswith(".tar.gz"):
            with tarfile.open(folder / file) as archive:
                for member in _CIFAR_FILES[_NUM_CLASSES[name]]:
                    _write(folder / Path(member).name, archive.extractfile(member))
            (folder / file).unlink()
    return _read_folder(folder)


def _write(target: Path, stream: BinaryIO, size: int | None = None, sha256: str | None = None) -> None:
    """Copy ``stream`` to ``target``, whole and checked or not at all: OSError when size or sha256 differ."""
    digest, received = hashlib.sha256(), 0
    handle, part = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as out:
            while (chunk := stream.read(1 << 20)) and (size is None or received <= size):
                received += len(chunk)
                digest.update(chunk)
                out.write(chunk)
        got = f"{received} bytes, sha256 {digest.hexdigest()}"
        if sha256 is not None and got != f"{size} bytes, sha256 {sha256}":
            raise OSError(f"{target.name} must be {size} bytes, sha256 {sha256}, got {got}")
        os.replace(part, target)
    finally:
        Path(part).unlink(missing_ok=True)


def _digits() -> Dataset:
    try:
        import sklearn.datasets as bundled
    except ImportError as error:
        raise ModuleNotFoundError("load: digits needs scikit-learn: pip install scikit-learn") from error
    digits = bundled.load_digits()  # 1797 images of 8 x 8, values 0 to 16
    x, y = torch.from_numpy(digits.images.astype(np.uint8)), torch.from_numpy(digits.target.astype(np.int64))
    train, test = split(y, 0.2)
    return Dataset("digits", x[train], y[train], x[test], y[test], 10, "scikit-learn's bundled digits")


@dataclass(frozen=True, eq=False)
class Normalization:
    """Maps x to (x - mean) / std; both are float32 [1] or [features of a flattened example], of a training set.

    Example:
        >>> import torch
        >>> from sparsenet.data import Normalization, batches
        >>> normalization = Normalization(mean=torch.tensor([2.0]), std=torch.tensor([4.0]))
        >>> x, _ = next(batches(torch.tensor([[2.0], [6.0]]), torch.tensor([0, 1]), 2, normalization=normalization))
        >>> x.flatten()
        tensor([0., 1.])
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def from_data(cls, x: Tensor, per: str | None = None) -> Normalization:
        """Statistics of ``x`` [n, features...], in float64, a few rows at a time; a constant keeps its scale (std 1).

        ``per``: "dataset" (one number), "channel" (dimension 1) or "feature". None: "channel" for [n, c, h, w],
        "feature" for float [n, f], else "dataset". Raises ValueError for another ``per``, no examples, NaN, infinities.
        """
        per = per or ("channel" if x.dim() == 4 else "feature" if x.dim() == 2 and x.is_floating_point() else "dataset")
        if per not in ("dataset", "channel", "feature") or x.dim() < 2 or x.numel() == 0:
            rule = "per must be dataset, channel or feature, and x [n >= 1, features...]"
            raise ValueError(f"Normalization: {rule}, got {per!r} and {list(x.shape)}")
        features = x[0].numel()
        groups = {"dataset": 1, "channel": x.shape[1], "feature": features}[per]

        def average(term: Callable[[Tensor], Tensor]) -> Tensor:
            chunks = (rows.reshape(len(rows), groups, -1).double() for rows in x.split(max(1, 2**18 // features)))
            return sum(term(chunk).sum((0, 2)) for chunk in chunks) * (groups / x.numel())

        mean = average(lambda chunk: chunk)
        std = average(lambda chunk: (chunk - mean[:, None]) ** 2).sqrt()
        if not bool(std.isfinite().all()):
            raise ValueError("Normalization: x must be finite, got nan or inf")
        std[std <= torch.finfo(torch.float32).eps * mean.abs()] = 1.0
        repeat = 1 if groups == 1 else features // groups
        return cls(mean.float().repeat_interleave(repeat), std.float().repeat_interleave(repeat))


def batches(
    x: Tensor,
    y: Tensor,
    batch_size: int,
    *,
    shuffle: bool = False,
    generator: torch.Generator | None = None,
    indices: Tensor | None = None,
    normalization: Normalization | None = None,
    drop_last: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one epoch of ``x`` (uint8 or float32 [n, features...]) and labels ``y`` [n]: (float32 [b, features], [b]).

    Only one batch at a time exists as floats; without ``normalization`` values are only converted. The last batch is
    smaller, or left out with ``drop_last``. ``shuffle`` draws the order from ``generator`` (None: torch's own) at the
    call. ``indices``: int64 rows to use instead of all, as ``split`` returns them. To resume inside an epoch, set the
    generator as it was at its start and skip by ``itertools.islice``. Raises TypeError or ValueError at the call.

    Example:
        >>> import torch
        >>> from sparsenet.data import batches
        >>> x, y = torch.arange(10, dtype=torch.uint8).reshape(5, 2), torch.arange(5)
        >>> [(tuple(a.shape), a.dtype, b.tolist()) for a, b in batches(x, y, batch_size=2)][-1]
        ((1, 2), torch.float32, [4])
    """
    batch_size = as_integer("batches", "batch_size", batch_size, at_least=1)
    if x.dim() < 2 or x.dtype not in (torch.uint8, torch.float32):
        raise TypeError(f"batches: x must be uint8 or float32 [n, features...], got {x.dtype} {list(x.shape)}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"batches: y must have one label per row of x, [{len(x)}], got {list(y.shape)}")
    if indices is None:
        indices = torch.arange(len(x))
    in_range = indices.dtype == torch.int64 and indices.dim() == 1 and ((indices >= 0) & (indices < len(x))).all()
    if not in_range:
        raise ValueError(f"batches: indices must be int64 [m] in [0, {len(x)}), got {indices}")
    if shuffle:
        indices = indices[torch.randperm(len(indices), generator=generator)]
    stop = len(indices) // batch_size * batch_size if drop_last else len(indices)

    def batch(rows: Tensor) -> tuple[Tensor, Tensor]:
        examples = x.index_select(0, rows).flatten(1).float()  # index_select copies: in place is safe
        if normalization is not None:
            examples.sub_(normalization.mean.to(x.device)).div_(normalization.std.to(x.device))
        return examples, y.index_select(0, rows)

    return (batch(indices[i : min(i + batch_size, stop)].to(x.device)) for i in range(0, stop, batch_size))


def split(y: Tensor, fraction: float, *, seed: int = 0, stratified: bool = True) -> tuple[Tensor, Tensor]:
    """Split the rows of labels ``y`` [n] into (kept, held out): int64 indices, each sorted, the same for the same seed.

    ``stratified`` holds out ``round(fraction * count)`` of every class, but never all of a class; else ``fraction`` of
    all rows whatever their labels. Raises ValueError unless 0 < fraction < 1, and when no row would be held out.

    Example:
        >>> import torch
        >>> from sparsenet.data import split
        >>> y = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
        >>> kept, held_out = split(y, 0.25)
        >>> len(kept), y[held_out].tolist()   # one of every class
        (6, [0, 1])
    """
    number = number_of(fraction)
    if number is None or not 0 < number < 1:
        raise ValueError(f"split: fraction must be a number in (0, 1), got {fraction!r}")
    fraction, seed = number, as_integer("split", "seed", seed)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    groups = [order[y[order] == label] for label in y.unique()] if stratified else [order]
    held = torch.zeros(len(y), dtype=torch.bool)
    for rows in groups:
        held[rows[: min(math.floor(fraction * len(rows) + 0.5), len(rows) - 1)]] = True
    if not held.any():
        raise ValueError(f"split: fraction must hold out at least one of {len(y)} rows, got {fraction!r}")
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]
