"""Timing on a GPU and what times are held against: the machine's ceilings, a roofline, other libraries."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable

import torch
from gpu_ops import DEVICE, Layer, Pattern, synchronize, torch_dtype

TYPES = ("bfloat16", "float32", "tf32")
TILE = 128  # output columns, and batch rows above 64, of an sm_80 CTA; both sides of the norms' tile
SAMPLE_US = 2000.0  # about how long one sample lasts: the clock ticks every half microsecond
MOST_CALLS = 256


def elapsed_us(run: Callable[[], None]) -> float:
    """Microseconds from the first kernel of ``run()`` to the end of its last; where there is no GPU, by the clock."""
    if DEVICE.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e6
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1000


def captured(run: Callable[[], None]) -> Callable[[], None] | None:
    """``run()`` as the replay of a CUDA graph, which leaves Python's own time out; None where it can't be captured."""
    if DEVICE.type != "cuda":
        return None
    stream = torch.cuda.current_stream()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay
    except RuntimeError:
        torch.cuda.set_stream(stream)
        synchronize()
        return None


def time_us(run: Callable[[int], None], repeats: int = 12, graph: bool = True) -> dict:
    """Median and quartiles of one call in microseconds; ``run(i)`` takes the i-th set of buffers."""
    emulated = DEVICE.type != "cuda"
    for i in range(1 if emulated else 3):
        run(i)
    once = elapsed_us(lambda: run(0))
    calls = 1 if emulated else max(4, min(MOST_CALLS, int(SAMPLE_US / max(once, 1.0))))

    def several() -> None:
        for i in range(calls):
            run(i)

    replay = captured(several) if graph else None
    sample = replay or several
    sample()
    samples = [elapsed_us(sample) / calls for _ in range(2 if emulated else repeats)]
    low, median, high = statistics.quantiles(samples, n=4)
    return {"median_us": median, "low_us": low, "high_us": high, "calls": calls, "graph": replay is not None}


@contextlib.contextmanager
def precision(name: str):
    """Inside the block torch multiplies float32 as the type's name says."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def ceilings(tiny: bool = False) -> dict:
    """Bandwidth of a copy in GB/s, of one that stays in L2, and TFLOP/s of large dense products by type."""
    large = [torch.empty(2**16 if tiny else 2**30, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    small = torch.empty(2**16 if tiny else 8 * 2**20, dtype=torch.uint8, device=DEVICE)
    small_target, size = torch.empty_like(small), large[0].numel()
    copy = time_us(lambda i: large[1].copy_(large[0]))["median_us"]
    cached = time_us(lambda i: small_target.copy_(small))["median_us"]
    large.clear()
    rates = {}
    for name in TYPES:
        n = 64 if tiny else 4096 if name == "float32" else 8192
        a, b = (torch.randn(n, n, device=DEVICE).to(torch_dtype(name)) for _ in range(2))
        with precision(name):
            rates[name] = 2 * n**3 / time_us(lambda i, a=a, b=b: a @ b, repeats=8)["median_us"] / 1e6
    return {
        "copy_gb_per_s": 2 * size / copy / 1e3,
        "l2_copy_gb_per_s": 2 * small.numel() / cached / 1e3,
        "dense_tflop_per_s": rates,
    }


def tile_loads(lines: torch.Tensor, others: torch.Tensor, group: int) -> int:
    """Columns of blocks that CTAs of ``group`` lines load: each group loads a column that several lines have once."""
    return torch.unique(torch.stack([lines // group, others]), dim=1).shape[1]


def roofline_us(p: Pattern, batch: int, name: str, ceiling: dict) -> dict:
    """Least microseconds of each pass, by name: the largest of three bounds.

    FLOP at the rate of large dense products; every operand and result once at the bandwidth of a copy; what the tiles
    of the sm_80 kernels load at the bandwidth of a copy within L2 (docs/kernels/block_sparse_linear_cuda.md).
    """
    item, b, n = torch_dtype(name).itemsize, p.block, p.num_blocks
    tiles, group = -(-batch // TILE), max(TILE // b, 1)
    weights, x, y = n * b * b * item, batch * p.cols * item, batch * p.rows * item
    flop, dense_tiles = 2 * batch * n * b * b, -(-p.rows // TILE) * -(-p.cols // TILE)
    loads = {"forward": tile_loads(p.row, p.col, group), "grad_input": tile_loads(p.col, p.row, group)}
    passes = {  # FLOP, bytes of memory, bytes from L2
        key: (flop, x + weights + y, tiles * weights + batch * b * item * count) for key, count in loads.items()
    }
    passes["grad_weight"] = (flop, x + weights + y, 2 * batch * n * b * item)
    passes["gradient_norms"] = (2 * batch * p.rows * p.cols, x + y, 2 * batch * TILE * item * dense_tiles)
    return {
        key: max(
            flops / ceiling["dense_tflop_per_s"][name] / 1e6,
            memory / ceiling["copy_gb_per_s"] / 1e3,
            cached / ceiling["l2_copy_gb_per_s"] / 1e3,
        )
        for key, (flops, memory, cached) in passes.items()
    }


def dense_times(layers: list[Layer], name: str) -> dict:
    """cuBLAS on the same operands, the yardstick: each pass of a dense layer of the same shape."""
    sets = [
        (layer.x.contiguous(), layer.grad_y.contiguous(), layer.pattern.dense(layer.values).to(layer.dtype))
        for layer in layers[:4]
    ]

    def cycle(call):
        return lambda i: call(*sets[i % len(sets)])

    runs = {
        "forward": cycle(lambda x, g, w: torch.nn.functional.linear(x, w)),
        "grad_input": cycle(lambda x, g, w: g @ w),
        "grad_weight": cycle(lambda x, g, w: g.T @ x),
    }
    with precision(name):
        return {key: time_us(run) for key, run in runs.items()}


def rivals(layer: Layer, density: float) -> dict:
    """A dense layer with as many parameters, torch BSR and cuSPARSE, where they run."""
    p, dtype = layer.pattern, layer.dtype
    weight, x = p.dense(layer.values).to(dtype), layer.x.contiguous()
    narrow = weight[: max(8, int(p.rows * density) // 8 * 8)].contiguous()
    result = {"equal_parameters_forward": time_us(lambda i: torch.nn.functional.linear(x, narrow), repeats=8)}
    try:
        padded = torch.nn.functional.pad(weight, (0, -p.cols % p.block, 0, -p.rows % p.block))
        bsr = padded.to_sparse_bsr((p.block, p.block))
        x_bsr = torch.nn.functional.pad(x, (0, -p.cols % p.block))
        run = time_us(lambda i: torch.nn.functional.linear(x_bsr, bsr), repeats=6, graph=False)
        result["torch_bsr_forward"] = run
    except (RuntimeError, NotImplementedError, ValueError) as error:
        result["torch_bsr_forward"] = {"error": str(error).splitlines()[0][:200]}
    try:
        import cupy
        from cupyx.scipy import sparse

        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            matrix = sparse.csr_matrix(cupy.from_dlpack(weight.float()))
            columns = cupy.asfortranarray(cupy.from_dlpack(x.float().T.contiguous()))
            run = time_us(lambda i: matrix @ columns, repeats=4, graph=False)
        result["cusparse_csr_float32_forward"] = run
    except Exception as error:  # another program's failure is a result here, not ours
        result["cusparse_csr_float32_forward"] = {"error": f"{type(error).__name__}: {error}"[:200]}
    return result
