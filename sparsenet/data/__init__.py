"""Data sets in memory: found or downloaded, checked, split, and handed out in normalised batches."""

from sparsenet.data.augmentation import augment
from sparsenet.data.datasets import Dataset, Normalization, batches, load, split, validate_labels

__all__ = ["Dataset", "Normalization", "augment", "batches", "load", "split", "validate_labels"]
