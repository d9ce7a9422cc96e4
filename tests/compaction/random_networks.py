"""Networks of random architecture with random dead units, for the tests of compaction and folding."""

from __future__ import annotations

import random

import torch
from torch import nn

import sparsenet as sn


class Residual(nn.Module):
    """x + branch(x)."""

    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return x + self.branch(x)


class Concat(nn.Module):
    """Two branches side by side."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x)], 1)


class Gated(nn.Module):
    """a(x) * sigmoid(b(x))."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x):
        return self.a(x) * torch.sigmoid(self.b(x))


class Pooled(nn.Module):
    """The mean over places."""

    def forward(self, x):
        return x.mean((2, 3))


class Viewed(nn.Module):
    """Flattening as it is often written."""

    def forward(self, x):
        return x.view(x.size(0), -1)


def linear(rng: random.Random, n: int, out: int, family: str) -> nn.Module:
    """A dense or block-sparse layer, some without bias, some masked."""
    bias = rng.random() < 0.8
    if family == "dense" or (family == "mixed" and rng.random() < 0.5):
        return nn.Linear(n, out, bias)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    b = rng.choice([1, 4, 8])
    activation = rng.choice(["none", "none", "relu", "silu"])
    layer = sn.SparseLinear(
        n, out, bias, density=rng.choice([0.3, 0.7, 1.0]), block_size=b, activation=activation, generator=generator
    )
    if rng.random() < 0.2:
        mask = torch.rand(layer.values.shape, generator=generator) < 0.4
        layer = sn.SparseLinear(n, out, bias, pattern=layer.pattern, element_mask=mask, generator=generator)
    return layer


def activation(rng: random.Random, n: int) -> nn.Module:
    kind = rng.randrange(8)
    if kind < 3:
        return sn.TriStateReLU(n)
    return [nn.ReLU(), nn.Tanh(), nn.SiLU(), nn.PReLU(n), nn.Sigmoid()][kind - 3]


def dense_block(rng: random.Random, n: int, family: str, depth: int = 0) -> tuple[nn.Module, int]:
    """A piece of an MLP on [batch, n], and its width."""
    kind = rng.choice(["layer", "layer", "residual", "concat", "gated"]) if depth < 2 else "layer"
    if kind == "residual":
        inner, width = dense_block(rng, n, family, depth + 1)
        return Residual(nn.Sequential(inner, linear(rng, width, n, family))), n
    if kind == "concat":
        (a, p), (b, q) = dense_block(rng, n, family, depth + 1), dense_block(rng, n, family, depth + 1)
        return Concat(a, b), p + q
    out = rng.randint(1, 20)
    if kind == "gated":
        return Gated(linear(rng, n, out, family), linear(rng, n, out, family)), out
    norm = rng.choice([None, None, nn.BatchNorm1d, nn.LayerNorm])
    parts = [linear(rng, n, out, family), *([norm(out)] if norm else []), activation(rng, out)]
    return nn.Sequential(*parts, *([nn.Dropout(0.0)] if rng.random() < 0.3 else [])), out


def conv_block(rng: random.Random, n: int, depth: int = 0) -> tuple[nn.Module, int]:
    """A piece of a CNN that keeps the size of maps, and its channels."""
    kind = rng.choice(["layer", "layer", "residual", "concat", "depthwise"]) if depth < 2 else "layer"
    if kind == "residual":
        inner, width = conv_block(rng, n, depth + 1)
        return Residual(nn.Sequential(inner, nn.Conv2d(width, n, 1, bias=rng.random() < 0.7))), n
    if kind == "concat":
        (a, p), (b, q) = conv_block(rng, n, depth + 1), conv_block(rng, n, depth + 1)
        return Concat(a, b), p + q
    if kind == "depthwise":
        return nn.Sequential(nn.Conv2d(n, n, 3, padding=1, groups=n), activation(rng, n)), n
    out = rng.randint(1, 7)
    mode = rng.choice(["zeros", "zeros", "reflect"])
    conv = nn.Conv2d(n, out, 3, padding=1, bias=rng.random() < 0.7, padding_mode=mode)
    return nn.Sequential(conv, *([nn.BatchNorm2d(out)] if rng.random() < 0.5 else []), activation(rng, out)), out


def random_network(seed: int, family: str, dtype=torch.float64) -> tuple[nn.Module, torch.Tensor]:
    """A network of ``family`` (dense, block_sparse, mixed, cnn) with random dead units, and an input for it."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    parts: list[nn.Module] = []
    n = rng.randint(2, 12)
    x = torch.randn(12, n, dtype=dtype)
    if family == "cnn":
        n = rng.randint(1, 3)
        x = torch.randn(12, n, 7, 7, dtype=dtype)
        first = rng.randint(2, 6)
        parts.append(nn.Conv2d(n, first, 3))
        n = first
        for _ in range(rng.randint(1, 3)):
            block, n = conv_block(rng, n)
            parts.append(block)
        places = 25
        if rng.random() < 0.7:
            parts.append(rng.choice([nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AvgPool2d(2, padding=1)]))
            places = 9 if isinstance(parts[-1], nn.AvgPool2d) and parts[-1].padding else 4
        if rng.random() < 0.4:
            parts.append(rng.choice([Pooled(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())]))
        else:
            parts.append(rng.choice([nn.Flatten(), Viewed()]))
            n *= places
    for _ in range(rng.randint(1, 3)):
        block, n = dense_block(rng, n, "mixed" if family == "cnn" else family)
        parts.append(block)
    model = nn.Sequential(*parts, linear(rng, n, 3, "dense")).to(dtype)
    settle(model, x)
    kill(model, rng)
    return model, x


def settle(model: nn.Module, x: torch.Tensor) -> None:
    """Running statistics, biases and gains of no special value."""
    model.train()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.rand_like(p))
        for _ in range(3):
            model(x + 0.1 * torch.randn_like(x))


@torch.no_grad()
def kill(model: nn.Module, rng: random.Random) -> None:
    """Closes gates and zeroes rows, columns, biases and gains at random."""
    share = rng.choice([0.0, 0.2, 0.5, 0.9])
    for m in model.modules():
        if isinstance(m, sn.TriStateReLU):
            m.width_gate.copy_((torch.rand(m.num_features) >= share).to(m.width_gate))
        elif isinstance(m, sn.SparseLinear):
            dead = torch.rand(m.out_features) < 0.4 * share
            padded = nn.functional.pad(dead, (0, -len(dead) % m.block_size)).reshape(-1, m.block_size)
            m.values[padded[m.pattern.row_indices.long()]] = 0
        elif isinstance(m, nn.Linear | nn.Conv2d):
            m.weight[torch.rand(len(m.weight)) < 0.3 * share] = 0
            m.weight[:, torch.rand(m.weight.shape[1]) < 0.3 * share] = 0
        elif isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm):
            m.weight[torch.rand(len(m.weight)) < 0.3 * share] = 0
        if isinstance(getattr(m, "bias", None), torch.Tensor):
            m.bias[torch.rand(len(m.bias)) < 0.2] = 0
