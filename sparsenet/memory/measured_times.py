"""Times of layers, measured on this machine at sizes that are powers of two, and interpolated between them.

Each measurement is a forward and backward pass of one layer (or an optimizer's update of so many elements) and is made
when it is first needed: some milliseconds; again, where half the size took longer. The logarithm of the time is
interpolated linearly along the logarithm of every size, which is exact where a time is a power of the sizes. Above the
largest sizes measured, time grows with the work. What was measured is kept in the user's cache, one file per processor,
instruction set, number of threads and versions.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from sparsenet.files import replace_text
from sparsenet.functional.build import build_info
from sparsenet.layers import SparseLinear
from sparsenet.memory.costs import LayerCost
from sparsenet.optimizer_state import scratch_twin
from sparsenet.pattern import BlockPattern

__all__ = ["MeasuredTimes"]

logger = logging.getLogger(__name__)

_FORMAT = 1
_WIDEST, _MOST_ROWS, _MOST_ELEMENTS = 2048, 1 << 14, 1 << 21  # measured; beyond, time grows with the work
_MOST_VALUES = 1 << 22  # of one activation that is measured
_SECONDS, _LEAST_REPEATS, _MOST_REPEATS = 0.02, 4, 40  # of one measurement

UNDISTURBED = 0.8  # of the time of half the size: less than that says that half the size was measured badly

Sizes = dict[str, float]


class MeasuredTimes:
    """Times by what was measured, in seconds.

    Args:
        folder: where they are kept; default ``sparsenet/step_time`` in the user's cache (``$XDG_CACHE_HOME`` or
            ``~/.cache``). A file that cannot be read, or is of another machine, is made anew; one that cannot be
            written is gone with the process, and a warning says so once.

    Example:
        >>> import tempfile
        >>> from sparsenet.memory import LayerCost, MeasuredTimes
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     times = MeasuredTimes(folder)
        ...     seconds = times.layer_seconds(LayerCost("dense", 64, 64, positions=32))
        ...     times.save()
        ...     seconds == MeasuredTimes(folder).layer_seconds(LayerCost("dense", 64, 64, positions=32)) > 0
        True
    """

    def __init__(self, folder: str | Path | None = None):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sparsenet", "step_time")
        self.folder = cache if folder is None else Path(folder)
        self.machine = machine()
        digest = hashlib.sha256(json.dumps(self.machine, sort_keys=True).encode()).hexdigest()[:16]
        self.path = self.folder / f"{digest}.json"
        self.seconds: dict[str, float] = self._read()
        self._saved: int | None = len(self.seconds)
        self._sure: set[str] = set()  # measured twice
        self._said = False

    def layer_seconds(self, cost: LayerCost) -> float:
        """Of forward and backward; 0 for a layer without rows, outputs or blocks."""
        if not (cost.flops or (cost.kind in ("pool", "norm") and cost.positions * cost.out_features)):
            return 0.0
        sizes: Sizes = {"out": cost.out_features, "in": cost.in_features, "rows": cost.positions}
        fixed = f"{cost.kind} {cost.dtype} gradient={int(cost.input_gradient)}"
        most: Sizes = {"out": _WIDEST, "in": _WIDEST, "rows": _MOST_ROWS}
        if cost.kind == "block":
            sizes["blocks"] = cost.num_blocks
            most["blocks"] = (_WIDEST // cost.block_size) ** 2 or 1
            most |= {side: max(_WIDEST, cost.block_size) for side in ("out", "in")}
            fixed += f" block={cost.block_size}"
        elif cost.kind in ("conv", "pool"):
            fixed += f" kernel={'x'.join(map(str, cost.kernel))} side={_side(cost)} groups={cost.groups}"
            most |= {"out": 512, "in": 512}
        if cost.kind in ("pool", "norm"):
            del sizes["in"]
        call = partial(_layer_call, cost)
        return self._interpolated(fixed, sizes, most, call)

    def update_seconds(self, elements: int, optimizer: Optimizer) -> float:
        """Of the optimizer's update of so many elements, above that of a step with next to nothing to update."""
        if not elements:
            return 0.0
        fixed = f"update {_label(optimizer)}"
        call = partial(_update_call, optimizer)
        seconds = self._interpolated(fixed, {"elements": elements}, {"elements": _MOST_ELEMENTS}, call)
        return max(0.0, seconds - self.step_seconds(optimizer))

    def step_seconds(self, optimizer: Optimizer) -> float:
        """Of an optimizer's step with next to nothing to update."""
        return self._at(f"update {_label(optimizer)}", {"elements": 1}, partial(_update_call, optimizer))

    def _interpolated(self, fixed: str, sizes: Sizes, most: Sizes, call: Callable) -> float:
        """Between the powers of two around the sizes; what is above the largest measured grows in proportion."""
        within = {name: min(size, most[name]) for name, size in sizes.items()}
        if "rows" in within:
            values = within["rows"] * max(within["out"], within.get("in", 0))
            within["rows"] = max(1, within["rows"] * min(1.0, _MOST_VALUES / values))
        beyond = math.prod(sizes[name] / within[name] for name in sizes if not _follows(name, sizes))
        corners = []
        for name, size in within.items():
            low = 2 ** math.floor(math.log2(size))
            share = math.log2(size / low)
            corners.append([(name, low, 1 - share)] + ([(name, 2 * low, share)] if share else []))
        logarithm = sum(
            math.prod(share for _, _, share in corner)
            * math.log(self._at(fixed, {name: size for name, size, _ in corner}, call))
            for corner in itertools.product(*corners)
        )
        return beyond * math.exp(logarithm)

    def _at(self, fixed: str, sizes: Sizes, call: Callable) -> float:
        key = _key(fixed, sizes)
        again = key in self.seconds and key not in self._sure and self._disturbed(fixed, sizes)
        if again or key not in self.seconds:
            with _undisturbed_measuring():
                work, share = call(**{name.replace("in", "in_"): size for name, size in sizes.items()})
                seconds = _least_seconds(work) * share
            self.seconds[key] = min(seconds, self.seconds.get(key, math.inf))
            self._saved = None
        if again:
            self._sure.add(key)
        return self.seconds[key]

    def _disturbed(self, fixed: str, sizes: Sizes) -> bool:
        """Whether twice the size took clearly less: another program ran when this was measured."""
        own = self.seconds[_key(fixed, sizes)]
        doubled = (self.seconds.get(_key(fixed, {**sizes, name: 2 * size}), math.inf) for name, size in sizes.items())
        return min(doubled) < UNDISTURBED * own

    # --- the file ---

    def _read(self) -> dict[str, float]:
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return {}
        try:
            content = json.loads(text)
            if content["format"] != _FORMAT or content["machine"] != self.machine:
                return {}
            return {str(key): s for key, s in content["seconds"].items() if isinstance(s, float) and 0 < s < 1e6}
        except (ValueError, TypeError, KeyError, AttributeError):
            logger.warning("StepTimeModel: %s cannot be read and is made anew", self.path)
            return {}

    def save(self) -> None:
        """Writes what was measured since the last time, with what others have written meanwhile."""
        if len(self.seconds) == self._saved:
            return
        self.seconds = self._read() | self.seconds
        content = {"format": _FORMAT, "machine": self.machine, "seconds": self.seconds}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_text(self.path, json.dumps(content, indent=1, sort_keys=True))
        except OSError as error:
            if not self._said:
                logger.warning("StepTimeModel: what was measured is not kept: %s", error)
            self._said = True
        self._saved = len(self.seconds)


