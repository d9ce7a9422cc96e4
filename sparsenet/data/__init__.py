"""Data sets in memory: found or downloaded, checked, split, handed out in normalised batches; models judged by them."""

from sparsenet.data.augmentation import augment
from sparsenet.data.datasets import Dataset, Normalization, batches, load, split, validate_labels
from sparsenet.data.examples import Evaluation, Examples, evaluate

__all__ = [
    "Dataset",
    "Evaluation",
    "Examples",
    "Normalization",
    "augment",
    "batches",
    "evaluate",
    "load",
    "split",
    "validate_labels",
]
