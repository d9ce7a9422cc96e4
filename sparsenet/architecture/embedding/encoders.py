"""Encoders: from a batch of small networks to one vector each.

``probe`` (default) runs the network on 64 learned inputs and reads what comes out: blind to the order of neurons and to
the architecture by construction, and the measured winner. ``conv`` is the paper's: convolutions over the padded matrix,
one encoder per depth, joined with zeros for the depths that do not apply (arXiv 2410.08339). ``graph`` passes messages
along the weights, so it sees the parameters and is still blind to the order of neurons (cf. Navon et al. 2023; Kofinas
et al. 2024). ``transformer`` reads one token per neuron row (SWAT-NN, arXiv 2506.08270).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from sparsenet.architecture.embedding.codec import MIXED, NetworkBatch, NetworkSpace, to_matrix

__all__ = ["ENCODERS", "ConvEncoder", "GraphEncoder", "ProbeEncoder", "ResidualBlock", "TransformerEncoder"]


def perceptron(sizes: list[int], activation: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    """Linear layers of these sizes with an activation between them, Xavier-uniform, biases zero."""
    layers: list[nn.Module] = []
    for inp, out in pairwise(sizes):
        linear = nn.Linear(inp, out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, activation()]
    return nn.Sequential(*layers[:-1])


class ProbeEncoder(nn.Module):
    """The outputs on ``probes`` learned inputs, through a perceptron: [n] networks -> [n, latent]."""

    def __init__(self, space: NetworkSpace, latent: int, hidden: int = 512, probes: int = 64):
        super().__init__()
        self.probes = nn.Parameter(torch.rand(probes, space.inputs) * 2 - 1)
        self.read = perceptron([probes, hidden, hidden, latent])

    def forward(self, nets: NetworkBatch) -> Tensor:
        """[n] networks -> [n, latent]."""
        return self.read_outputs(nets.outputs(self.probes))

    def read_outputs(self, y: Tensor) -> Tensor:
        """Outputs at the probes [n, probes] -> [n, latent]; also serves data that no network made."""
        return self.read(y)


class ResidualBlock(nn.Module):
    """conv3x3 - LeakyReLU - conv3x3, plus a shortcut (1x1 where the shape changes), then LeakyReLU.

    Without BatchNorm: the reference has it on the shortcut and encodes one network at a time (defect 6).
    """

    def __init__(self, inp: int, out: int, stride: int = 1):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(inp, out, 3, stride, 1), nn.LeakyReLU(0.01), nn.Conv2d(out, out, 3, padding=1)
        )
        same = inp == out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inp, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[n, inp, h, w] -> [n, out, ceil(h / stride), ceil(w / stride)]."""
        return nn.functional.leaky_relu(self.main(x) + self.shortcut(x), 0.01)


