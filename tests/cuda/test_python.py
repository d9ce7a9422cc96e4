"""The whole Python path on the CUDA kernels: functional, layers, Sparsifier, compaction, checkpoints, compilation.

``cuda_emulated.serving`` makes the emulated kernels serve CPU tensors, through the same CudaKernels that serve a GPU;
results are compared with the CPU's module. The slow test runs the CPU's own op, layer and Sparsifier tests that way.
"""

from __future__ import annotations

import contextlib
import os

import cuda_emulated as emulated
import pytest
import torch

import sparsenet as sn
from sparsenet import functional, testing
from sparsenet.functional.cuda import CudaKernels
from sparsenet.policies import POLICIES

pytestmark = pytest.mark.skipif(
    os.environ.get("SPARSENET_TEST_DEVICE") == "cuda-emulated", reason="compares the CPU with the emulated device"
)


@pytest.fixture
def module(request):
    module = emulated.load()
    module.configure(seed=emulated.seed_of(request))
    module.set_device()
    module.force_variant(0)
    module.launches()
    yield module
    module.force_variant(0)
    module.set_device()


def kernels_of(module) -> set[str]:
    return {launch["kernel"] for launch in module.launches()}


def on_both(run):
    """What ``run()`` returns on the CPU and on the emulated device."""
    expected = run()
    with emulated.serving():
        return expected, run()


def mlp(dtype=torch.float32, sizes=(70, 150, 90, 33), block_size=16, **options):
    generator = torch.Generator().manual_seed(3)
    return sn.SparseMLP(sizes, density=0.4, block_size=block_size, dtype=dtype, generator=generator, **options)


# --- operations -----------------------------------------------------------------------------------------------------

CASES = [  # block size, dtype, activation, batch: each value of one column meets several of the others
    (1, torch.float32, "gelu", 5),
    (4, torch.float64, "relu", 33),
    (8, torch.bfloat16, "silu", 40),
    (16, torch.bfloat16, "relu", 7),
    (16, torch.float32, "none", 64),
    (32, torch.float16, "gelu", 33),
    (32, torch.float64, "silu", 1),
    (64, torch.bfloat16, "none", 70),
    (128, torch.float16, "silu", 20),
    (128, torch.float32, "relu", 17),
]


@pytest.mark.parametrize(("block_size", "dtype", "activation", "batch"), CASES, ids=str)
def test_operations_match_float64(module, block_size, dtype, activation, batch):
    shape = (3 * block_size + 5, 4 * block_size + 3)
    case = testing.LinearCase(shape, block_size, dtype, batch, "half", activation, batch % 2 == 0, seed=batch)
    with emulated.serving():
        testing.check_linear(case)
        testing.check_norms(case)
        testing.check_candidates(case)
    assert len(kernels_of(module)) >= 8


INPUTS = {
    "three dimensions": lambda: torch.randn(2, 5, 70),
    "transposed": lambda: torch.randn(70, 9).t(),
    "expanded": lambda: torch.randn(1, 70).expand(6, 70),
    "every second": lambda: torch.randn(6, 140)[:, ::2],
    "no rows": lambda: torch.randn(0, 70),
    "one row": lambda: torch.randn(70),
}


