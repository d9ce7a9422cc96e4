"""What torchrun and DistributedDataParallel lack for changing topologies. Patterns are replicated on every rank.

At a rewire the norms of per-rank gradients must not be averaged: the ranks gather the layer's input and output gradient
(global batch x features), each scores a slice of the block rows, and the best places are gathered: exact RigL with
bounded memory. Every rank then decides alike; fingerprints are compared, and a mismatch stops with the layer's name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from sparsenet import functional
from sparsenet.elements import NM
from sparsenet.layers import SparseLinear, plain_name, sparse_layers
from sparsenet.pattern import BlockPattern

__all__ = ["DataParallel", "assert_same_topology", "synchronize"]


def is_active() -> bool:
    """Whether more than one rank trains together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """How many ranks train together."""
    return dist.get_world_size() if is_active() else 1


class DataParallel(nn.Module):
    """DistributedDataParallel that survives a change of the number of blocks: the wrapper is then built anew.

    Args:
        module: on this rank's device; topology and parameters are taken from rank 0 first.
        kwargs: for DistributedDataParallel.

    Example:
        >>> import torch, torch.distributed as dist, sparsenet as sn
        >>> store = dist.HashStore()   # a script started by torchrun calls init_process_group() alone
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> model = sn.distributed.DataParallel(sn.SparseMLP([64, 64, 10], density=0.5, block_size=8))
        >>> model(torch.randn(3, 64)).shape
        torch.Size([3, 10])
        >>> dist.destroy_process_group()
    """

    def __init__(self, module: nn.Module, **kwargs):
        super().__init__()
        synchronize(module)
        self.module = module
        self._kwargs = kwargs
        self.rebuild()

    def rebuild(self) -> None:
        """Makes the inner wrapper anew; every rank must call it."""
        self.__dict__["_wrapped"] = None  # the old reducer takes its hooks with it
        self.__dict__["_wrapped"] = DistributedDataParallel(self.module, **self._kwargs)

    def forward(self, *args, **kwargs):
        """The module's forward, with gradients averaged over ranks in backward."""
        return self.__dict__["_wrapped"](*args, **kwargs)


def wrapper_path(model: nn.Module) -> str:
    """Where in ``model`` the network itself is: ``module._orig_mod.``, or nothing where nothing wraps it."""
    if "_orig_mod" in model._modules:  # torch.compile
        return "_orig_mod." + wrapper_path(model._orig_mod)
    if isinstance(model, (DistributedDataParallel, DataParallel, nn.DataParallel, AveragedModel)):
        return "module." + wrapper_path(model.module)
    return ""


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``, DDP, ``nn.DataParallel``, AveragedModel and :class:`DataParallel`.

    They may be nested in any order; a model that nothing wraps is itself.
    """
    for name in wrapper_path(model).split(".")[:-1]:
        model = getattr(model, name)
    return model


def unwrapped_name(model: nn.Module, name: str) -> str:
    """A name in ``model`` as it would be without wrappers; what belongs to a wrapper itself has its last name."""
    for part in wrapper_path(model).split(".")[:-1]:
        if not name.startswith(f"{part}."):
            break
        name = name.removeprefix(f"{part}.")
    return plain_name(name)


def check_resizable(model: nn.Module, layer: str) -> None:
    """Refuses a change of the number of blocks that DistributedDataParallel's buckets would not survive."""
    if isinstance(model, DistributedDataParallel) or (is_active() and not isinstance(model, DataParallel)):
        raise RuntimeError(
            f"Sparsifier: the number of blocks of layer {layer} must not change under DistributedDataParallel; "
            "wrap the model with sparsenet.distributed.DataParallel and give that to the Sparsifier"
        )


def rebuild(model: nn.Module) -> None:
    """Rebuilds the wrapper, if it is ours."""
    if isinstance(model, DataParallel):
        model.rebuild()


def synchronize(model: nn.Module) -> None:
    """Gives every rank the topology, element masks and parameters of rank 0. A no-op with a single rank.

    Example:
        >>> import sparsenet as sn
        >>> model = sn.SparseMLP([64, 64, 10], density=0.5, block_size=8)
        >>> sn.distributed.synchronize(model)   # with one rank there is nothing to do
    """
    if not is_active():
        return
    for layer in sparse_layers(model).values():
        crow, col = layer.pattern.crow_indices, layer.pattern.col_indices
        count = torch.tensor([len(col)], device=crow.device)
        dist.broadcast(count, 0)
        dist.broadcast(crow, 0)
        col = col if dist.get_rank() == 0 else crow.new_empty(int(count))
        dist.broadcast(col, 0)
        pattern = BlockPattern(crow, col, layer.pattern.shape, layer.block_size)
        if pattern.fingerprint != layer.pattern.fingerprint:
            layer.set_pattern(pattern)
        _synchronize_mask(layer)
    for tensor in [*model.parameters(), *model.buffers()]:
        dist.broadcast(tensor.detach(), 0)


