"""The cases of the part ``bench``, the most telling first.

Each pass is held against dense cuBLAS of the same run. ``eff`` is (density x dense time) / sparse time: 1 means that
10 % density is ten times faster than dense.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from gpu_cases import Case
from gpu_ops import DEVICE, Layer, make_pattern, synchronize, torch_dtype
from gpu_timing import ceilings, dense_times, rivals, roofline_us, time_us

LINEAR = ("forward", "grad_input", "grad_weight")
# Goals of eff by block size, for bfloat16, density >= 10 % and sizes that computing bounds.
GOALS = {
    "forward": {16: 0.25, 32: 0.45, 64: 0.70, 128: 0.90},
    "grad_input": {16: 0.25, 32: 0.45, 64: 0.70, 128: 0.90},
    "grad_weight": {16: 0.20, 32: 0.35, 64: 0.60, 128: 0.85},
}
ROTATED_BYTES = 200 * 2**20  # buffers are rotated over about this much: several times the L2 of a Hopper GPU

Shape = tuple[int, int, int, float, int, str, str]  # rows, cols, batch, density, block, dtype, pattern


def label(shape: Shape) -> str:
    """A bench case's name."""
    rows, cols, batch, density, block, dtype, kind = shape
    return f"{rows}x{cols} batch={batch} {density:.0%} b={block} {dtype} {kind}"


def goal(shape: Shape, name: str) -> float | None:
    """The eff that a pass must reach; None where there is no goal."""
    rows, cols, batch, density, block, dtype, kind = shape
    large = dtype == "bfloat16" and kind == "random" and batch >= 1024 and min(rows, cols) >= 2048
    return GOALS[name].get(block) if large and density >= 0.1 else None