@pytest.mark.parametrize("name", INPUTS)
def test_layouts_of_inputs(module, name):
    x = INPUTS[name]()

    def run():
        layer, leaf = mlp()[0], x.detach().requires_grad_()
        y = layer(leaf)
        y.backward(torch.ones(()).expand_as(y))
        return y.detach(), leaf.grad, layer.values.grad, layer.bias.grad

    for ours, theirs in zip(*on_both(run), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_observed_backward_gives_the_same_gradients(module):
    """Armed layers take the gradient before the activation from aten."""
    seen = []

    def run():
        layer = mlp(torch.float64)[0]
        layer.topology.observer = lambda x, g: seen.append((x, g))
        layer(torch.linspace(-1, 1, 9 * 70, dtype=torch.float64).view(9, 70)).square().sum().backward()
        return layer.values.grad

    ours, theirs = on_both(run)
    torch.testing.assert_close(theirs, ours)
    torch.testing.assert_close(seen[0], seen[1])


# --- patterns -------------------------------------------------------------------------------------------------------


def test_patterns_are_equal_and_refused_alike(module):
    def run():
        generator = torch.Generator().manual_seed(0)
        made = sn.BlockPattern.random((100, 130), 0.3, 8, generator)
        shuffled = torch.randperm(made.num_blocks, generator=generator)
        again = sn.BlockPattern.from_places(
            made.row_indices[shuffled], made.col_indices[shuffled].long(), made.shape, made.block_size
        )
        scores = torch.randn(500, generator=generator).round(decimals=1)
        native = made.copy().native
        return (
            made.fingerprint,
            again.fingerprint,
            [torch.as_tensor(t).tolist() for t in (native.row, native.t_crow, native.t_row, native.t_block)],
            functional.select_extreme(scores, 37, True).tolist(),
            functional.select_extreme(scores.double(), 37, False).tolist(),
        )

    ours, theirs = on_both(run)
    assert ours == theirs and ours[0] == ours[1]
    with emulated.serving():
        with pytest.raises(TypeError, match=r"BlockPattern: col_indices must be int32, got torch\.int64"):
            emulated.kernels().Pattern(torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0]), 4, 4, 4)
        with pytest.raises(ValueError, match=r"BlockPattern: places must differ, got \(1, 2\) twice"):
            sn.BlockPattern.from_places(torch.tensor([1, 0, 1]), torch.tensor([2, 0, 2]), (8, 12), 4)


