"""Which elements of the stored blocks are there: N:M and unstructured masks, and torch's own 2:4 format."""

from sparsenet.elements.export import to_semi_structured
from sparsenet.elements.masks import largest_elements, random_elements
from sparsenet.elements.rules import NM

__all__ = ["NM", "largest_elements", "random_elements", "to_semi_structured"]