def _key(fixed: str, sizes: Sizes) -> str:
    return " ".join([fixed, *(f"{name}={size}" for name, size in sizes.items())])


def machine() -> dict[str, str | int]:
    """What times depend on beside the layer: processor, instruction set, threads, versions.

    Example:
        >>> from sparsenet.memory.measured_times import machine
        >>> sorted(machine())
        ['capability', 'cpu', 'isa', 'sparsenet', 'threads', 'torch']
    """
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    info = build_info()
    return {
        "cpu": found[1].strip() if found else platform.processor() or platform.machine(),
        "isa": info["isa"],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "sparsenet": info["version"],
    }


# --- measuring ------------------------------------------------------------------------------------------------------


@contextmanager
def _undisturbed_measuring() -> Iterator[None]:
    """Leaves the random state and modes of whoever asks as they are."""
    modes = torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False)
    with torch.random.fork_rng(devices=[]), modes[0], modes[1], modes[2]:
        torch.manual_seed(0)
        yield


def _follows(name: str, sizes: Sizes) -> bool:
    """Whether a size beyond the largest adds no work of its own: that of a block-sparse layer grows with its blocks."""
    return "blocks" in sizes and name in ("out", "in")


def _least_seconds(work: Callable[[], object]) -> float:
    """The least of some repeats: what the machine does when left alone."""
    work()
    taken: list[float] = []
    until = time.perf_counter() + _SECONDS
    while len(taken) < _LEAST_REPEATS or (time.perf_counter() < until and len(taken) < _MOST_REPEATS):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return max(min(taken), 1e-9)