SCORES = {
    "random": lambda: torch.randn(500),
    "many ties": lambda: torch.randint(-2, 3, (5000,)).float(),
    "signed zeros": lambda: torch.where(torch.rand(300) < 0.5, 0.0, -0.0),
    "denormals": lambda: torch.where(torch.rand(300) < 0.5, 1e-42, torch.randint(-1, 2, (300,)).float()),
    "infinite": lambda: torch.tensor([float("inf"), 0.0, float("-inf"), float("inf"), -0.0, float("-inf")]),
    "none": lambda: torch.zeros(0),
}


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("name", SCORES)
def test_ranking_with_ties_by_lower_index(module, name, largest):
    scores = SCORES[name]()
    for k in {0, min(1, len(scores)), len(scores) // 3, len(scores)}:
        ours, theirs = on_both(lambda k=k: functional.select_extreme(scores, k, largest))
        keys = (-scores if largest else scores).tolist()
        expected = sorted(sorted(range(len(keys)), key=lambda i: keys[i])[:k])
        assert theirs.dtype == torch.int64 and ours.tolist() == theirs.tolist() == expected


def refusal(run) -> str:
    with pytest.raises(ValueError) as caught:
        run()
    return str(caught.value)


def listed(places):
    return sn.BlockPattern.from_linear_places(places, (3, 5), 1)


def test_ranking_and_sorting_refuse_in_the_words_of_the_cpu(module):
    nan = torch.tensor([1.0, float("nan"), 0.0, float("nan")])
    places = torch.tensor([13, 1, 13, 1, 13])
    for run, words in (
        (lambda: functional.select_extreme(nan, 1, True), "select_extreme: scores must not be NaN, got NaN at 1"),
        (lambda: functional.select_extreme(nan, 5, True), "select_extreme: k must lie in [0, 4], got 5"),
        (lambda: functional.select_extreme(nan, -1, False), "select_extreme: k must lie in [0, 4], got -1"),
        (lambda: listed(places), "BlockPattern: places must differ, got (0, 1) twice"),
        (lambda: listed(places + 3), "BlockPattern: places must lie in [0, 15), got 16"),
        (lambda: listed(places[1:2] - 2), "BlockPattern: places must lie in [0, 15), got -1"),
    ):
        assert on_both(lambda run=run: refusal(run)) == (words, words)


@pytest.mark.parametrize("count", [0, 1, 2, 700])
def test_places_in_any_order(module, count):
    """The pattern of shuffled places, and what is carried to it from every other one of them."""
    shuffled = torch.randperm(31 * 41)[:count]

    def run():
        pattern, old = (sn.BlockPattern.from_linear_places(p, (31, 41), 1) for p in (shuffled, shuffled[::2]))
        return pattern.linear_places().tolist(), sn.pattern.carried_from(old, pattern).tolist()

    ours, theirs = on_both(run)
    assert ours == theirs and ours[0] == sorted(shuffled.tolist())
    kept = sorted(shuffled[::2].tolist())
    assert ours[1] == [kept.index(place) if place in kept else -1 for place in ours[0]]


def test_work_lists_are_made_once_and_not_while_capturing(module, monkeypatch):
    module.set_device(num_multiprocessors=64)
    with emulated.serving():
        layer = mlp(torch.bfloat16, (256, 640, 10), 32)[0]
        x = torch.randn(70, 256).bfloat16()
        monkeypatch.setattr(CudaKernels, "_capturing", lambda self: True)
        captured = layer(x)
        assert "work_list" not in kernels_of(module) and not layer.pattern.native.lists
        monkeypatch.undo()
        with_list = layer(x)
        assert "work_list" in kernels_of(module)
        torch.testing.assert_close(captured, with_list, rtol=2**-7, atol=2**-7)
        layer(x)
        layer(x[:66])  # another batch of the same power of two
        assert "work_list" not in kernels_of(module) and len(layer.pattern.native.lists) == 1
        layer(x.float().to(torch.bfloat16)).sum().backward()  # its transposed twin
        assert len(layer.pattern.native.lists) == 2


class Recorder:
    """The emulated ops; keeps the stream that every call was given."""

    def __init__(self, ops):
        self._ops, self.streams = ops, {}

    def __getattr__(self, name):
        found = getattr(self._ops, name)
        documented = found.__doc__ if callable(found) else ""
        if "run: " not in (documented or ""):
            return found

        def call(*arguments):
            self.streams[name], _allocate = arguments[-1]
            return found(*arguments)

        return call


def test_every_launch_goes_to_the_current_stream(module, monkeypatch):
    class Streamed(CudaKernels):
        def _stream(self):
            return 77

    recorder = Recorder(module)
    kernels = Streamed(recorder, torch.device("cpu"))
    monkeypatch.setattr(functional.native, "kernels_of", lambda device: kernels)
    layer = mlp(torch.float32)[0]
    layer(torch.randn(9, 70)).sum().backward()
    functional.block_gradient_squared_norms(torch.randn(4, 32), torch.randn(4, 16), 16)
    place = torch.zeros(1, dtype=torch.int64)
    functional.candidate_gradients(torch.randn(4, 32), torch.randn(4, 16), place, place, 16)
    functional.compact_blocks([layer.values], layer.pattern, torch.arange(150), torch.arange(70), layer.pattern)
    assert set(recorder.streams) == {
        *("pattern_from_csr", "build_work_list", "linear_forward", "linear_backward"),
        *("gradient_norms", "candidate_gradients", "compact_blocks"),
    }
    assert set(recorder.streams.values()) == {77}


def test_memory_used_on_another_stream_is_recorded(module, monkeypatch):
    """Indices made on one stream and read on another may not be given to somebody else too early."""
    recorded = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: recorded.append((self.data_ptr(), stream)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "side stream")
    with emulated.serving():
        layer = mlp()[0]
        layer(torch.randn(4, 70))
        assert recorded == []
        native = layer.pattern.native
        native.stream = 5
        layer(torch.randn(4, 70))
        addresses = {t.data_ptr() for t in (*native.arrays, *(kept for _, kept in native.lists.values()))}
    assert {address for address, _ in recorded} == addresses and {stream for _, stream in recorded} == {"side stream"}


# --- training -------------------------------------------------------------------------------------------------------


def train(model, sparsifier=None, optimizer=None, steps=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(9)
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(steps):
        x = torch.randn(24, model.sizes[0], generator=generator, dtype=torch.float64).to(dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if sparsifier is not None:
            sparsifier.step()
    return optimizer


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_rewires_as_on_the_cpu(module, policy):
    def run():
        model = mlp(torch.float64)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, amsgrad=True)
        density = sn.Linear(0.4, 0.25, 6) if policy != "static" else None
        if policy == "set":
            density = sn.Linear(0.4, 0.6, 6)
        sparsifier = sn.Sparsifier(
            model, optimizer, POLICIES[policy](), density=density, distribution="erdos_renyi", every=2
        )
        train(model, sparsifier, optimizer)
        state = [t for p in model.parameters() for t in optimizer.state[p].values() if torch.is_tensor(t)]
        return [layer.pattern.fingerprint for layer in model], [p.detach() for p in model.parameters()], state

    ours, theirs = on_both(run)
    assert ours[0] == theirs[0]
    torch.testing.assert_close(theirs[1:], ours[1:])
    start = [layer.pattern.fingerprint for layer in mlp(torch.float64)]
    assert policy == "static" or ours[0] != start
    assert {"compact_blocks", "candidate_gradients"}.isdisjoint(kernels_of(module))


@pytest.mark.parametrize("policy", ["set", "rigl"])
def test_a_rewire_takes_neither_weights_nor_scores_to_the_host(module, monkeypatch, policy):
    """What a GPU would have to wait for: single numbers and places, never a layer's values, scores or moments."""
    monkeypatch.setattr(functional.native, "handed", lambda t: t)  # CPU tensors go to the kernels as a GPU's would
    # numpy is the way of CPU tensors alone
    for module_of in ("policies.places", "functional.blocks"):
        monkeypatch.setattr(f"sparsenet.{module_of}.where_true", lambda mask: mask.nonzero().flatten())
    taken = []

    def watch(name):
        original = getattr(torch.Tensor, name)

        def taking(self, *arguments, **options):
            taken.append((self.dtype.is_floating_point, self.numel(), name))
            return original(self, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, name, taking)

    with emulated.serving():
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        sparsifier = sn.Sparsifier(model, optimizer, POLICIES[policy](0.5), every=2)
        train(model, sparsifier, optimizer, steps=1, dtype=torch.float32)
        x = torch.randn(24, 70)
        module.launches()
        for name in ("cpu", "numpy", "tolist", "item", "__array__", "__int__", "__float__", "__bool__", "__index__"):
            watch(name)
        model(x).square().mean().backward()
        optimizer.step()
        update = sparsifier.step()
    assert update.dropped == update.grown > 10
    assert any(numel == 1 for _, numel, _ in taken), "nothing was watched"
    assert all(numel <= 2 for floating, numel, _ in taken if floating), taken  # a number, or the two extremes of scores
    assert all(numel <= max(layer.pattern.num_blocks for layer in model) for _, numel, _ in taken)
    assert kernels_of(module) >= {"read_columns", "transpose_index"}


def test_survivors_keep_their_moments_bit_for_bit(module):
    with emulated.serving():
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        train(model, optimizer=optimizer, steps=2, dtype=torch.float32)
        layer = model[0]
        pattern, values = layer.pattern, layer.values.detach().clone()
        moments = {key: t.clone() for key, t in optimizer.state[layer.values].items()}
        sparsifier = sn.Sparsifier(model, optimizer, sn.SET(0.4), every=1)
        update = sparsifier.step()
        assert update.dropped == update.grown > 0
        carried = sn.pattern.carried_from(pattern, layer.pattern)
        stays, state = carried >= 0, optimizer.state[layer.values]
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key][stays], moments[key][carried[stays]])
            assert not state[key][~stays].any()
        assert torch.equal(layer.values[stays], values[carried[stays]]) and not layer.values[~stays].any()


