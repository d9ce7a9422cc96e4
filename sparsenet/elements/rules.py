"""N:M: at most n of every m consecutive inputs of an output are there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsenet.functional.blocks import zero_outside
from sparsenet.pattern import BlockPattern
from sparsenet.schedules import as_integer

__all__ = ["NM"]

_AT_ONCE = 1 << 18  # elements sorted at a time: some 5 MiB with the indices of the sort


@dataclass(frozen=True)
class NM:
    """The rule N:M of Mishra et al. (2021): of every m consecutive inputs of an output, n stay.

    Groups are counted along the inputs from 0, so none crosses the border of a block. Where fewer than n inputs of a
    group lie inside the matrix, those stay.

    Attributes:
        n: how many stay; 1 <= n < m.
        m: the size of a group, a divisor of the block size.

    Raises:
        ValueError: sizes that make no rule; TypeError: no integers.

    Example:
        >>> import torch, sparsenet as sn
        >>> rule = sn.NM(2, 4)
        >>> pattern = sn.BlockPattern([0, 1], [0], shape=(4, 4), block_size=4)
        >>> rule.mask(torch.tensor([[1.0, -3, 2, 0], [0, 0, 0, 0], [1, 2, 3, 4], [4, 3, 2, 1]])[None], pattern)[0].int()
        tensor([[0, 1, 1, 0],
                [1, 1, 0, 0],
                [0, 0, 1, 1],
                [1, 1, 0, 0]], dtype=torch.int32)
        >>> str(rule), sn.NM.parse("1:8")
        ('2:4', NM(n=1, m=8))
    """

    n: int
    m: int

    def __post_init__(self):
        n, m = as_integer("NM", "n", self.n, at_least=1), as_integer("NM", "m", self.m, at_least=2)
        if n >= m:
            raise ValueError(f"NM: n must lie in [1, m), got {n} of {m}")
        object.__setattr__(self, "n", n)
        object.__setattr__(self, "m", m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @classmethod
    def parse(cls, text: str) -> NM:
        """The rule that ``"2:4"`` names.

        Example:
            >>> import sparsenet as sn
            >>> sn.NM.parse("2:4")
            NM(n=2, m=4)
        """
        found = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text)
        if found is None:
            raise ValueError(f"NM: rule must read n:m as in 2:4, got {text!r}")
        return cls(int(found[1]), int(found[2]))

    def check(self, where: Any) -> None:
        """Raises unless the rule fits ``where``, a layer or a pattern: m divides its ``block_size``."""
        if where.block_size % self.m:
            raise ValueError(f"NM: m must divide the block size {where.block_size}, got {self.m}")

    def mask(self, scores: Tensor, pattern: BlockPattern) -> Tensor:
        """Bool [num_blocks, b, b]: the n elements of largest magnitude of every m, ties to the smaller index.

        Args:
            scores: [num_blocks, b, b], the values or any other scores, whose magnitude counts.
            pattern: of the blocks; what lies outside its matrix is False.

        Raises:
            ValueError: another shape, NaN, or a block size that m does not divide.
        """
        self.check(pattern)
        if tuple(scores.shape) != pattern.values_shape:
            raise ValueError(f"NM: scores must have shape {list(pattern.values_shape)}, got {list(scores.shape)}")
        scores = scores.detach()
        if bool(scores.isnan().any()):
            raise ValueError("NM: scores must be numbers, got NaN")
        return self._largest(lambda some: scores[some].abs(), pattern)

    def random(self, pattern: BlockPattern, generator: torch.Generator | None = None) -> Tensor:
        """Bool [num_blocks, b, b]: n elements of every m at random, each set of n as likely as any other.

        Raises:
            ValueError: a block size that m does not divide.
        """
        self.check(pattern)
        b, device = pattern.block_size, pattern.device if generator is None else generator.device

        def drawn(some: slice) -> Tensor:
            blocks = len(range(*some.indices(pattern.num_blocks)))
            return torch.rand(blocks, b, b, generator=generator, device=device).to(pattern.device)

        return self._largest(drawn, pattern)

    def holds(self, mask: Tensor) -> bool:
        """Whether ``mask``, bool [num_blocks, b, b], has at most n of every m consecutive inputs.

        Raises:
            ValueError: a block size that m does not divide.
        """
        if mask.shape[2] % self.m:
            raise ValueError(f"NM: m must divide the block size {mask.shape[2]}, got {self.m}")
        return all(
            bool((mask[some].unflatten(2, (-1, self.m)).sum(3, dtype=torch.uint8) <= self.n).all())
            for some in _chunks(len(mask), mask.shape[2])
        )

    def as_tensor(self) -> Tensor:
        """Uint8 [2]: n and m, as state dicts keep them."""
        return torch.tensor([self.n, self.m], dtype=torch.uint8, device="cpu")

    def _largest(self, scores_of: Callable[[slice], Tensor], pattern: BlockPattern) -> Tensor:
        """The mask of some blocks after the other; ``scores_of`` hands over fresh ones, none below zero."""
        mask = torch.zeros(pattern.values_shape, dtype=torch.bool, device=pattern.device)
        tail = pattern.shape[1] % pattern.block_size
        for some in _chunks(pattern.num_blocks, pattern.block_size):
            scores = scores_of(some)
            if tail:  # inputs beyond the matrix stay only where too few are inside
                scores[pattern.col[some] == pattern.block_cols - 1, :, tail:] = -1.0
            order = scores.unflatten(2, (-1, self.m)).argsort(dim=3, descending=True, stable=True)
            mask[some].unflatten(2, (-1, self.m)).scatter_(3, order[..., : self.n], True)
        zero_outside(mask, pattern)
        return mask


def _chunks(num_blocks: int, block_size: int) -> Iterator[slice]:
    step = max(1, _AT_ONCE // block_size**2)
    return (slice(begin, begin + step) for begin in range(0, num_blocks, step))
