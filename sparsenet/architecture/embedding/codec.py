"""Small MLPs as batches of tensors: evaluate many at once, write them as the paper's matrix, hand one over as a module.

Huang, Montazerin, Srivastava, "Simultaneous Weight and Architecture Optimization for Neural Networks"
(arXiv 2410.08339) embed MLPs of 3 inputs, 1 output, at most 7 neurons a layer and 1 to 4 hidden layers, without biases.
A batch holds networks of *one* depth, padded to the full width; which neurons exist is a mask. Signals are kept as
[networks, neurons, samples], so that the long dimension is the contiguous one in every matmul and activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from sparsenet.schedules import as_integer

__all__ = ["ACTIVATIONS", "MIXED", "NetworkBatch", "NetworkSpace", "ScaledOutput", "from_matrix", "to_matrix"]

# name -> function of a tensor, and the module of the network that is handed over
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[], nn.Module]]] = {
    "sigmoid": (torch.sigmoid, nn.Sigmoid),
    "leaky_relu": (lambda a: nn.functional.leaky_relu(a, 0.1), lambda: nn.LeakyReLU(0.1)),
    "linear": (lambda a: a, nn.Identity),
    "tanh": (torch.tanh, nn.Tanh),
}
MIXED = "mixed"  # every neuron has its own mixture of sigmoid, tanh and leaky ReLU (slope 0.01), SWAT-NN's form


@dataclass(frozen=True)
class NetworkSpace:
    """Bounds of the embedded networks: one output, ``inputs`` inputs, up to ``max_depth`` hidden layers of ``width``.

    ``activation``: ``sigmoid``, ``leaky_relu`` (slope 0.1), ``linear``, ``tanh``, or ``mixed`` (one per neuron).
    Raises ValueError for sizes below 1, more inputs than ``width``, or an unknown activation.

    Example:
        >>> from sparsenet.architecture.embedding import NetworkSpace
        >>> NetworkSpace(inputs=2, activation="tanh").max_depth
        4
        >>> NetworkSpace(inputs=8, width=7)
        Traceback (most recent call last):
        ValueError: NetworkSpace: inputs must be at most width 7, got 8
    """

    inputs: int = 3
    width: int = 7
    max_depth: int = 4
    activation: str = "leaky_relu"
    bias: bool = False

    def __post_init__(self) -> None:
        for name in ("inputs", "width", "max_depth"):
            object.__setattr__(self, name, as_integer("NetworkSpace", name, getattr(self, name), at_least=1))
        if self.inputs > self.width:
            raise ValueError(f"NetworkSpace: inputs must be at most width {self.width}, got {self.inputs}")
        if self.activation not in (*ACTIVATIONS, MIXED):
            known = ", ".join([*ACTIVATIONS, MIXED])
            raise ValueError(f"NetworkSpace: activation must be one of {known}, got {self.activation!r}")

    def shapes(self, depth: int) -> list[tuple[int, int]]:
        """(out, in) of the ``depth + 1`` weight matrices, padded to the full width."""
        if not 1 <= depth <= self.max_depth:
            raise ValueError(f"NetworkSpace: depth must lie in [1, {self.max_depth}], got {depth}")
        return [(self.width, self.inputs), *[(self.width, self.width)] * (depth - 1), (1, self.width)]

    def vector_size(self, depth: int) -> int:
        """Numbers that describe a network of ``depth``: weights, neuron mask, then biases and activations if any."""
        size = sum(out * inp for out, inp in self.shapes(depth)) + depth * self.width
        if self.bias:
            size += depth * self.width + 1
        return size + (3 * depth * self.width if self.activation == MIXED else 0)


@dataclass(frozen=True, eq=False)
class NetworkBatch:
    """``n`` networks of one depth L.

    Attributes:
        space: their bounds.
        weights: L + 1 tensors [n, out, in].
        neurons: [n, L, width], 1 where a hidden neuron exists, else 0 (soft during training).
        biases: None, or L + 1 tensors [n, out].
        mixture: None, or [n, L, width, 3]: the share of sigmoid, tanh, leaky ReLU of each neuron.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.embedding import NetworkBatch, NetworkSpace
        >>> space = NetworkSpace(inputs=1, width=2, activation="linear")   # y = 3 (2 x) + 1 (1 x) = 7 x
        >>> weights = (torch.tensor([[[2.0], [1.0]]]), torch.tensor([[[3.0, 1.0]]]))
        >>> NetworkBatch(space, weights, torch.ones(1, 1, 2)).outputs(torch.tensor([[1.0], [2.0]]))
        tensor([[ 7., 14.]])
    """

    space: NetworkSpace
    weights: tuple[Tensor, ...]
    neurons: Tensor
    biases: tuple[Tensor, ...] | None = None
    mixture: Tensor | None = None

    def __len__(self) -> int:
        return len(self.neurons)

    @property
    def depth(self) -> int:
        """Number of hidden layers."""
        return len(self.weights) - 1

    def outputs(self, x: Tensor) -> Tensor:
        """Every network on every sample: x [samples, inputs] -> [n, samples]. One batched matmul a layer.

        ``h_0 = x, h_{l+1} = sigma(W_l h_l + b_l) * mask_l, y = W_L h_L + b_L``.
        """
        for signal in self.signals(x):
            last = signal
        return last.squeeze(1)

    def signals(self, x: Tensor) -> Iterator[Tensor]:
        """The signal of every hidden layer [n, width, samples], then the output [n, 1, samples]."""
        n, hidden = len(self), x.t()
        for layer, weight in enumerate(self.weights):
            if layer == 0:  # all networks read the same input: one flat product
                signal = (weight.reshape(-1, weight.shape[2]) @ hidden).reshape(n, weight.shape[1], -1)
            else:
                signal = torch.bmm(weight, hidden)
            if self.biases is not None:
                signal = signal + self.biases[layer].unsqueeze(2)
            if layer < self.depth:
                signal = self._activate(signal, layer) * self.neurons[:, layer].unsqueeze(2)
            yield signal
            hidden = signal

    def _activate(self, signal: Tensor, layer: int) -> Tensor:
        if self.mixture is None:
            return ACTIVATIONS[self.space.activation][0](signal)
        share = self.mixture[:, layer].unsqueeze(3)  # [n, width, 3, 1]
        leaky = nn.functional.leaky_relu(signal, 0.01)
        return share[:, :, 0] * signal.sigmoid() + share[:, :, 1] * signal.tanh() + share[:, :, 2] * leaky

    def scaled(self, factor: Tensor) -> NetworkBatch:
        """The networks with outputs multiplied by ``factor`` [n]: the factor goes into the last layer."""
        weights = (*self.weights[:-1], self.weights[-1] * factor[:, None, None])
        biases = None if self.biases is None else (*self.biases[:-1], self.biases[-1] * factor[:, None])
        return NetworkBatch(self.space, weights, self.neurons, biases, self.mixture)

    def permuted(self, generator: torch.Generator | None = None) -> NetworkBatch:
        """The same functions with the neurons of every hidden layer in another random order."""
        weights, neurons = list(self.weights), self.neurons.clone()
        biases = None if self.biases is None else list(self.biases)
        mixture = None if self.mixture is None else self.mixture.clone()
        for layer in range(self.depth):
            order = torch.rand(neurons[:, layer].shape, generator=generator).argsort(1)
            weights[layer] = _take(weights[layer], order, 1)
            weights[layer + 1] = _take(weights[layer + 1], order, 2)
            neurons[:, layer] = neurons[:, layer].gather(1, order)
            if biases is not None:
                biases[layer] = biases[layer].gather(1, order)
            if mixture is not None:
                mixture[:, layer] = _take(mixture[:, layer], order, 1)
        return NetworkBatch(self.space, tuple(weights), neurons, biases and tuple(biases), mixture)

    def select(self, index: Tensor | list[int]) -> NetworkBatch:
        """The networks with these numbers, detached."""
        biases = None if self.biases is None else tuple(b[index].detach() for b in self.biases)
        mixture = None if self.mixture is None else self.mixture[index].detach()
        return NetworkBatch(
            self.space, tuple(w[index].detach() for w in self.weights), self.neurons[index].detach(), biases, mixture
        )

    def effective(self) -> NetworkBatch:
        """The same functions with weights into and out of missing neurons, and their biases, set to zero."""
        weights, biases = list(self.weights), None if self.biases is None else list(self.biases)
        for layer in range(self.depth):
            alive = self.neurons[:, layer]
            weights[layer] = weights[layer] * alive[:, :, None]
            weights[layer + 1] = weights[layer + 1] * alive[:, None, :]
            if biases is not None:
                biases[layer] = biases[layer] * alive
        return NetworkBatch(self.space, tuple(weights), self.neurons, biases and tuple(biases), self.mixture)

    def nonzeros(self) -> Tensor:
        """int64 [n]: weights other than zero between neurons that exist; biases are not counted."""
        return sum((w != 0).flatten(1).sum(1) for w in self.effective().weights)

    def to_module(self, index: int, scale: float = 1.0) -> nn.Sequential:
        """Network ``index`` as an ordinary module [batch, inputs] -> [batch, 1], without neurons that nothing reads."""
        net = self.select([index]).scaled(torch.tensor([scale])).effective()
        kept = net._read_neurons()
        module = layered([int(k.sum()) for k in kept], self.space.activation, net.biases is not None)
        with torch.no_grad():
            for layer, weight in enumerate(net.weights):
                after, linear = kept[layer + 1], module[2 * layer]
                linear.weight.copy_(weight[0, after][:, kept[layer]])
                if net.biases is not None:
                    linear.bias.copy_(net.biases[layer][0, after])
                if net.mixture is not None and layer < self.depth:
                    module[2 * layer + 1].share.copy_(net.mixture[0, layer, after])
        return module

    def _read_neurons(self) -> list[Tensor]:
        """For the first network: bool per layer, inputs and output too, the neurons that exist and that one kept after
        them reads; all that exist where none is read.
        """
        kept = [torch.ones(1, dtype=torch.bool)]
        for layer in reversed(range(self.depth)):
            alive = self.neurons[0, layer] > 0.5
            read = alive & (self.weights[layer + 1][0, kept[0]] != 0).any(0)
            kept.insert(0, read if bool(read.any()) else alive)
        return [torch.ones(self.space.inputs, dtype=torch.bool), *kept]


def layered(sizes: Sequence[int], activation: str, bias: bool) -> nn.Sequential:
    """``nn.Linear`` layers of these sizes, inputs first, with the activation between them."""
    layers: list[nn.Module] = []
    for inp, out in pairwise(sizes):
        layers.append(nn.Linear(inp, out, bias=bias))
        layers.append(MixedActivation(out) if activation == MIXED else ACTIVATIONS[activation][1]())
    return nn.Sequential(*layers[:-1])


class MixedActivation(nn.Module):
    """Each feature through its own activation: ``share`` [features, 3] of sigmoid, tanh, leaky ReLU (slope 0.01)."""

    def __init__(self, features: int):
        super().__init__()
        self.register_buffer("share", torch.zeros(features, 3))

    def forward(self, x: Tensor) -> Tensor:
        """[..., features] -> [..., features]."""
        s, m = x, self.share
        return m[:, 0] * s.sigmoid() + m[:, 1] * s.tanh() + m[:, 2] * nn.functional.leaky_relu(s, 0.01)


class ScaledOutput(nn.Module):
    """``network(x) * scale + shift``: undoes the normalisation of the targets."""

    def __init__(self, network: nn.Module, scale: float, shift: float = 0.0):
        super().__init__()
        self.network, self.scale, self.shift = network, scale, shift

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inputs] -> [batch, 1]."""
        return self.network(x) * self.scale + self.shift


