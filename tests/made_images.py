"""Made data sets on disk, in the formats of the real ones: IDX, and the binary version of CIFAR-10."""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from torch import Tensor


def pictures(n: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """uint8 [n, *shape] and labels [n]: ten patterns, half of each picture being noise."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(10, *shape, generator=generator) * 255
    y = torch.arange(n) % 10
    noise = torch.rand(n, *shape, generator=generator) * 255
    return (0.5 * patterns[y] + 0.5 * noise).to(torch.uint8), y.to(torch.uint8)


def write_idx(folder: Path, train: int = 700, test: int = 200, side: int = 10) -> None:
    """The four files of MNIST and its like."""
    folder.mkdir(parents=True)
    x, y = pictures(train + test, (side, side))
    for part, rows in (("train", slice(train)), ("t10k", slice(train, None))):
        for kind, values in (("images-idx3", x[rows]), ("labels-idx1", y[rows])):
            header = bytes([0, 0, 8, values.dim()]) + struct.pack(f">{values.dim()}I", *values.shape)
            Path(folder, f"{part}-{kind}-ubyte").write_bytes(header + values.numpy().tobytes())


def write_cifar(folder: Path, each: int = 20, classes: int = 10) -> None:
    """The six files of CIFAR-10: a label and 3 x 32 x 32 bytes for every picture; the two of CIFAR-100: two labels."""
    folder.mkdir(parents=True)
    if classes == 100:
        for name, count in (("train.bin", 5 * each), ("test.bin", each)):
            x, y = pictures(count, (3, 32, 32))
            records = torch.cat([y.unsqueeze(1) // 5, y.unsqueeze(1), x.flatten(1)], 1)
            Path(folder, name).write_bytes(records.numpy().tobytes())
        return
    x, y = pictures(6 * each, (3, 32, 32))
    records = torch.cat([y.unsqueeze(1), x.flatten(1)], 1)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for name, part in zip(names, records.split(each), strict=True):
        Path(folder, name).write_bytes(part.numpy().tobytes())
