"""Decoders: from a vector to networks, one decoder per depth.

``mlp`` (default) is a perceptron per depth. ``conv`` is the paper's: a shared trunk 128 -> 256 -> 512 -> 6144, split by
depth, then transposed convolutions (arXiv 2410.08339). ``transformer`` decodes one token per neuron row (SWAT-NN).
Each returns networks whose neuron mask is straight-through, so that the mask logits learn.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsenet.architecture.embedding.codec import MIXED, NetworkBatch, NetworkSpace, from_vector, straight_through
from sparsenet.architecture.embedding.encoders import (
    ResidualBlock,
    conv_features,
    perceptron,
    row_columns,
    transformer_blocks,
)

__all__ = ["DECODERS", "ConvDecoder", "MLPDecoder", "TransformerDecoder"]

MASK_BIAS = 2.0  # neurons start present: a network without neurons has no gradient to learn from


class MLPDecoder(nn.Module):
    """One perceptron per depth: latent -> hidden -> hidden -> every number of the network."""

    def __init__(self, space: NetworkSpace, latent: int, hidden: int = 512, weight_scale: float = 1.0):
        super().__init__()
        self.space, self.weight_scale = space, weight_scale
        depths = range(1, space.max_depth + 1)
        self.trunks = nn.ModuleList(perceptron([latent, hidden, hidden, space.vector_size(d)]) for d in depths)

    def forward(self, z: Tensor, depth: int) -> NetworkBatch:
        """[n, latent] -> n networks of ``depth`` hidden layers."""
        vector = self.trunks[depth - 1](z)
        count = sum(out * inp for out, inp in self.space.shapes(depth))
        shift = torch.zeros(vector.shape[1])
        shift[count : count + depth * self.space.width] = MASK_BIAS
        scale = torch.ones(vector.shape[1])
        scale[:count] = self.weight_scale
        return from_vector(self.space, depth, vector * scale + shift)[0]


class ConvDecoder(nn.Module):
    """The paper's multi-scale decoder, ending in 7 x (8 L + 1) numbers per depth."""

    def __init__(self, space: NetworkSpace, latent: int, hidden: int = 512, weight_scale: float = 1.0):
        super().__init__()
        if space.bias or space.activation == MIXED:
            raise ValueError("ConvDecoder: space must have no biases and one activation; use mlp or transformer")
        self.space, self.weight_scale = space, weight_scale
        self.maps = [conv_features(space, depth) for depth in range(1, space.max_depth + 1)]
        sizes = [128 * rows * cols for rows, cols in self.maps]
        self.sizes = sizes
        self.trunk = perceptron([latent, hidden // 2, hidden, sum(sizes)], lambda: nn.LeakyReLU(0.01))
        self.scales = nn.ModuleList()
        for depth, (rows, cols) in enumerate(self.maps, start=1):
            blocks = [nn.Conv2d(128, 64, 3, padding=1), nn.LeakyReLU(0.01), ResidualBlock(64, 64)]
            blocks += [nn.ConvTranspose2d(64, 64, 2, 2), nn.LeakyReLU(0.01), ResidualBlock(64, 32)]
            blocks += [nn.ConvTranspose2d(32, 32, 2, 2), nn.LeakyReLU(0.01), ResidualBlock(32, 1)]
            blocks += [nn.Conv2d(1, 1, 3, padding=1), nn.Flatten()]
            blocks.append(
                perceptron([16 * rows * cols, 512, 256, space.vector_size(depth)], lambda: nn.LeakyReLU(0.01))
            )
            self.scales.append(nn.Sequential(*blocks))

    def forward(self, z: Tensor, depth: int) -> NetworkBatch:
        """[n, latent] -> n networks of ``depth`` hidden layers."""
        part = self.trunk(z).split(self.sizes, 1)[depth - 1]
        vector = self.scales[depth - 1](part.reshape(len(z), 128, *self.maps[depth - 1]))
        count = sum(out * inp for out, inp in self.space.shapes(depth))
        vector = torch.cat([vector[:, :count] * self.weight_scale, vector[:, count:] + MASK_BIAS], 1)
        return from_vector(self.space, depth, vector)[0]


class TransformerDecoder(nn.Module):
    """SWAT-NN's decoders: tokens [n, width, latent // width] through blocks of their own to the row form."""

    def __init__(self, space: NetworkSpace, latent: int, hidden: int = 128, weight_scale: float = 1.0, blocks: int = 2):
        super().__init__()
        self.space, self.weight_scale, self.part = space, weight_scale, latent // space.width
        depths = range(1, space.max_depth + 1)
        self.enter = nn.ModuleList(nn.Linear(self.part, hidden) for _ in depths)
        self.rows = nn.Parameter(torch.randn(space.max_depth, space.width, hidden) * 0.02)
        self.blocks = nn.ModuleList(transformer_blocks(hidden, blocks) for _ in depths)
        self.leave = nn.ModuleList(nn.Linear(hidden, row_columns(space, d)) for d in depths)

    def forward(self, z: Tensor, depth: int) -> NetworkBatch:
        """[n, latent] -> n networks of ``depth`` hidden layers."""
        at, space = depth - 1, self.space
        tokens = self.enter[at](z[:, : self.part * space.width].reshape(len(z), space.width, self.part))
        rows = self.leave[at](self.blocks[at](tokens + self.rows[at]))
        weights, biases, mixtures, column = [], [], [], 0
        for layer, (out, inp) in enumerate(space.shapes(depth)):
            weights.append(rows[:, :out, column : column + inp] * self.weight_scale)
            column += space.width
            if space.bias:
                biases.append(rows[:, :out, column])
                column += 1
            if space.activation == MIXED and layer < depth:
                mixtures.append(rows[:, :, column : column + 3].softmax(2))
                column += 3
        neurons = straight_through(rows[:, :, column:].transpose(1, 2) + MASK_BIAS)
        mixture = torch.stack(mixtures, 1) if mixtures else None
        return NetworkBatch(space, tuple(weights), neurons, tuple(biases) if biases else None, mixture)


DECODERS = {"mlp": MLPDecoder, "conv": ConvDecoder, "transformer": TransformerDecoder}
