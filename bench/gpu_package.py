"""The Python path on the device, as a user takes it: layers, training, rewiring, compaction, checkpoints, a CUDA graph.

What the device computes is held against the same program on the CPU, or against dense float64 arithmetic.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from gpu_cases import Case
from gpu_correctness import excess
from gpu_ops import CODES, DEVICE, on_cpu, synchronize

SIZES = (70, 150, 90, 33)


def verdict(wrong: list[str], **more) -> dict:
    """A case's result: passed if nothing was wrong."""
    return {"passed": not wrong, **more, **({"error": "; ".join(wrong)} if wrong else {})}


def model_on(device: torch.device, dtype: torch.dtype, block: int = 16):
    """A sparse network with the same weights on every device."""
    import sparsenet as sn

    generator = torch.Generator().manual_seed(5)
    return sn.SparseMLP(SIZES, density=0.4, block_size=block, dtype=dtype, generator=generator).to(device)


def batch_on(device: torch.device, dtype: torch.dtype, step: int = 0, rows: int = 37) -> torch.Tensor:
    """Inputs, the same on every device."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(rows, SIZES[0], generator=generator, dtype=torch.float64).to(device, dtype)


def sparse_linear(name: str, block: int, activation: str) -> dict:
    """One layer, forward and backward through autograd, against dense float64."""
    import sparsenet as sn

    dtype = getattr(torch, name)
    generator = torch.Generator().manual_seed(block)
    options = {"density": 0.4, "block_size": block, "activation": activation, "dtype": dtype, "generator": generator}
    layer = sn.SparseLinear(4 * block + 3, 3 * block + 5, **options).to(DEVICE)
    x = torch.randn(45, layer.in_features, generator=generator).to(DEVICE, dtype).requires_grad_()
    y = layer(x)
    grad = torch.randn(y.shape, generator=generator).to(DEVICE, dtype)
    y.backward(grad)
    weight = layer.weight_dense().detach().double().requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    z = torch.nn.functional.linear(exact_x, weight, layer.bias.detach().double())
    exact = z if activation == "none" else getattr(torch.nn.functional, activation)(z)
    exact.backward(grad.double())
    size = exact_x.detach().abs() @ weight.detach().abs().T + layer.bias.detach().double().abs()
    through, code, loose = grad.double().abs(), CODES[name], 8.0  # the activation's own error reaches the gradients
    grads = [loose * through @ weight.detach().abs(), loose * through.T @ exact_x.detach().abs()]
    pattern, b = layer.pattern, block
    padded = torch.nn.functional.pad(torch.stack([weight.grad, grads[1]]), (0, -(4 * b + 3) % b, 0, -(3 * b + 5) % b))
    tiles = padded.view(2, pattern.block_rows, b, pattern.block_cols, b).transpose(2, 3)
    blocks = tiles[:, pattern.row_indices.long(), pattern.col_indices.long()]
    errors = {
        "y": excess(y.detach(), exact.detach(), 1.2 * size, code, layer.in_features),
        "grad_x": excess(x.grad, exact_x.grad, grads[0], code, layer.out_features),
        "grad_values": excess(layer.values.grad, blocks[0], blocks[1], code, len(x)),
    }
    return verdict([f"{n} is {e:.3g} times its bound" for n, e in errors.items() if not e <= 1], errors=errors)


def train(device: torch.device, policy: str, steps: int = 6) -> tuple[list[str], list[torch.Tensor]]:
    """Patterns and weights after a few steps with AdamW, the second and every second one after it rewiring."""
    import sparsenet as sn

    model = model_on(device, torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier = sn.Sparsifier(model, optimizer, getattr(sn, policy)(drop_fraction=0.3), every=2, seed=3)
    for step in range(steps):
        loss = model(batch_on(device, torch.float64, step)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sparsifier.step()
    moments = [optimizer.state[layer.values]["exp_avg"] for layer in model]
    state = [*(p.detach() for p in model.parameters()), *moments]
    return [layer.pattern.fingerprint for layer in model], [t.cpu() for t in state]


def differences(ours, theirs) -> list[str]:
    """What the device's training says otherwise than the CPU's."""
    wrong = [f"layer {i}: other blocks" for i, (a, b) in enumerate(zip(ours[0], theirs[0], strict=True)) if a != b]
    if not wrong:
        apart = [float((a - b).abs().max()) for a, b in zip(ours[1], theirs[1], strict=True) if a.numel()]
        wrong = [f"tensor {i}: {d:.3g} apart" for i, d in enumerate(apart) if not d <= 1e-9]
    return wrong


def rewiring(policy: str) -> dict:
    """Training that rewires, optimizer state included: the same blocks and numbers as on the CPU."""
    with on_cpu() as cpu:
        expected = train(cpu, policy)
    return verdict(differences(train(DEVICE, policy), expected))


def compacted(device: torch.device) -> tuple[list[str], list[torch.Tensor]]:
    """Patterns, weights and outputs after units without any weight left the network."""
    import sparsenet as sn

    model = model_on(device, torch.float64, block=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(batch_on(device, torch.float64)).square().mean().backward()
    optimizer.step()
    report = sn.compact(model, optimizer, remove={"0": list(range(3, 150, 4)), "1": list(range(40))})
    if report.removed < 48:
        raise RuntimeError(f"compaction: at least 48 units must go, got {report.removed}")
    state = [*(p.detach() for p in model.parameters()), *(optimizer.state[layer.values]["exp_avg"] for layer in model)]
    return (
        [layer.pattern.fingerprint for layer in model],
        [t.cpu() for t in (*state, model(batch_on(device, torch.float64, 1)).detach())],
    )


def compaction() -> dict:
    """Removing units moves the same blocks to the same places as on the CPU."""
    with on_cpu() as cpu:
        expected = compacted(cpu)
    return verdict(differences(compacted(DEVICE), expected))


def pattern_ops() -> dict:
    """Sorting places, picking extremes and the transposed index against torch's stable sort."""
    from sparsenet import BlockPattern, functional

    wrong = []
    generator = torch.Generator().manual_seed(1)
    for rows, cols, count in ((70, 90, 300), (3, 4000, 5000), (1500, 1700, 40000)):
        keys = torch.randperm(rows * cols, generator=generator)[:count].to(DEVICE)
        scores = torch.randint(-50, 50, (count,), generator=generator).to(DEVICE).float()
        for largest in (True, False):
            best = torch.argsort(scores, stable=True, descending=largest)[: count // 3].sort().values
            picked = functional.select_extreme(scores, count // 3, largest)
            wrong += [] if torch.equal(picked, best) else [f"select_extreme of {count}, largest={largest}"]
        pattern = BlockPattern.from_places(keys // cols, keys % cols, (rows, cols), 1)
        wrong += [] if torch.equal(pattern.linear_places(), keys.sort().values) else [f"from_places of {count}"]
        rows_by_column = torch.as_tensor(pattern.native.t_row, device=DEVICE).long()
        by_column = torch.argsort(keys.sort().values % cols, stable=True)
        expected = (keys.sort().values // cols)[by_column]
        wrong += [] if torch.equal(rows_by_column, expected) else [f"transposed index of {count}"]
    for places in ([1, 0, 1], [2, 0, 2]), ([0], [0]):
        try:
            BlockPattern.from_places(*(torch.tensor(t, device=DEVICE) for t in places), (2, 3), 1)
            refused = False
        except ValueError as error:
            refused = "places must differ" in str(error)
        wrong += [] if refused == (len(places[0]) == 3) else [f"equal places of {places}"]
    return verdict(wrong)


def checkpoints() -> dict:
    """A network saved from the device and loaded onto it computes the same bits."""
    import sparsenet as sn

    model = model_on(DEVICE, torch.float32)
    x = batch_on(DEVICE, torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        sn.save(Path(folder) / "model.safetensors", model)
        again = model_on(DEVICE, torch.float32)
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.zero_()
        sn.load(Path(folder) / "model.safetensors", again)
    return verdict([] if torch.equal(model(x), again(x)) else ["other outputs after loading"])


def half_training() -> dict:
    """Twenty steps in bfloat16 with a rewire halve the loss."""
    import sparsenet as sn

    model = model_on(DEVICE, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    sparsifier = sn.Sparsifier(model, optimizer, sn.RigL(drop_fraction=0.1), every=10)
    x, losses = batch_on(DEVICE, torch.bfloat16, rows=64), []
    target = x[:, : SIZES[-1]].float().tanh()
    for _ in range(20):
        loss = (model(x).float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sparsifier.step()
        losses.append(loss.item())
    return verdict([] if losses[-1] < 0.5 * losses[0] else [f"loss from {losses[0]:.3g} to {losses[-1]:.3g}"])


def graph() -> dict:
    """A forward captured in a CUDA graph after a warm-up replays to the same bits on new inputs."""
    if DEVICE.type != "cuda":
        return {"passed": True, "note": "no CUDA graphs here"}
    model, x = model_on(DEVICE, torch.bfloat16), batch_on(DEVICE, torch.bfloat16)
    with torch.no_grad():
        model(x)
        synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            y = model(x)
        x.copy_(batch_on(DEVICE, torch.bfloat16, 9))
        captured.replay()
        synchronize()
        return verdict([] if torch.equal(y, model(x)) else ["a replay differs from a call"])


def package_cases() -> Iterator[Case]:
    """The most important first."""
    linear = (("bfloat16", 32, "relu"), ("float32", 16, "gelu"), ("float16", 64, "none"), ("float64", 8, "silu"))
    for name, block, activation in linear:
        yield Case(
            f"SparseLinear {name} b={block} {activation}", "layer", partial(sparse_linear, name, block, activation)
        )
    yield Case("training with RigL", "training", partial(rewiring, "RigL"))
    yield Case("pattern operations", "package", pattern_ops)
    yield Case("compaction", "training", compaction)
    yield Case("training in bfloat16", "training", half_training)
    yield Case("CUDA graph", "package", graph)
    yield Case("training with SET", "training", partial(rewiring, "SET"))
    yield Case("checkpoint", "package", checkpoints)