def test_compaction_gathers_values_and_moments(module):
    def run():
        model = mlp(torch.float64, (40, 64, 24), 4)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        x = torch.linspace(-1, 1, 16 * 40, dtype=torch.float64).view(16, 40)
        model(x).square().mean().backward()
        optimizer.step()
        before = model(x).detach()
        sn.compact(model, optimizer, remove={"0": [*range(16, 32), *range(33, 64, 3)]})
        model(x).square().mean().backward()
        optimizer.step()
        return before, [layer.pattern.shape for layer in model], [p.detach() for p in model.parameters()]

    ours, theirs = on_both(run)
    assert ours[1] == theirs[1] and ours[1][0][0] < 64
    torch.testing.assert_close(theirs, ours)
    assert "compact_blocks" in kernels_of(module)


@pytest.mark.parametrize("there,back", [(False, True), (True, False)])
def test_checkpoints_travel_between_devices(module, tmp_path, there, back):
    """Saved on one device and loaded on the other: the same weights, topology, moments, and next steps."""

    def on(emulated_device):
        return emulated.serving() if emulated_device else contextlib.nullcontext()

    with on(there):
        model = mlp(torch.float64)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        sparsifier = sn.Sparsifier(model, optimizer, sn.RigL(), every=2)
        train(model, sparsifier, optimizer, steps=3)
        sn.save(tmp_path / "a.safetensors", model, optimizer, sparsifier, step=3)
        train(model, sparsifier, optimizer, steps=3)
    with on(back):
        twin = sn.SparseMLP(model.sizes, 0.2, 16, dtype=torch.float64)
        optimizer = torch.optim.AdamW(twin.parameters(), 1e-2)
        sparsifier = sn.Sparsifier(twin, optimizer, sn.RigL(), every=2)
        assert sn.load(tmp_path / "a.safetensors", twin, optimizer, sparsifier).step == 3
        train(twin, sparsifier, optimizer, steps=3)
    assert [layer.pattern.fingerprint for layer in twin] == [layer.pattern.fingerprint for layer in model]
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(module, dtype):
    """As nn.Linear: computed in autocast's dtype, gradients in the parameters'."""

    def run():
        model, x = mlp(), torch.linspace(-1, 1, 40 * 70).view(40, 70)
        with torch.autocast("cpu", dtype):
            y = model(x)
        y.float().square().mean().backward()
        return y, [p.grad for p in model.parameters()]

    ours, theirs = on_both(run)
    assert theirs[0].dtype == dtype and theirs[1][0].dtype == torch.float32
    torch.testing.assert_close(theirs[0], ours[0], rtol=2**-5, atol=2**-6)
    torch.testing.assert_close(theirs[1], ours[1], rtol=2**-4, atol=2**-6)
    assert "forward_sm80" in kernels_of(module)