def _take(tensor: Tensor, order: Tensor, dim: int) -> Tensor:
    """``tensor`` [n, ...] reordered along ``dim``, each network by its own row of ``order`` [n, width]."""
    shape = [len(order), *[1] * (tensor.dim() - 1)]
    shape[dim] = order.shape[1]
    return tensor.gather(dim, order.reshape(shape).expand(*tensor.shape))


def from_vector(space: NetworkSpace, depth: int, vector: Tensor) -> tuple[NetworkBatch, Tensor]:
    """Networks from ``vector`` [n, space.vector_size(depth)], and the logits [n, L, width] of their neurons.

    The mask is 1 where the logit is above 0, and passes gradients as the sigmoid would (straight-through): with a plain
    threshold the logits would never learn (defect 1 of the reference code). Activations come as logits of a softmax.
    """
    n, width, at = len(vector), space.width, 0

    def take(*shape: int) -> Tensor:
        nonlocal at
        size = 1
        for s in shape:
            size *= s
        at += size
        return vector[:, at - size : at].reshape(n, *shape)

    weights = tuple(take(*shape) for shape in space.shapes(depth))
    logits = take(depth, width)
    biases = tuple(take(out) for out, _ in space.shapes(depth)) if space.bias else None
    mixture = take(depth, width, 3).softmax(3) if space.activation == MIXED else None
    return NetworkBatch(space, weights, straight_through(logits), biases, mixture), logits