def _side(cost: LayerCost) -> int:
    """Of the image that is measured, in the output's places: a power of two."""
    return 2 ** round(math.log2(cost.places) / max(1, len(cost.kernel)))


def _layer_call(
    cost: LayerCost, out: float, rows: float, in_: float = 1, blocks: float = 0
) -> tuple[Callable[[], object], float]:
    """A forward and backward pass of such a layer with a ReLU behind it, and by how much its work falls short."""
    out, in_, rows, dtype = max(1, int(out)), max(1, int(in_)), max(1, int(rows)), getattr(torch, cost.dtype)
    share = 1.0
    if cost.kind == "block":
        b = cost.block_size
        places = -(-out // b) * -(-in_ // b)
        count = min(int(blocks), places)
        share = blocks / count
        pattern = BlockPattern.random((out, in_), count / places, b, generator=torch.Generator().manual_seed(0))
        call, x = SparseLinear(in_, out, pattern=pattern, activation="relu", dtype=dtype), torch.randn(rows, in_)
    elif cost.kind == "dense":
        call, x = nn.Sequential(nn.Linear(in_, out, dtype=dtype), nn.ReLU()), torch.randn(rows, in_)
    elif cost.kind == "norm":
        call, x = nn.BatchNorm1d(out, dtype=dtype), torch.randn(max(2, rows), out)
    else:
        dims, side = max(1, len(cost.kernel)), _side(cost)
        batch = max(1, round(rows / side**dims))
        share = rows / (batch * side**dims)
        if cost.kind == "pool":
            call = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dims - 1](cost.kernel)
            x = torch.randn(batch, out, *(side * size for size in cost.kernel))
        else:
            kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
            groups = math.gcd(math.gcd(out, in_), cost.groups)
            call = nn.Sequential(kind(in_, out, cost.kernel, padding="same", groups=groups, dtype=dtype), nn.ReLU())
            x = torch.randn(batch, in_, *[side] * dims)
    with torch.no_grad():
        gradient = torch.ones_like(call(x.to(dtype)))
    x = x.to(dtype).requires_grad_(cost.input_gradient)

    def work() -> None:
        for tensor in (x, *call.parameters()):
            tensor.grad = None
        call(x).backward(gradient)

    return work, share


def _update_call(optimizer: Optimizer, elements: float) -> tuple[Callable[[], object], float]:
    parameter = min((p for g in optimizer.param_groups for p in g["params"] if p.dim()), key=lambda p: p[:1].numel())
    twin, scratch = scratch_twin(optimizer, parameter, max(1, round(elements / max(1, parameter[:1].numel()))))
    if twin is None:
        twin = torch.optim.AdamW([scratch])
        scratch.grad = torch.zeros_like(scratch)
    scratch.grad.normal_()
    return torch.no_grad()(twin.step), elements / max(scratch.numel(), 1) if elements > 1 else 1.0


def _label(optimizer: Optimizer) -> str:
    """Kind and the options that make its steps another work."""
    group = optimizer.param_groups[0]
    on = [name for name, value in sorted(group.items()) if value is True and name not in ("maximize",)]
    return "-".join([type(optimizer).__name__, *on, *(["momentum"] if group.get("momentum") else [])])
