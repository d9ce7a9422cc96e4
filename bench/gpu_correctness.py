"""Correctness of every CUDA op and variant against float64, on random and adversarial patterns."""

from __future__ import annotations

import torch
from gpu_ops import ACTIVATIONS, DEVICE, DTYPES, TF32, VARIANTS, Layer, address, indices, make_pattern, matrix, run

UNIT = {0: 2.0**-24, 1: 2.0**-8, 2: 2.0**-11, 3: 2.0**-53, TF32: 2.0**-11}  # by dtype code


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


def check_layer(layer: Layer) -> dict:
    """Errors of forward and backward in units of the rounding bound, and whether a second run gives the same bits."""
    p, dtype, code = layer.pattern, layer.dtype, layer.code
    outputs = (layer.y, layer.pre, layer.grad_x, layer.grad_values, layer.grad_bias)

    def once():
        for tensor in outputs:
            tensor.fill_(float("nan"))
        layer.forward(pre=True)
        layer.backward()
        return [tensor.clone() for tensor in outputs]

    first, second = once(), once()
    x, weight = layer.x.double(), p.dense(layer.values)
    shift = layer.bias.double() if layer.bias is not None else torch.zeros(p.rows, dtype=torch.float64, device=DEVICE)
    z, size = x @ weight.T + shift, x.abs() @ weight.abs().T + shift.abs()
    apply = {
        "none": lambda t: t,
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "silu": torch.nn.functional.silu,
    }
    exact = layer.grad_y.double() * derivative(layer.saved.double(), layer.activation)
    grad_z = exact if layer.activation == "none" else exact.to(dtype).double()
    loose = 1.0 if layer.activation == "none" else 4.0  # grad_z itself is rounded once
    errors = {
        "pre_activation": excess(first[1], z, size, code, p.cols),
        "y": excess(first[0], apply[layer.activation](z), 1.2 * size, code, p.cols),
        "grad_x": excess(first[2], grad_z @ weight, loose * (grad_z.abs() @ weight.abs()), code, p.rows),
        "grad_bias": excess(first[4], grad_z.sum(0), loose * grad_z.abs().sum(0), code, layer.batch),
    }
    if p.num_blocks:
        errors["grad_values"] = excess(
            first[3], p.blocks_of(grad_z.T @ x), loose * p.blocks_of(grad_z.abs().T @ x.abs()), code, layer.batch
        )
    same = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, second, strict=True))
    return {"errors": errors, "repeats": same}


def check_norms(ops, layer: Layer) -> dict:
    """Squared norms of the dense gradient's blocks, and candidate gradients at the pattern's own places."""
    p, code = layer.pattern, layer.code
    norms = torch.full(p.shape, float("nan"), device=DEVICE)
    call, operands = (code, p.block, 1), (matrix(layer.x), matrix(layer.grad_y))
    ops.gradient_norms(call, *operands, (0, p.shape[0]), address(norms), run())
    gradient = layer.grad_y.double().T @ layer.x.double()
    b = p.block
    full = torch.zeros(p.shape[0] * b, p.shape[1] * b, dtype=torch.float64, device=DEVICE)
    full[: p.rows, : p.cols] = gradient
    expected = full.view(p.shape[0], b, p.shape[1], b).square().sum((1, 3))
    relative = ((norms.double() - expected).abs() / (expected + 1e-6 * expected.mean())).max().item()
    errors = {"norms": relative / (1e-2 if code == TF32 else 1e-4) if relative == relative else float("inf")}
    if p.num_blocks:
        grads = torch.full((p.num_blocks, b, b), float("nan"), dtype=layer.dtype, device=DEVICE)
        places = indices(p.arrays[2], p.num_blocks), indices(p.arrays[1], p.num_blocks)
        ops.candidate_gradients(call, *operands, places, address(grads), run())
        size = p.blocks_of(layer.grad_y.double().abs().T @ layer.x.double().abs())
        errors["candidates"] = excess(grads, p.blocks_of(gradient), size, code, layer.batch)
    return {"errors": errors, "repeats": True}


def check_pattern(ops, shape: tuple, density: float) -> dict:
    """Canonical indices and the transpose against torch."""
    p = make_pattern(ops, "random", *shape, 1, density, DTYPES[torch.float32], 1)
    crow, col, row, _, t_row, t_block = p.arrays
    n, key = p.num_blocks, row.long() * shape[1] + col.long()
    transposed = torch.argsort(col[:n].long() * shape[0] + row[:n].long())
    wrong = {
        "sorted": not bool((key[: n - 1] < key[1:n]).all()),
        "pointers": not torch.equal(
            crow.long(), torch.searchsorted(row[:n].long(), torch.arange(shape[0] + 1, device=DEVICE))
        ),
        "transpose": not (torch.equal(t_block[:n].long(), transposed) and torch.equal(t_row[:n], row[:n][transposed])),
    }
    return {"errors": {name: float("inf") if bad else 0.0 for name, bad in wrong.items()}, "repeats": True}


def correctness(ops, small: bool) -> dict:
    """Every op, variant, dtype and block size on random and adversarial patterns."""
    cases, worst, failures = 0, {}, []

    def record(name: str, result: dict) -> None:
        nonlocal cases
        cases += 1
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        for output, error in result["errors"].items():
            variant = name.split()[0]
            worst[f"{variant} {output}"] = max(worst.get(f"{variant} {output}", 0.0), error)
            if not error <= 1:
                failures.append(f"{name}: {output} is {error:.3g} times its rounding bound")
        if not result["repeats"]:
            failures.append(f"{name}: two runs differ in their bits")

    kinds = ("random", "full_row") if small else ("random", "power_law", "empty_rows", "full_row", "none", "dense")
    for variant in ("simt", "sm80"):
        ops.force_variant(VARIANTS[variant])
        blocks = (4, 16, 32, 64, 128) if variant == "simt" else (16, 32, 64, 128)
        codes = (0, 1, 3) if variant == "simt" else (1, TF32, 2)
        for number, (block, kind) in enumerate(
            (b, k) for b in ((1, 8, *blocks) if variant == "simt" and not small else blocks) for k in kinds
        ):
            dtypes = {code: dtype for dtype, code in DTYPES.items()} | {TF32: torch.float32}
            for code in codes[: 3 - small]:
                dtype = dtypes[code]
                batch = (8, 33, 130, 517)[number % (3 if small else 4)]
                if small:
                    rows, cols = 2 * block + 19, 3 * block + 8
                else:
                    rows, cols = max(8 * block + 21, 150), max(9 * block + 13, 170)
                pattern = make_pattern(
                    ops, kind, rows, cols, block, 0.3, code, batch, seed=number, split=(None, 3)[number % 2]
                )
                layer = Layer(
                    pattern,
                    batch,
                    dtype,
                    list(ACTIVATIONS)[number % 4],
                    number % 2 == 0,
                    (-cols % 8, -rows % 8) if number % 5 else (0, 0),
                    seed=number,
                    tf32=code == TF32,
                )
                type_name = "tf32" if code == TF32 else str(dtype)[6:]
                name = f"{variant} {kind} b={block} batch={batch} {rows}x{cols} {type_name}"
                record(name, check_layer(layer))
                record(name, check_norms(ops, layer))
    ops.force_variant(0)
    for shape, density in (((70, 90), 0.5),) if small else (((70, 90), 0.5), ((1500, 1700), 0.3), ((3, 4000), 0.9)):
        record(f"pattern {shape}", check_pattern(ops, shape, density))
    return {"cases": cases, "failures": failures, "worst_over_bound": worst, "passed": not failures}