def straight_through(logits: Tensor) -> Tensor:
    """1 where ``logits`` > 0, else 0; the gradient is the sigmoid's."""
    soft = logits.sigmoid()
    return (logits > 0).to(soft.dtype) + (soft - soft.detach())  # in this order: exactly 0 or 1


def to_matrix(nets: NetworkBatch) -> Tensor:
    """The paper's form ``[W_0 | W_1 | ... | W_L | S]``: [n, width, (width + 1) L + 1 ], weights as [in, out].

    Rows of ``W_0`` are centred (2 zero rows above and below for 3 inputs and width 7). Biases and per-neuron
    activations have no place in it: ValueError.
    """
    space, n = nets.space, len(nets)
    if nets.biases is not None or nets.mixture is not None:
        raise ValueError("to_matrix: networks must have no biases and one activation, got biases or a mixture")
    top = (space.width - space.inputs) // 2
    net = nets.effective()
    first = net.weights[0].new_zeros(n, space.width, space.width)
    first[:, top : top + space.inputs] = net.weights[0].transpose(1, 2)
    return torch.cat([first, *(w.transpose(1, 2) for w in net.weights[1:]), nets.neurons.transpose(1, 2)], 2)


def from_matrix(space: NetworkSpace, matrix: Tensor) -> NetworkBatch:
    """The inverse of :func:`to_matrix`: [n, width, (width + 1) L + 1] -> networks. ValueError for another shape."""
    width = space.width
    depth, rest = divmod(matrix.shape[2] - 1, width + 1)
    if matrix.dim() != 3 or matrix.shape[1] != width or rest or not 1 <= depth <= space.max_depth:
        rule = f"[n, {width}, {width + 1} L + 1] for a depth L up to {space.max_depth}"
        raise ValueError(f"from_matrix: matrix must have shape {rule}, got {list(matrix.shape)}")
    top = (width - space.inputs) // 2
    weights = [matrix[:, top : top + space.inputs, :width].transpose(1, 2)]
    weights += [matrix[:, :, width * i : width * (i + 1)].transpose(1, 2) for i in range(1, depth)]
    weights.append(matrix[:, :, width * depth : width * depth + 1].transpose(1, 2))
    return NetworkBatch(space, tuple(weights), matrix[:, :, -depth:].transpose(1, 2))
