"""Data sets in memory: found or downloaded, checked, split, handed out in normalised batches; models judged by them."""

from sparsenet.data.augmentation import augment
from sparsenet.data.datasets import Dataset, Normalization, batches, load, split
from sparsenet.data.examples import Evaluation, Examples, evaluate
from sparsenet.data.readers import read_cifar, read_csv, read_idx, read_npz, validate_labels

__all__ = [
    "Dataset",
    "Evaluation",
    "Examples",
    "Normalization",
    "augment",
    "batches",
    "evaluate",
    "load",
    "read_cifar",
    "read_csv",
    "read_idx",
    "read_npz",
    "split",
    "validate_labels",
]