class Benches:
    """Holds what cases share: the machine's ceilings and dense times by shape."""

    def __init__(self, ops, tiny: bool = False):
        self.ops, self.tiny = ops, tiny
        self.ceiling: dict | None = None
        self.dense: dict[tuple, dict] = {}

    def ceilings(self) -> dict:
        """Measured once."""
        if self.ceiling is None:
            self.ceiling = ceilings(self.tiny)
        return self.ceiling

    def layers(self, shape: Shape) -> list[Layer]:
        """Layers on one pattern, enough of them that their tensors don't stay in the cache."""
        rows, cols, batch, density, block, dtype, kind = shape
        pattern = make_pattern(self.ops, kind, rows, cols, block, density, seed=1)
        elements = batch * (rows + cols) + pattern.num_blocks * block * block
        sets = max(2, min(24, ROTATED_BYTES // (elements * torch_dtype(dtype).itemsize)))
        return [Layer(pattern, batch, dtype, bias=False, seed=i) for i in range(2 if self.tiny else sets)]

    def linear(self, shape: Shape) -> dict:
        """Each pass and the growth norms, against dense and against the roofline."""
        rows, cols, batch, _, block, dtype, _ = shape
        ceiling, layers = self.ceilings(), self.layers(shape)
        pattern = layers[0].pattern

        def cycle(call: Callable[[Layer], None]) -> Callable[[int], None]:
            return lambda i: call(layers[i % len(layers)])

        passes = {
            "forward": cycle(Layer.forward),
            "grad_input": cycle(lambda layer: layer.backward("x")),
            "grad_weight": cycle(lambda layer: layer.backward("w")),
            "gradient_norms": cycle(Layer.gradient_norms),
        }
        times = {key: time_us(run) for key, run in passes.items()}
        key = (rows, cols, batch, dtype)
        if key not in self.dense:
            self.dense[key] = dense_times(layers, dtype)
        dense = self.dense[key]
        real = pattern.num_blocks * block * block / (rows * cols)
        flop = 2 * batch * pattern.num_blocks * block * block
        least = roofline_us(pattern, batch, dtype, ceiling)
        eff = {n: real * dense[n]["median_us"] / times[n]["median_us"] for n in LINEAR}
        goals = {n: value for n in LINEAR if (value := goal(shape, n)) is not None}
        return {
            "shape": dict(zip(("rows", "cols", "batch", "density", "block", "dtype", "pattern"), shape, strict=True)),
            "density": real,
            "kernels": layers[0].kernel_names(),
            "times": times,
            "dense": dense,
            "eff": eff,
            "goals": goals,
            "goals_met": {n: eff[n] >= value for n, value in goals.items()},
            "of_roofline": {n: least[n] / times[n]["median_us"] for n in times},
            "norms_over_dense_grad_weight": times["gradient_norms"]["median_us"] / dense["grad_weight"]["median_us"],
            "active_tflop_per_s": {n: flop / times[n]["median_us"] / 1e6 for n in LINEAR},
        }

    def rivals(self, shape: Shape) -> dict:
        """Other libraries' forward on the same layer."""
        return {"rivals": rivals(self.layers(shape)[0], shape[3])}

    def step(self, width: int, batch: int, block: int, density: float) -> dict:
        """A training step of three layers in bfloat16 with AdamW, dense and sparse, and one that rewires."""
        import sparsenet as sn

        def dense() -> torch.nn.Module:
            layers = [torch.nn.Linear(width, width, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]
            return torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])

        sizes, options = (width,) * 4, {"density": density, "block_size": block, "dtype": torch.bfloat16}
        models = {"dense": dense(), **{key: sn.SparseMLP(sizes, **options).to(DEVICE) for key in ("sparse", "rewire")}}
        x, result = torch.randn(batch, width, device=DEVICE, dtype=torch.bfloat16), {}
        for key, model in models.items():
            optimizer = torch.optim.AdamW(model.parameters(), fused=DEVICE.type == "cuda")
            sparsifier = sn.Sparsifier(model, optimizer, sn.RigL(0.1), every=1) if key == "rewire" else None

            def step(model=model, optimizer=optimizer, sparsifier=sparsifier) -> None:
                optimizer.zero_grad()
                model(x).float().square().mean().backward()
                optimizer.step()
                if sparsifier is not None:
                    sparsifier.step()

            result[f"{key}_us"] = self.wall_us(step, 15)
        result["speedup"] = result["dense_us"] / result["sparse_us"]
        result["rewire_over_step"] = (result["rewire_us"] - result["sparse_us"]) / result["sparse_us"]
        return {"width": width, "batch": batch, "block": block, "density": density, **result}

    def overhead(self) -> dict:
        """Microseconds of a small eager call, forward and backward, that the host takes: ours and nn.Linear's."""
        import sparsenet as sn

        layers = {
            "linear": torch.nn.Linear(256, 256, device=DEVICE),
            "sparse": sn.SparseLinear(256, 256, density=0.5, block_size=32).to(DEVICE),
        }
        x = torch.randn(32, 256, device=DEVICE, requires_grad=True)
        many = 2 if self.tiny else 100

        def calls(layer) -> None:
            for _ in range(many):
                layer(x).sum().backward()

        result = {f"{key}_us": self.wall_us(partial(calls, layer), 9) / many for key, layer in layers.items()}
        return {**result, "overhead_us": result["sparse_us"] - result["linear_us"]}

    def wall_us(self, run: Callable[[], None], repeats: int) -> float:
        """Median microseconds by the host's clock, the device's work included."""
        samples = []
        for _ in range(2 if self.tiny else repeats + 3):
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            samples.append((time.perf_counter() - start) * 1e6)
        samples = sorted(samples if self.tiny else samples[3:])
        return samples[len(samples) // 2]


def shapes() -> Iterator[Shape]:
    """What is timed after the first four, the most telling first."""
    for density in (0.05, 0.2, 0.02, 0.5):
        for block in (32, 64, 128, 16):
            yield 4096, 4096, 2048, density, block, "bfloat16", "random"
    for batch in (1, 16, 128, 512, 8192):
        for block in (32, 64):
            yield 4096, 4096, batch, 0.1, block, "bfloat16", "random"
    for name in ("tf32", "float32"):
        for block in (32, 64):
            yield 4096, 4096, 512, 0.1, block, name, "random"
    for rows, cols in ((4096, 1024), (11008, 4096), (3072, 768), (16384, 16384)):
        yield rows, cols, 2048, 0.1, 32, "bfloat16", "random"
    for kind in ("power_law", "full_row", "empty_rows"):
        yield 4096, 4096, 2048, 0.05, 32, "bfloat16", kind
    for block in (32, 64, 128, 16):
        for density in (0.01, 1.0):
            yield 4096, 4096, 2048, density, block, "bfloat16", "random"
            yield 8192, 8192, 2048, min(density * 5, 0.5), block, "bfloat16", "random"


def bench_cases(ops, tiny: bool = False) -> Iterator[Case]:
    """Ceilings, the four block sizes, a training step, and then breadth."""
    benches = Benches(ops, tiny)

    def linear(shape: Shape) -> Case:
        return Case(label(shape), "large" if shape[0] * shape[1] > 2**26 else "linear", partial(benches.linear, shape))

    yield Case("ceilings", "ceilings", benches.ceilings)
    if tiny:
        for name in ("bfloat16", "float32", "tf32"):
            yield linear((96, 64, 40, 0.5, 32, name, "random"))
        yield Case("training step tiny", "step", partial(benches.step, 32, 4, 16, 0.5))
        yield Case("overhead of a call", "overhead", benches.overhead)
        yield Case("rivals tiny", "rivals", partial(benches.rivals, (96, 64, 40, 0.5, 32, "bfloat16", "random")))
        return
    first = [(4096, 4096, 2048, 0.1, block, "bfloat16", "random") for block in (32, 64, 128, 16)]
    rest = list(shapes())
    for shape in first:
        yield linear(shape)
    yield Case("training step 4096 b=64 10%", "step", partial(benches.step, 4096, 2048, 64, 0.1))
    yield Case("overhead of a call", "overhead", benches.overhead)
    for shape in rest[:8]:
        yield linear(shape)
    for shape in first[:2]:
        yield Case(f"rivals {label(shape)}", "rivals", partial(benches.rivals, shape))
    for shape in rest[8:]:
        yield linear(shape)
    yield Case("training step 16384 b=32 5%", "large step", partial(benches.step, 16384, 2048, 32, 0.05))


def table(results: list[dict]) -> str:
    """The benches as a table: microseconds; in brackets eff (* where its goal is met) and the share of the roofline."""
    lines = [
        "| shape | batch | density | block | dtype | pattern | forward | grad_input | grad_weight | norms / dense "
        "| dense forward |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        shape = r["shape"]
        cells = [
            f"{r['times'][n]['median_us']:.0f} ({r['eff'][n]:.2f}{'*' if r['goals_met'].get(n) else ''}, "
            f"{r['of_roofline'][n]:.2f})"
            for n in LINEAR
        ]
        lines.append(
            f"| {shape['rows']}x{shape['cols']} | {shape['batch']} | {shape['density']:.0%} | {shape['block']} "
            f"| {shape['dtype']} | {shape['pattern']} | "
            + " | ".join(cells)
            + f" | {r['norms_over_dense_grad_weight']:.2f} | {r['dense']['forward']['median_us']:.0f} |"
        )
    return "\n".join(lines)