@pytest.fixture
def restored_tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def test_tf32_only_where_torch_allows_it(module, restored_tf32):
    """float32 on tensor cores, rounded to 10 bits: only under torch.backends.cuda.matmul.allow_tf32."""
    layer, x = mlp(sizes=(64, 96, 8), block_size=32)[0], torch.randn(40, 64)
    exact = layer(x).detach()
    with emulated.serving():
        torch.testing.assert_close(layer_like(layer)(x), exact, rtol=1e-5, atol=1e-5)
        assert {"forward_simt"} == {k for k in kernels_of(module) if k.startswith("forward")}
        torch.backends.cuda.matmul.allow_tf32 = True
        twin = layer_like(layer)
        y = twin(x)
        y.sum().backward()
        functional.block_gradient_squared_norms(x, torch.randn(40, 96), 32)
        assert kernels_of(module) >= {"forward_tf32_sm80", "grad_weight_tf32_sm80", "gradient_norms_tf32_sm80"}
        assert 1e-6 < (y - exact).abs().max() < 2**-6


def layer_like(layer):
    """The same layer, its pattern made on the device that serves now."""
    twin = sn.SparseLinear(
        layer.in_features, layer.out_features, block_size=layer.block_size, activation=layer.activation
    )
    twin.load_state_dict(layer.state_dict())
    return twin


def test_library_operations_compile_and_rewire(module):
    """torch.compile through torch.library: forward, backward, and again after the number of blocks changed."""
    with emulated.serving():
        model = mlp(torch.float64)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        sparsifier = sn.Sparsifier(model, optimizer, sn.SET(0.3), density=sn.Linear(0.4, 0.3, 4), every=1)
        for _ in range(4):
            x = torch.randn(8, 70, dtype=torch.float64)
            optimizer.zero_grad()
            compiled(x).square().mean().backward()
            gradients = [p.grad.clone() for p in model.parameters()]
            optimizer.zero_grad()
            model(x).square().mean().backward()
            torch.testing.assert_close([p.grad for p in model.parameters()], gradients)
            optimizer.step()
            sparsifier.step()
    assert {"forward_simt", "grad_input_simt", "grad_weight_simt"} <= kernels_of(module)


def test_old_losses_raise_after_a_rewire(module):
    with emulated.serving():
        layer = mlp()[0]
        y = layer(torch.randn(4, 70)).sum()
        layer.set_pattern(sn.BlockPattern.random(layer.pattern.shape, 0.2, 16))
        with pytest.raises(functional.StaleTopologyError, match="the layer was rewired since this forward"):
            y.backward()


