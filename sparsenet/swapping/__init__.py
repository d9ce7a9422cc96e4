"""What swapping a model's Linear layers is made of: what is refused, and the report of what was done."""

from sparsenet.swapping.report import SparsifyReport, SwappedLayer

__all__ = ["SparsifyReport", "SwappedLayer"]
