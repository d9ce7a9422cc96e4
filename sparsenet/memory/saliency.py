"""The memory that a policy's measurements of a layer take."""

from __future__ import annotations

from sparsenet.policies import Policy
from sparsenet.saliency.fisher import WORKSPACE_BYTES
from sparsenet.saliency.woodfisher import SIZE

__all__ = ["kept_bytes", "measuring_bytes", "pass_bytes", "surgeon_bytes"]


def kept_bytes(policy: Policy, shape: tuple[int, int], batch_size: int) -> int:
    """Bytes of the rows of a layer (out, in) that are kept from the backward pass to the rewire.

    Example:
        >>> import sparsenet as sn
        >>> from sparsenet.memory.saliency import kept_bytes
        >>> kept_bytes(sn.WoodFisher(rows=100), (10, 20), 256), kept_bytes(sn.OBD(), (10, 20), 256)
        (12000, 0)
    """
    return min(policy.kept_rows, batch_size) * sum(shape) * 4


def measuring_bytes(policy: Policy, shape: tuple[int, int], block_size: int, blocks: int, batch_size: int) -> int:
    """Bytes beside the operands while a backward pass through a layer is measured.

    Example:
        >>> import sparsenet as sn
        >>> from sparsenet.memory.saliency import measuring_bytes
        >>> measuring_bytes(sn.RigL(), (64, 64), 16, 8, 32), measuring_bytes(sn.OBD(), (64, 64), 16, 8, 32) > 0
        (0, True)
    """
    if not (policy.observes or policy.measures):
        return 0
    operands = 3 * batch_size * sum(shape) * 4  # squares, and a product before
    products = min(WORKSPACE_BYTES, 3 * blocks * block_size * min(batch_size, 1024) * 4)
    return operands + max(products, 3 * blocks * block_size**2 * 4)


def pass_bytes(policy: Policy, weights: int, activations: int) -> int:
    """Bytes of a pass over the model that a policy runs at the rewire, by those of all values and of a step's forward.

    Example:
        >>> import sparsenet as sn
        >>> from sparsenet.memory.saliency import pass_bytes
        >>> pass_bytes(sn.RigL(), 100, 10), pass_bytes(sn.SynFlow(), 100, 10), pass_bytes(sn.GraSP(), 100, 10)
        (0, 500, 630)
    """
    copies, times = (getattr(policy, name, 0) for name in ("pass_copies", "pass_activations"))
    return copies * weights + times * activations


def surgeon_bytes(policy: Policy, shape: tuple[int, int], block_size: int, blocks: int, batch_size: int) -> int:
    """Bytes at the rewire of a layer whose kept rows are made into Fisher matrices, the adjusted values included.

    Example:
        >>> import sparsenet as sn
        >>> from sparsenet.memory.saliency import surgeon_bytes
        >>> surgeon_bytes(sn.OBD(), (64, 64), 16, 8, 32), surgeon_bytes(sn.WoodFisher(), (64, 64), 16, 8, 32) > 0
        (0, True)
    """
    if not policy.kept_rows:
        return 0
    rows, side = min(policy.kept_rows, batch_size), max(SIZE, 2 * block_size if block_size == 32 else block_size)
    group = block_size * side * (min(rows, 256) + 4 * side) * 8
    groups = max(1, min(WORKSPACE_BYTES // group, -(-blocks * block_size // side) + shape[0] // block_size))
    return rows * sum(shape) * 8 + 3 * blocks * block_size**2 * 4 + 4 * groups * group