def _synchronize_mask(layer: SparseLinear) -> None:
    """Gives a layer whose pattern is that of rank 0 the element mask and the rule of rank 0 as well."""
    mask, rule = layer.element_mask, layer.elements
    told = torch.tensor([mask is not None, rule.n if rule else 0, rule.m if rule else 0], device=layer.pattern.device)
    dist.broadcast(told, 0)
    masked, n, m = told.tolist()
    if masked:
        mask = torch.ones_like(layer.values, dtype=torch.bool) if mask is None else mask
        dist.broadcast(mask.view(torch.uint8), 0)
    if dist.get_rank() and (masked or mask is not None):
        rule = NM(n, m) if n else None
        layer._install(layer.pattern.copy(), layer.values.detach(), mask if masked else None, rule)


def assert_same_topology(model: nn.Module) -> None:
    """Stops every rank, with the layer's name, when patterns or element masks differ between ranks.

    Example:
        >>> import sparsenet as sn
        >>> model = sn.SparseMLP([64, 64, 10], density=0.5, block_size=8)
        >>> sn.distributed.assert_same_topology(model)   # a single rank always agrees with itself
    """
    for name, layer in sparse_layers(unwrap(model)).items():
        assert_same(f"the topology of layer {name}", int(layer.pattern.fingerprint[:15], 16) ^ _mask_number(layer))


def _mask_number(layer: SparseLinear) -> int:
    """Below 2^60; equal masks have equal numbers, and no mask has 0."""
    bits = layer.topology.mask_bits
    return 0 if bits is None else int(hashlib.sha256(bits.numpy(force=True).tobytes()).hexdigest()[:15], 16)


def assert_same(what: str, number: int) -> None:
    """Stops every rank when ``number`` (below 2^63) differs between ranks."""
    if not is_active():
        return
    mine = torch.tensor([number], dtype=torch.int64, device=_device())
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    seen = [int(n) for n in everyone]
    if len(set(seen)) > 1:
        differ = [rank for rank, n in enumerate(seen) if n != seen[0]]
        raise RuntimeError(f"sparsenet: {what} must be the same on every rank, rank {differ[0]} differs from rank 0")


def share_of(block_rows: int) -> tuple[int, int]:
    """The block rows that this rank scores."""
    if not is_active():
        return 0, block_rows
    rank, world = dist.get_rank(), dist.get_world_size()
    return rank * block_rows // world, (rank + 1) * block_rows // world


def gather_operands(x: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    """Every rank's rows of both, in rank order; gradients scaled as DDP's average scales them."""
    return _gather_rows(x), _gather_rows(grad_output) / dist.get_world_size()


def gathered(t: Tensor) -> Tensor:
    """Every rank's rows of ``t``, in rank order; ``t`` itself with a single rank."""
    return _gather_rows(t) if is_active() else t


def gather_best(places: Tensor, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` best of all ranks' best places, ascending."""
    if not is_active():
        return places, scores
    places, scores = _gather_rows(places), _gather_rows(scores)  # ranks score ascending slices: still ascending
    kept = functional.select_extreme(scores, min(count, len(scores)), largest=True)
    return places[kept], scores[kept]


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is true on at least one rank."""
    if not is_active():
        return flag
    seen = torch.tensor([int(flag)], device=_device())
    dist.all_reduce(seen, dist.ReduceOp.MAX)
    return bool(seen)


def largest(numbers: Sequence[int]) -> list[int]:
    """Each of the numbers, the largest that any rank has."""
    if not is_active():
        return list(numbers)
    seen = torch.tensor(numbers, dtype=torch.int64, device=_device())
    dist.all_reduce(seen, dist.ReduceOp.MAX)
    return seen.tolist()


def highest(numbers: Sequence[float]) -> list[float]:
    """Each of the numbers, the largest that any rank has; they may be infinite."""
    if not is_active():
        return list(numbers)
    seen = torch.tensor(numbers, dtype=torch.float64, device=_device())
    dist.all_reduce(seen, dist.ReduceOp.MAX)
    return seen.tolist()


def mean_of(numbers: Sequence[float]) -> list[float]:
    """Each of the numbers, its mean over the ranks."""
    if not is_active():
        return list(numbers)
    return averaged(torch.tensor(numbers, dtype=torch.float64)).tolist()


def averaged(t: Tensor) -> Tensor:
    """The mean of ``t`` over the ranks, as DDP averages gradients; on the device of ``t``."""
    if not is_active():
        return t
    total = t.to(_device(), copy=True)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).to(t.device)


def _gather_rows(t: Tensor) -> Tensor:
    """Concatenates tensors that may differ in their first size over the ranks."""
    world = dist.get_world_size()
    length = torch.tensor([len(t)], dtype=torch.int64, device=_device())
    lengths = [torch.empty_like(length) for _ in range(world)]
    dist.all_gather(lengths, length)
    sizes = [int(n) for n in lengths]
    padded = t.new_zeros(max(sizes), *t.shape[1:])
    padded[: len(t)] = t
    everyone = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(everyone, padded)
    return torch.cat([part[:n] for part, n in zip(everyone, sizes, strict=True)])


def _device() -> torch.device:
    """Where collectives of the current backend run."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