def test_running_out_of_memory_in_backward_leaves_a_smaller_retry(module, monkeypatch):
    """As the caching allocator would refuse: the error is torch's own, nothing was changed, and less of it works."""

    def gradients(rows):
        layer = mlp()[0]
        layer(torch.linspace(-1, 1, rows * 70).view(rows, 70)).sum().backward()
        return layer.values.grad, layer.bias.grad

    expected = gradients(4)
    allocate = CudaKernels._scratch

    def scarce(self, nbytes):
        if nbytes > 40 * 150 * 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return allocate(self, nbytes)

    with emulated.serving():
        layer = mlp()[0]
        loss = layer(torch.randn(64, 70)).sum()
        monkeypatch.setattr(CudaKernels, "_scratch", scarce)
        with pytest.raises(torch.OutOfMemoryError):
            loss.backward()
        assert layer.values.grad is None and layer.bias.grad is None
        torch.testing.assert_close(gradients(4), expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(torch.OutOfMemoryError):  # again, through the same graph
            loss.backward()
        layer(torch.randn(4, 70)).sum().backward()
        assert layer.values.grad is not None


# --- devices --------------------------------------------------------------------------------------------------------


def test_a_build_without_cuda_says_so(monkeypatch):
    monkeypatch.setattr(functional.native, "_cuda_kernels", None)
    with pytest.raises(
        RuntimeError, match=r"no kernels for device cuda:1; this build serves: cpu; build it where nvcc is"
    ):
        functional.native.kernels_of(torch.device("cuda", 1))
    with pytest.raises(RuntimeError, match="no kernels for device xpu:0; this build serves: cpu$"):
        functional.native.kernels_of(torch.device("xpu", 0))


def test_build_info_tells_what_cuda_there_is():
    info = sn.build_info()
    assert isinstance(info["cuda_archs"], list)
    assert (info["cuda_device"] is None) == (info["cuda_archs"] == [])
    if info["cuda_device"] is not None and not torch.cuda.is_available():
        assert info["cuda_device"]["status"] != "ok"


def test_moving_a_layer_keeps_its_observer_and_its_name(monkeypatch):
    """A Sparsifier armed it before .to(): growth must still be seen, and errors still name the layer."""
    layer = mlp()[0]
    layer.topology.observer, layer.topology.label = print, "block_sparse_linear (encoder)"
    moved = layer.pattern.copy()
    monkeypatch.setattr(sn.BlockPattern, "to", lambda self, device: moved)
    layer._apply(lambda t: t)
    assert layer.pattern is moved
    assert layer.topology.observer is print and layer.topology.label == "block_sparse_linear (encoder)"
    assert sn.functional.registry.topology_of(moved) is layer.topology


# --- the CPU's own tests --------------------------------------------------------------------------------------------

ELSEWHERE = {  # not on this device: why
    "odd_address": "a GPU has no elements at odd addresses; refused by name",
    "test_the_native_module_checks_indices_itself": "calls the CPU's module itself",
    "test_the_dense_gradient_is_never_stored": "measures a child process that is on the CPU",
    "test_damaged_bytes_never_crash": "reads files; no kernel of ours",
    "test_large_cases": "minutes in the emulator; tests/cuda covers every tile",
    "test_opcheck": "what torch.library was told, whatever the device",
    "test_a_row_does_not_depend_on_its_batch": "a small batch has a kernel of its own, which sums in another order",
    "test_two_threads_on_one_layer": "the emulator runs one launch at a time",
    "test_random_is_uniform": "statistics of thousands of patterns; minutes",
    "test_random_rows_are_independent": "statistics of thousands of patterns; minutes",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "files",
    [
        "test_pattern functional/test_block_pattern functional/test_compact_blocks "
        "functional/test_block_gradient_squared_norms",
        "functional/test_block_sparse_linear",
        "test_layers test_models test_sparsifier policies/test_policy "
        "compaction/test_compacting checkpoint/test_saving",
    ],
)
def test_the_cpu_tests_pass_on_the_cuda_kernels(files):
    command = ["-m", "pytest", "-p", "no:cacheprovider", "-k"]
    command += [" and ".join(f"not {name}" for name in ELSEWHERE), *(f"../{name}.py" for name in files.split())]
    done = emulated.run_child(*command, SPARSENET_TEST_DEVICE="cuda-emulated")
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout
