"""The cases of the parts ``correct`` and ``sanitize``: every op, dtype, block size and variant against float64.

Sizes are odd, patterns random and adversarial, inputs random, outputs NaN beforehand and between guards. Each pass of
each configuration is a case of its own, so that a kernel which faults does not hide what the others do. Every pass runs
twice and must give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from gpu_cases import Case
from gpu_ops import ACTIVATIONS, CODES, DEVICE, TF32, Layer, force_variant, make_pattern, synchronize

UNIT = {0: 2.0**-24, 1: 2.0**-8, 2: 2.0**-11, 3: 2.0**-53, TF32: 2.0**-11}  # by dtype code
BLOCKS = {"sm80": (32, 64, 128, 16), "simt": (32, 64, 128, 16, 8, 4, 1)}
DTYPES = {"sm80": ("bfloat16", "tf32", "float16"), "simt": ("float32", "bfloat16", "float64", "float16")}
KINDS = ("random", "full_row", "power_law", "empty_rows", "none", "dense")
BATCHES = (130, 8, 33, 517)  # several tiles, the small-batch kernel, one row past it, many tiles
PASSES = ("forward", "grad_input", "grad_weight", "gradient_norms", "candidate_gradients")


def excess(got: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor, code: int, reduction: int) -> float:
    """Largest error over what rounding explains; above 1, or NaN, is wrong."""
    accumulate = UNIT[3 if code == 3 else 0]
    bound = (2 * (reduction + 2) * accumulate + 3 * UNIT[code]) * (magnitude + 2.0**-14)
    ratio = ((got.double() - expected).abs() / bound).max().item() if got.numel() else 0.0
    return ratio if ratio == ratio else float("inf")


def derivative(saved: torch.Tensor, activation: str) -> torch.Tensor:
    """d activation at `saved`, float64."""
    if activation == "none":
        return torch.ones_like(saved)
    if activation == "relu":
        return (saved > 0).double()
    saved = saved.detach().requires_grad_()
    getattr(torch.nn.functional, activation)(saved).sum().backward()
    return saved.grad


def forward_errors(layer: Layer) -> dict[str, float]:
    """Output and pre-activation, in units of their rounding bounds."""
    p = layer.pattern
    x, weight = layer.x.double(), p.dense(layer.values)
    shift = layer.bias.double() if layer.bias is not None else torch.zeros(p.rows, dtype=torch.float64, device=DEVICE)
    z, size = x @ weight.T + shift, x.abs() @ weight.abs().T + shift.abs()
    apply = {"none": lambda t: t} | {n: getattr(torch.nn.functional, n) for n in ("relu", "gelu", "silu")}
    return {
        "pre_activation": excess(layer.pre, z, size, layer.code, p.cols),
        "y": excess(layer.y, apply[layer.activation](z), 1.2 * size, layer.code, p.cols),
    }


def before_activation(layer: Layer) -> tuple[torch.Tensor, float]:
    """The exact gradient before the activation, and how much wider bounds are because a kernel rounds it once."""
    exact = layer.grad_y.double() * derivative(layer.saved.double(), layer.activation)
    plain = layer.activation == "none"
    return (exact, 1.0) if plain else (exact.to(layer.dtype).double(), 4.0)


def grad_input_errors(layer: Layer) -> dict[str, float]:
    """The gradient of x."""
    p, (grad_z, loose) = layer.pattern, before_activation(layer)
    weight = p.dense(layer.values)
    size = loose * (grad_z.abs() @ weight.abs())
    return {"grad_x": excess(layer.grad_x, grad_z @ weight, size, layer.code, p.rows)}


def grad_weight_errors(layer: Layer) -> dict[str, float]:
    """The gradients of the blocks and of the bias."""
    p, (grad_z, loose), x = layer.pattern, before_activation(layer), layer.x.double()
    exact, size = p.blocks_of(grad_z.T @ x), loose * p.blocks_of(grad_z.abs().T @ x.abs())
    sums = grad_z.sum(0), loose * grad_z.abs().sum(0)
    return {
        "grad_values": excess(layer.grad_values, exact, size, layer.code, layer.batch),
        "grad_bias": excess(layer.grad_bias, *sums, layer.code, layer.batch),
    }


def norms_errors(layer: Layer) -> dict[str, float]:
    """Squared norms of the dense gradient's blocks.

    Entries g that err by e change a squared norm by at most 2 |g| |e| + |e|^2.
    """
    p, code = layer.pattern, layer.code
    g, x = layer.grad_y.double(), layer.x.double()
    unit = UNIT[3 if code == 3 else 0]  # norms are float32, but float64 operands are multiplied as such
    per_entry = unit * (min(layer.batch, 6 * layer.batch**0.5) + 4) + (2 * UNIT[TF32] if code == TF32 else 0.0)
    size = p.all_blocks(g.abs().T @ x.abs()).square().sum((2, 3)).sqrt()
    exact, wrong = p.all_blocks(g.T @ x).square().sum((2, 3)), per_entry * size
    bound = 2 * exact.sqrt() * wrong + wrong.square() + exact * UNIT[0] * (p.block + 4)
    ratio = ((layer.norms.double() - exact).abs() / bound.clamp(min=2.0**-126)).max().item()
    return {"norms": ratio if ratio == ratio else float("inf")}


def candidates_errors(layer: Layer) -> dict[str, float]:
    """The dense gradient's blocks at the pattern's places, in reverse."""
    p, g, x = layer.pattern, layer.grad_y.double(), layer.x.double()
    exact, size = p.blocks_of(g.T @ x).flip(0), p.blocks_of(g.abs().T @ x.abs()).flip(0)
    return {"candidates": excess(layer.candidates, exact, size, layer.code, layer.batch)}


RUNS = {
    "forward": (lambda layer: layer.forward(pre=True), forward_errors, ("y", "pre")),
    "grad_input": (lambda layer: layer.backward("x"), grad_input_errors, ("grad_x",)),
    "grad_weight": (lambda layer: layer.backward("wb"), grad_weight_errors, ("grad_values", "grad_bias")),
    "gradient_norms": (Layer.gradient_norms, norms_errors, ("norms",)),
    "candidate_gradients": (Layer.candidate_gradients, candidates_errors, ("candidates",)),
}


def check_pass(layer: Layer, name: str) -> dict:
    """Errors of one pass in units of their rounding bounds; whether it repeats bit for bit and stays in its outputs."""
    run, errors_of, outputs = RUNS[name]
    bits = []
    for _ in range(2):
        layer.clear()
        run(layer)
        synchronize()
        bits.append([getattr(layer, output).clone().view(torch.uint8) for output in outputs])
    errors = {key: round(error, 4) for key, error in errors_of(layer).items()}
    wrong = [f"{key} is {error:.3g} times its rounding bound" for key, error in errors.items() if not error <= 1]
    if not all(torch.equal(a, b) for a, b in zip(*bits, strict=True)):
        wrong.append("two runs differ in their bits")
    if not layer.guards_hold():
        wrong.append("it wrote beside its outputs")
    return {"passed": not wrong, "errors": errors, **({"error": "; ".join(wrong)} if wrong else {})}


@dataclass(frozen=True)
class Configuration:
    """One layer to check. `number` varies what is not named: activation, bias, alignment, where lines are cut."""

    variant: str
    dtype: str
    block: int
    kind: str
    batch: int
    shape: tuple[int, int]
    number: int

    @property
    def name(self) -> str:
        """As the report shows it."""
        rows, cols = self.shape
        return f"{self.variant} {self.dtype} b={self.block} {self.kind} batch={self.batch} {rows}x{cols}"

    @lru_cache(maxsize=2)  # noqa: B019 - the passes of one configuration follow each other
    def layer(self, ops) -> Layer:
        """Its tensors. The two forced variants need rows that start on 16 bytes, automatic does not."""
        rows, cols = self.shape
        n = self.number
        pattern = make_pattern(ops, self.kind, rows, cols, self.block, 0.3, seed=n, split=(None, 2)[n % 2])
        pads = (0, 0) if self.variant == "automatic" else (-cols % 8, -rows % 8)
        return Layer(pattern, self.batch, self.dtype, list(ACTIVATIONS)[n % 4], n % 3 != 1, pads, seed=n)


def configurations(small: bool) -> Iterator[Configuration]:
    """The most important first: bfloat16 on the tensor cores, then what else a default call reaches, then the rest."""
    number = 0

    def make(variant: str, dtype: str, block: int, kind: str, batch: int) -> Configuration:
        nonlocal number
        number += 1
        shape = (block + 19, 2 * block + 8) if small else (max(8 * block + 21, 150), max(9 * block + 13, 170))
        return Configuration(variant, dtype, block, kind, batch, shape, number)

    batches = BATCHES[:3] if small else BATCHES
    for batch in batches[:2]:
        yield from (make("sm80", "bfloat16", block, "random", batch) for block in BLOCKS["sm80"])
    yield from (make("simt", "float32", block, "random", batches[0]) for block in BLOCKS["simt"])
    for dtype in ("tf32", "float16"):
        yield from (make("sm80", dtype, block, "random", batches[i % 2]) for i, block in enumerate(BLOCKS["sm80"]))
    for dtype in ("bfloat16", "float32", "float16", "tf32"):  # as users call it: what must be copied to be aligned, too
        yield from (make("automatic", dtype, block, "full_row", batches[block % 3]) for block in (32, 16, 8))
    yield from (make("simt", "float64", block, "random", batches[2]) for block in BLOCKS["simt"])
    if small:
        return
    for kind in KINDS:
        for variant in ("sm80", "simt"):
            for dtype in DTYPES[variant]:
                for i, block in enumerate(BLOCKS[variant]):
                    yield make(variant, dtype, block, kind, BATCHES[(number + i // 2) % 4])


def op_cases(ops, small: bool = False) -> Iterator[Case]:
    """The passes of every configuration."""
    seen: set[str] = set()
    for configuration in configurations(small):
        if configuration.name in seen:
            continue
        seen.add(configuration.name)
        for name in PASSES:

            def run(configuration: Configuration = configuration, name: str = name) -> dict:
                force_variant(ops, configuration.variant)
                try:
                    return check_pass(configuration.layer(ops), name)
                finally:
                    force_variant(ops, "automatic")

            kind = f"{name} {configuration.variant} {configuration.dtype}"
            yield Case(f"{name} {configuration.name}", kind, run)


assert all(name in CODES for names in DTYPES.values() for name in names)
