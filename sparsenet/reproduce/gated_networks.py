"""The networks of the tri-state ReLU paper: LeNet-like, deep, and CaffeNet-shaped; and counting their parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparsenet.architecture.gates import TriStateReLU

__all__ = [
    "caffenet",
    "caffenet_parameters",
    "keep_variance_",
    "lenet",
    "lenet_parameters",
    "truncated_svd",
    "widths_of",
]

Learn = tuple[bool, bool]  # (widths, depth), as in the paper's tables


def lenet(
    widths: Sequence[int] = (20, 50, 500),
    learn: Sequence[Learn] = ((False, False), (False, False), (True, False)),
    classes: int = 10,
    generator: torch.Generator | None = None,
    map_start: float | str | None = None,
    **gate_options,
) -> nn.Sequential:
    """conv5x5-pool-conv5x5-pool-fc-...-fc for 28 x 28 images, a tri-state ReLU after each pool and hidden layer.

    Args:
        widths: of the two convolutions and of any number of hidden layers (none: the convolutions feed the output).
        learn: for each, whether its widths and its depth learn.
        classes: outputs. generator: draws the gates.
        map_start: where the width gates of the convolutions start; None: as TriStateReLU's.
        gate_options: for TriStateReLU; starts are for gates that learn.

    A ReLU commutes with max-pooling, so it stands behind it, where maps are four times smaller.
    """

    def act(i: int) -> TriStateReLU:
        width, depth = learn[i]
        options = {"width_start": map_start if i < 2 else gate_options.get("width_start")} if width else {}
        options |= {"depth_start": gate_options.get("depth_start", 0.0)} if depth else {}
        others = {k: v for k, v in gate_options.items() if k not in ("width_start", "depth_start")}
        return TriStateReLU(widths[i], width=width, depth=depth, generator=generator, **options, **others)

    parts: list[nn.Module] = [nn.Conv2d(1, widths[0], 5), nn.MaxPool2d(2), act(0)]
    parts += [nn.Conv2d(widths[0], widths[1], 5), nn.MaxPool2d(2), act(1), nn.Flatten()]
    inputs = 16 * widths[1]
    for i in range(2, len(widths)):
        parts += [nn.Linear(inputs, widths[i]), act(i)]
        inputs = widths[i]
    return nn.Sequential(*parts, nn.Linear(inputs, classes))


@torch.no_grad()
def keep_variance_(model: nn.Module) -> nn.Module:
    """Weights with variance 1 / fan-in, biases 0, in place; returns ``model``.

    A linear layer then passes its inputs' variance on, however deep (LeCun et al. 1998); that of PyTorch's layers,
    1 / (3 fan-in), divides it by three every time.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            nn.init.zeros_(layer.bias)
    return model


def widths_of(model: nn.Module) -> list[int]:
    """Outputs of the layers with weights, in order; layers that are gone are not counted."""
    return [m.weight.shape[0] for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def lenet_parameters(widths: Sequence[int], classes: int = 10) -> int:
    """Weights and biases of :func:`lenet` with these widths."""
    first, second, *rest = widths
    total = first * 26 + second * (25 * first + 1)
    inputs = 16 * second
    for width in (*rest, classes):
        total, inputs = total + width * (inputs + 1), width
    return total


def truncated_svd(linear: nn.Linear, rank: int) -> nn.Sequential:
    """A linear layer as two of ``rank`` in between, by its singular value decomposition."""
    u, s, v = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
    root = s[:rank].sqrt()
    down = nn.Linear(linear.in_features, rank, bias=False)
    up = nn.Linear(rank, linear.out_features)
    with torch.no_grad():
        down.weight.copy_(root.unsqueeze(1) * v[:rank])
        up.weight.copy_(u[:, :rank] * root)
        up.bias.copy_(linear.bias)
    return nn.Sequential(down, up)


CAFFENET = (96, 256, 384, 384, 256, 4096, 4096, 1000)
_CAFFENET_CONVOLUTIONS = ((3, 11, 1), (96, 5, 2), (256, 3, 1), (384, 3, 2), (384, 3, 2))  # inputs, kernel, groups


def caffenet_parameters(widths: Sequence[int] = CAFFENET) -> int:
    """Weights and biases of CaffeNet with these outputs per layer; convolutions 2, 4 and 5 are in two groups."""
    total, inputs = 0, 3
    for width, (_, kernel, groups) in zip(widths[:5], _CAFFENET_CONVOLUTIONS, strict=True):
        total += width * (inputs // groups * kernel**2 + 1)
        inputs = width
    inputs *= 36  # 6 x 6 maps
    for width in widths[5:]:
        total, inputs = total + width * (inputs + 1), width
    return total


def caffenet(widths: Sequence[int] = CAFFENET, image: int = 227, **gate_options) -> nn.Sequential:
    """A CaffeNet-shaped network (one group per convolution, so that units may leave) with gates on every hidden layer.

    ``image`` is the size of its square inputs, 227 as published; smaller ones make cheap tests of the mechanics.
    """
    plan = ((11, 4, 0, True), (5, 1, 2, True), (3, 1, 1, False), (3, 1, 1, False), (3, 1, 1, True))
    parts: list[nn.Module] = []
    inputs, size = 3, image
    for width, (kernel, stride, padding, pool) in zip(widths[:5], plan, strict=True):
        parts.append(nn.Conv2d(inputs, width, kernel, stride, padding))
        size = (size + 2 * padding - kernel) // stride + 1
        if pool:
            parts.append(nn.MaxPool2d(3, 2))
            size = (size - 3) // 2 + 1
        parts.append(TriStateReLU(width, depth=False, **gate_options))
        inputs = width
    parts.append(nn.Flatten())
    inputs *= size**2
    for width in widths[5:-1]:
        parts += [nn.Linear(inputs, width), TriStateReLU(width, **gate_options)]
        inputs = width
    return nn.Sequential(*parts, nn.Linear(inputs, widths[-1]))


def flops(model: nn.Module, x: Tensor) -> int:
    """Multiply-adds of one forward over ``x``, per example."""
    total = 0

    def count(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        nonlocal total
        places = math.prod(output.shape[2:]) if isinstance(module, nn.Conv2d) else 1
        total += module.weight.numel() * places

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    handles = [m.register_forward_hook(count) for m in layers]
    try:
        with torch.no_grad():
            model(x[:1])
    finally:
        for handle in handles:
            handle.remove()
    return total
