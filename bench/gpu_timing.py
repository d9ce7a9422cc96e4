"""Times of the CUDA kernels, of their rivals, and of the machine itself."""

from __future__ import annotations

import contextlib
import statistics

import torch
from gpu_ops import DEVICE, DTYPES, TF32, Layer, Pattern, address, make_pattern, matrix, run, stream

TYPES = {  # name: element type, dtype code
    "bfloat16": (torch.bfloat16, DTYPES[torch.bfloat16]),
    "float32": (torch.float32, DTYPES[torch.float32]),
    "tf32": (torch.float32, TF32),
}
TILE = 128  # output columns, and batch rows above 64, of an sm_80 CTA; both sides of the norms' tile


def time_us(run, repeats: int = 12, calls: int = 4) -> dict:
    """Median and quartiles of one call in microseconds; `run(i)` takes the i-th set of buffers."""
    for i in range(3):
        run(i)
    samples = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for i in range(calls):
            run(i)
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) * 1000 / calls)
    quartiles = statistics.quantiles(samples, n=4)
    return {"median_us": statistics.median(samples), "low_us": quartiles[0], "high_us": quartiles[2]}


@contextlib.contextmanager
def precision(name: str):
    """Inside the block torch multiplies float32 as the type's name says."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def ceilings() -> dict:
    """Copy bandwidth, bandwidth of a copy that stays in L2, and the rate of large dense products."""
    large = [torch.empty(2**30, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    small = torch.empty(8 * 2**20, dtype=torch.uint8, device=DEVICE)
    small_target = torch.empty_like(small)
    copy = time_us(lambda i: large[1].copy_(large[0]))["median_us"]
    cached = time_us(lambda i: small_target.copy_(small), calls=50)["median_us"]
    large.clear()
    rates = {}
    for name, (dtype, _) in TYPES.items():
        n = 4096 if name == "float32" else 8192
        a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
        with precision(name):
            rates[name] = 2 * n**3 / time_us(lambda i, a=a, b=b: a @ b, repeats=8, calls=2)["median_us"] / 1e6
    return {
        "copy_gb_per_s": 2 * 2**30 / copy / 1e3,
        "l2_copy_gb_per_s": 2 * small.numel() / cached / 1e3,
        "dense_tflop_per_s": rates,
    }


def tile_loads(lines: torch.Tensor, others: torch.Tensor, group: int) -> int:
    """Columns of blocks that CTAs of ``group`` lines load: each group loads a column that several lines have once."""
    return torch.unique(torch.stack([lines.long() // group, others.long()]), dim=1).shape[1]


def roofline_us(p: Pattern, batch: int, name: str, ceiling: dict) -> dict:
    """Least microseconds of each pass, by name: the largest of three bounds.

    FLOP at the rate of large dense products; every operand and result once at the bandwidth of a copy; what the tiles
    of the sm_80 kernels load at the bandwidth of a copy within L2 (docs/kernels/block_sparse_linear_cuda.md).
    """
    item, b, n = TYPES[name][0].itemsize, p.block, p.num_blocks
    row, col = p.arrays[2][:n], p.arrays[1][:n]
    tiles, group = -(-batch // TILE), max(TILE // b, 1)
    weights, x, y = n * b * b * item, batch * p.cols * item, batch * p.rows * item
    flop, dense_tiles = 2 * batch * n * b * b, -(-p.rows // TILE) * -(-p.cols // TILE)
    passes = {  # FLOP, bytes of memory, bytes from L2
        "forward": (flop, x + weights + y, tiles * weights + batch * b * item * tile_loads(row, col, group)),
        "grad_input": (flop, x + weights + y, tiles * weights + batch * b * item * tile_loads(col, row, group)),
        "grad_weight": (flop, x + weights + y, 2 * batch * n * b * item),
        "gradient_norms": (2 * batch * p.rows * p.cols, x + y, 2 * batch * TILE * item * dense_tiles),
    }
    return {
        key: max(
            flops / ceiling["dense_tflop_per_s"][name] / 1e6,
            memory / ceiling["copy_gb_per_s"] / 1e3,
            cached / ceiling["l2_copy_gb_per_s"] / 1e3,
        )
        for key, (flops, memory, cached) in passes.items()
    }


def rivals(layer: Layer, density: float) -> dict:
    """Dense cuBLAS (the yardstick), torch BSR, cuSPARSE and a dense layer with as many parameters, where they run."""
    p, dtype = layer.pattern, layer.dtype
    weight, x, grad_y = p.dense(layer.values).to(dtype), layer.x.contiguous(), layer.grad_y.contiguous()
    narrow = weight[: max(8, int(p.rows * density) // 8 * 8)].contiguous()
    runs = {
        "dense_forward": lambda i: torch.nn.functional.linear(x, weight),
        "dense_grad_input": lambda i: grad_y @ weight,
        "dense_grad_weight": lambda i: grad_y.T @ x,
        "equal_parameters_forward": lambda i: torch.nn.functional.linear(x, narrow),
    }
    result = {name: time_us(run, repeats=8) for name, run in runs.items()}
    try:
        bsr = weight.to_sparse_bsr((p.block, p.block))
        result["torch_bsr_forward"] = time_us(lambda i: torch.nn.functional.linear(x, bsr), repeats=6)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        result["torch_bsr_forward"] = {"error": str(error).splitlines()[0][:200]}
    try:
        import cupy
        from cupyx.scipy import sparse

        with contextlib.suppress(AttributeError):
            cupy.cuda.ExternalStream(stream()).use()
        matrix = sparse.csr_matrix(cupy.from_dlpack(weight.float()))
        columns = cupy.asfortranarray(cupy.from_dlpack(x.float().T.contiguous()))
        result["cusparse_csr_float32_forward"] = time_us(lambda i: matrix @ columns, repeats=4, calls=2)
    except Exception as error:  # another program's failure is a result here, not ours
        result["cusparse_csr_float32_forward"] = {"error": f"{type(error).__name__}: {error}"[:200]}
    return result


def bench_case(ops, case: tuple, ceiling: dict, dense: dict) -> dict:
    """Times of one of bench_cases(): each pass and the growth norms, against dense and against the roofline."""
    rows, cols, batch, density, block, name, kind, with_rivals = case
    dtype, code = TYPES[name]
    pattern = make_pattern(ops, kind, rows, cols, block, density, code, batch, seed=1)
    layers = [
        Layer(pattern, batch, dtype, bias=False, seed=i, tf32=code == TF32)
        for i in range(2 if batch * (rows + cols) > 2**24 else 4)
    ]

    def cycle(call):
        return lambda i: call(layers[i % len(layers)])

    norms = torch.empty(pattern.shape, device=DEVICE)

    def growth(layer):
        block_rows = (0, pattern.shape[0])
        ops.gradient_norms((code, block, 1), matrix(layer.x), matrix(layer.grad_y), block_rows, address(norms), run())

    passes = {
        "forward": cycle(Layer.forward),
        "grad_input": cycle(lambda layer: layer.backward("x")),
        "grad_weight": cycle(lambda layer: layer.backward("w")),
        "gradient_norms": cycle(growth),
    }
    times = {key: time_us(run) for key, run in passes.items()}
    kernels = [
        ops.choose_linear_forward(*layers[0].forward_call()),
        *ops.choose_linear_backward(*layers[0].backward_call("xw")),
    ]
    key = (rows, cols, batch, name)
    if with_rivals or key not in dense:
        with precision(name):
            dense[key] = {**dense.get(key, {}), **rivals(layers[0], density)}
    real = pattern.num_blocks * block * block / (rows * cols)
    flop = 2 * batch * pattern.num_blocks * block * block
    linear = ("forward", "grad_input", "grad_weight")
    least = roofline_us(pattern, batch, name, ceiling)
    return {
        "rows": rows,
        "cols": cols,
        "batch": batch,
        "density": density,
        "block": block,
        "dtype": name,
        "pattern": kind,
        "kernels": kernels,
        "times": times,
        "rivals": dict(dense[key]),
        "eff": {n: real * dense[key][f"dense_{n}"]["median_us"] / times[n]["median_us"] for n in linear},
        "of_roofline": {n: least[n] / times[n]["median_us"] for n in times},
        "norms_over_dense_grad_weight": times["gradient_norms"]["median_us"]
        / dense[key]["dense_grad_weight"]["median_us"],
        "active_tflop_per_s": {n: flop / times[n]["median_us"] / 1e6 for n in linear},
    }


def bench_rewire(ops, side: int = 16384, batch: int = 2048) -> dict:
    """A rewire of a 16,384^2 layer at 5 %, scores given: rank, new pattern and lists, gather values. And a step."""
    block, dtype = 32, torch.bfloat16
    p = make_pattern(ops, "random", side, side, block, 0.05, DTYPES[dtype], batch, seed=3)
    layer = Layer(p, batch, dtype, bias=False)
    k, total = p.num_blocks // 10, p.shape[0] * p.shape[1]
    drop_scores, grow_scores = (torch.rand(n, device=DEVICE) for n in (p.num_blocks, total - p.num_blocks))

    def rewire(_):
        at = p.arrays[2].long() * p.shape[1] + p.arrays[1]
        kept = drop_scores.sort(stable=True).indices[k:]
        active = torch.zeros(total, dtype=torch.bool, device=DEVICE)
        active[at] = True
        free = (~active).nonzero().flatten()
        grown = free[grow_scores.sort(descending=True, stable=True).indices[:k]]
        places = torch.cat([at[kept], grown])
        rows, cols = (places // p.shape[1]).int(), (places % p.shape[1]).int()
        new = Pattern(ops, rows, cols, side, side, block, DTYPES[dtype], batch)
        values = torch.cat([layer.values[kept], layer.values.new_zeros(k, block, block)])[new.order]
        assert len(values) == new.num_blocks

    def step(_):
        layer.forward()
        layer.backward()

    times = {"rewire": time_us(rewire, repeats=8, calls=2), "training_step": time_us(step, repeats=8, calls=2)}
    over_step = times["rewire"]["median_us"] / times["training_step"]["median_us"]
    return {"side": side, "density": 0.05, "block": block, "batch": batch, **times, "rewire_over_step": over_step}


def bench_cases():
    """(rows, cols, batch, density, block, dtype, pattern, rivals), the most telling first."""
    bf16 = "bfloat16"
    for block in (32, 64, 128, 16):
        for density in (0.1, 0.05, 0.2, 0.02, 0.5):
            yield 4096, 4096, 2048, density, block, bf16, "random", density == 0.1
    for batch in (1, 16, 128, 512, 8192):
        for block in (32, 64):
            yield 4096, 4096, batch, 0.1, block, bf16, "random", False
    for rows, cols in ((4096, 1024), (11008, 4096), (3072, 768), (16384, 16384)):
        yield rows, cols, 2048, 0.1, 32, bf16, "random", True
    for kind in ("power_law", "full_row", "empty_rows"):
        yield 4096, 4096, 2048, 0.05, 32, bf16, kind, False
    for name in ("tf32", "float32"):
        for block in (32, 64):
            yield 4096, 4096, 512, 0.1, block, name, "random", True
    for block in (32, 64, 128, 16):
        for density in (0.01, 1.0):
            yield 4096, 4096, 2048, density, block, bf16, "random", False
            yield 8192, 8192, 2048, min(density * 5, 0.5), block, bf16, "random", False


def table(results: list[dict]) -> str:
    """The benches as a table: microseconds; in brackets the speed per active FLOP over dense, and over the roofline."""
    lines = [
        "| shape | batch | density | block | dtype | pattern | forward | grad_input | grad_weight | norms / dense "
        "| dense forward |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        cells = [
            f"{r['times'][n]['median_us']:.0f} ({r['eff'][n]:.2f}, {r['of_roofline'][n]:.2f})"
            for n in ("forward", "grad_input", "grad_weight")
        ]
        lines.append(
            f"| {r['rows']}x{r['cols']} | {r['batch']} | {r['density']:.0%} | {r['block']} | {r['dtype']} "
            f"| {r['pattern']} | " + " | ".join(cells) + f" | {r['norms_over_dense_grad_weight']:.2f} | "
            f"{r['rivals']['dense_forward']['median_us']:.0f} |"
        )
    return "\n".join(lines)