def conv_features(space: NetworkSpace, depth: int) -> tuple[int, int]:
    """Rows and columns of the paper's feature map for ``depth``, after two halvings."""
    return -(-space.width // 4), -(-((space.width + 1) * depth + 1) // 4)


class ConvEncoder(nn.Module):
    """The paper's multi-scale encoder: sizes 768, 1280, 1792, 2304 joined, then 6144 -> 512 -> 256 -> latent."""

    def __init__(self, space: NetworkSpace, latent: int, hidden: int = 512):
        super().__init__()
        self.space = space
        self.scales = nn.ModuleList()
        self.sizes = []
        for depth in range(1, space.max_depth + 1):
            blocks = [nn.Conv2d(1, 32, 3, padding=1), nn.LeakyReLU(0.01), ResidualBlock(32, 64, 2)]
            blocks += [ResidualBlock(64, 128, 2), ResidualBlock(128, 128), nn.Flatten()]
            self.scales.append(nn.Sequential(*blocks))
            rows, cols = conv_features(space, depth)
            self.sizes.append(128 * rows * cols)
        self.join = perceptron([sum(self.sizes), hidden, hidden // 2, latent], lambda: nn.LeakyReLU(0.01))

    def forward(self, nets: NetworkBatch) -> Tensor:
        """[n] networks -> [n, latent]."""
        own = self.scales[nets.depth - 1](to_matrix(nets).unsqueeze(1))
        before, after = sum(self.sizes[: nets.depth - 1]), sum(self.sizes[nets.depth :])
        return self.join(nn.functional.pad(own, (before, after)))


class GraphEncoder(nn.Module):
    """Message passing over neurons, equivariant to their order; a sum over neurons makes it invariant.

    A node starts from what its neuron computes on learned inputs (probe features, Kofinas et al. 2024; without them
    training takes far longer), its bias and activation. States [n, neurons, features] are updated ``rounds`` times from
    ``W_l h_{l}`` (what flows in), ``W_{l+1}^T h_{l+2}`` (what flows back) and themselves.
    """

    def __init__(self, space: NetworkSpace, latent: int, hidden: int = 64, rounds: int = 2, probes: int = 32):
        super().__init__()
        self.probes = nn.Parameter(torch.rand(probes, space.inputs) * 2 - 1)
        self.seen = nn.Linear(probes, hidden)
        extras = int(space.bias) + (3 if space.activation == MIXED else 0)
        self.own = nn.Linear(1 + extras, hidden)
        self.rounds = nn.ModuleList(perceptron([3 * hidden, hidden, hidden]) for _ in range(rounds))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(rounds))
        self.places = nn.Parameter(torch.randn(space.max_depth + 2, hidden) * 0.1)
        self.read = perceptron([(space.max_depth + 2) * hidden, 8 * hidden, latent])
        self.max_depth = space.max_depth

    def forward(self, nets: NetworkBatch) -> Tensor:
        """[n] networks -> [n, latent]."""
        net, n, depth = nets.effective(), len(nets), nets.depth
        *hidden, output = net.signals(self.probes)
        states = [self.seen(self.probes.t()).expand(n, -1, -1)]
        states += [self.seen(signal.asinh()) + self._own(net, layer) for layer, signal in enumerate(hidden)]
        states.append(self.seen(output.asinh()))
        alive = [None, *net.neurons.unbind(1), None]
        gains = [w / w.abs().amax((1, 2), keepdim=True).clamp(min=1e-6) for w in net.weights]
        for update, norm in zip(self.rounds, self.norms, strict=True):
            fresh = []
            for at, own in enumerate(states):
                into = torch.bmm(gains[at - 1], states[at - 1]) if at else torch.zeros_like(own)
                back = torch.bmm(gains[at].transpose(1, 2), states[at + 1]) if at <= depth else torch.zeros_like(own)
                moved = norm(own + update(torch.cat([own + self.places[at], into, back], 2)))
                fresh.append(moved if alive[at] is None else moved * alive[at][:, :, None])
            states = fresh
        pooled = [s.sum(1) for s in states]
        gap = [torch.zeros_like(pooled[0])] * (self.max_depth - depth)
        return self.read(torch.cat([*pooled[:-1], *gap, pooled[-1]], 1))

    def _own(self, net: NetworkBatch, layer: int) -> Tensor:
        """[n, width, hidden]: existence, bias, activation of the neurons of one layer."""
        parts = [net.neurons[:, layer, :, None]]
        if net.biases is not None:
            parts.append(net.biases[layer][:, :, None])
        if net.mixture is not None:
            parts.append(net.mixture[:, layer])
        return self.own(torch.cat(parts, 2))


def row_columns(space: NetworkSpace, depth: int) -> int:
    """Columns of SWAT-NN's row form: per hidden layer weights, bias, activation logits; the last layer; L masks."""
    per_layer = space.width + int(space.bias) + (3 if space.activation == MIXED else 0)
    return depth * per_layer + space.width + int(space.bias) + depth


def to_rows(nets: NetworkBatch) -> Tensor:
    """[n, width, row_columns]: row i holds what belongs to neuron i of each layer."""
    net, width, parts = nets.effective(), nets.space.width, []
    for layer, weight in enumerate(net.weights):
        parts.append(nn.functional.pad(weight, (0, width - weight.shape[2], 0, width - weight.shape[1])))
        if net.biases is not None:
            bias = net.biases[layer]
            parts.append(nn.functional.pad(bias, (0, width - bias.shape[1])).unsqueeze(2))
        if net.mixture is not None and layer < net.depth:
            parts.append(net.mixture[:, layer])
    return torch.cat([*parts, net.neurons.transpose(1, 2)], 2)


class TransformerEncoder(nn.Module):
    """SWAT-NN's encoder: one token per neuron row, values and a validity channel, pre-norm blocks.

    A row also holds what its neurons and the network compute on learned inputs, as in :class:`GraphEncoder`.
    ``latent`` is split over the rows: [n, width, latent // width], flattened.
    """

    def __init__(self, space: NetworkSpace, latent: int, hidden: int = 128, blocks: int = 3, probes: int = 32):
        super().__init__()
        self.space, self.columns = space, row_columns(space, space.max_depth)
        self.probes = nn.Parameter(torch.rand(probes, space.inputs) * 2 - 1)
        self.enter = nn.Linear(2 * self.columns + (space.max_depth + 1) * probes, hidden)
        self.rows = nn.Parameter(torch.randn(space.width, hidden) * 0.02)
        self.blocks = transformer_blocks(hidden, blocks)
        self.leave = nn.Linear(hidden, latent // space.width)

    def forward(self, nets: NetworkBatch) -> Tensor:
        """[n] networks -> [n, latent]."""
        rows = to_rows(nets)
        missing = self.columns - rows.shape[2]
        valid = nn.functional.pad(torch.ones_like(rows), (0, missing))
        *hidden, output = nets.signals(self.probes)
        seen = torch.cat([output.expand(-1, self.space.width, -1), *hidden], 2).asinh()
        seen = nn.functional.pad(seen, (0, (self.space.max_depth - nets.depth) * len(self.probes)))
        tokens = self.enter(torch.cat([nn.functional.pad(rows.asinh(), (0, missing)), valid, seen], 2)) + self.rows
        return self.leave(self.blocks(tokens)).flatten(1)


def transformer_blocks(hidden: int, blocks: int) -> nn.Module:
    """Pre-norm self-attention blocks as in GPT-2, without a causal mask and without dropout."""
    layer = nn.TransformerEncoderLayer(hidden, 4, 4 * hidden, 0.0, "gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, blocks, nn.LayerNorm(hidden), enable_nested_tensor=False)


ENCODERS = {"probe": ProbeEncoder, "conv": ConvEncoder, "graph": GraphEncoder, "transformer": TransformerEncoder}
