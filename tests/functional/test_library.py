"""torch.compile, torch.export, fake tensors, autocast and functorch see one op and never recompile for a rewire."""

from __future__ import annotations

import gc
import io

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

import sparsenet as sn
from sparsenet import BlockPattern, SparseLinear, SparseMLP
from sparsenet.functional import StaleTopologyError, block_sparse_linear

ACTIVATIONS = ["none", "relu", "gelu", "silu"]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def outputs_and_gradients(call, model, x):
    """Output, gradient of x and of the parameters."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = call(x)
    (y * torch.arange(y.numel()).view(y.shape)).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


def assert_same(compiled, model, x):
    for ours, theirs in zip(
        outputs_and_gradients(compiled, model, x), outputs_and_gradients(model, model, x), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def rewire(layer, density):
    layer.set_pattern(BlockPattern.random(layer.pattern.shape, density, layer.block_size))


# --- torch.compile --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_compiled_equals_eager(activation, dtype):
    model = SparseMLP([33, 70, 7], 0.5, 16, activation, dtype=dtype)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 33, dtype=dtype)
    assert_same(compiled, model, x)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.slow
def test_inductor_equals_eager_through_rewires():
    model = torch.nn.Sequential(SparseLinear(33, 7, density=0.5, block_size=4), torch.nn.Tanh())
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(5, 33)
    assert_same(compiled, model, x)
    for density in (0.5, 0.8):
        rewire(model[0], density)
        assert_same(compiled, model, x)


@pytest.mark.parametrize("kind", ["layer", "mlp", "sequential", "module"])
def test_a_density_schedule_compiles_at_most_two_graphs(kind):
    """20 changes of the number of blocks of every layer; fullgraph makes exceeding the recompile limit an error."""

    class Residual(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = SparseLinear(96, 96, density=0.9, block_size=16)
            self.scale = torch.nn.Parameter(torch.ones(96))

        def forward(self, x):
            return x + self.scale * torch.tanh(self.inner(x))

    model = {
        "layer": lambda: SparseLinear(96, 96, density=0.9, block_size=16),
        "mlp": lambda: SparseMLP([96, 96, 96], 0.9, 16),
        "sequential": lambda: torch.nn.Sequential(SparseLinear(96, 96, density=0.9, block_size=16), Residual()),
        "module": Residual,
    }[kind]()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(5, 96)
    for step in range(21):
        if step in (0, 1, 10, 20):
            assert_same(compiled, model, x)
        else:
            compiled(x).sum().backward()
        for layer in sn.layers.sparse_layers(model).values():
            rewire(layer, 0.9 - 0.04 * step)
    assert counter.frame_count <= 2, f"{counter.frame_count} graphs"


def test_rewires_of_the_same_size_never_recompile():
    model = SparseMLP([96, 96, 96], 0.5, 16)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(5, 96)
    for _ in range(5):
        assert_same(compiled, model, x)
        rewire(model[0], 0.5)
    assert counter.frame_count == 1


def test_masked_layers_compile():
    layer = SparseLinear(96, 96, density=0.5, block_size=16, element_mask=torch.rand(18, 16, 16) < 0.5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same(compiled, layer, torch.randn(5, 96))
    rewire(layer, 0.7)
    assert_same(compiled, layer, torch.randn(5, 96))


def test_dynamic_batch():
    model = SparseMLP([33, 70, 7], 0.5, 16)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (5, 7, 12, 64, 33):
        assert_same(compiled, model, torch.randn(batch, 33))
    assert counter.frame_count <= 2


def test_a_graph_from_before_a_rewire_raises():
    model = SparseMLP([33, 70, 7], 0.5, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for density in (0.5, 0.5, 0.8):  # the same number of blocks: nothing but the mark tells
        y = compiled(torch.randn(5, 33))
        rewire(model[0], density)
        gc.collect()
        with pytest.raises(StaleTopologyError, match=r"block_sparse_linear \(0\): the layer was rewired since"):
            y.sum().backward()


def test_a_whole_training_step_compiles():
    model = SparseMLP([33, 70, 7], 0.5, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    @torch.compile(backend="aot_eager")
    def step(x, labels):
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    x, labels = torch.randn(64, 33), torch.randint(7, (64,))
    losses = [step(x, labels).item() for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


def test_errors_survive_compilation():
    layer = SparseLinear(33, 70, density=0.5, block_size=16)
    compiled = torch.compile(layer, backend="aot_eager")
    with pytest.raises(Exception, match=r"x must have 33 columns"):
        compiled(torch.randn(5, 34))


# --- torch.export ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_export_round_trip(activation, tmp_path):
    model = SparseMLP([33, 70, 7], 0.5, 16, activation)
    x = torch.randn(5, 33)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: Dim("batch")}})
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (x, torch.randn(11, 33), torch.randn(2, 33)):
        torch.testing.assert_close(loaded(batch), model(batch))
    assert "sparsenet.block_sparse_linear" in str(program.graph)


def test_an_exported_program_loads_elsewhere(tmp_path, run_child):
    model = SparseMLP([33, 70, 7], 0.5, 16)
    x = torch.randn(5, 33)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    torch.save((x, model(x).detach()), tmp_path / "data.pt")
    run_child(
        """
        import sys, torch, sparsenet
        loaded = torch.export.load(sys.argv[1]).module()
        x, y = torch.load(sys.argv[2])
        assert torch.equal(loaded(x), y)
        """,
        str(tmp_path / "model.pt2"),
        str(tmp_path / "data.pt"),
    )


def test_an_exported_program_with_hostile_indices_is_refused():
    """Its index tensors are plain constants: they are checked at every call."""
    model = SparseLinear(33, 70, density=0.5, block_size=16)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (torch.randn(5, 33),)), file)
    file.seek(0)
    program = torch.export.load(file)
    names = [n for n, t in program.constants.items() if t.dtype == torch.int32]
    assert len(names) == 2
    for name in names:
        kept = program.constants[name].clone()
        program.constants[name].fill_(10**6)
        with pytest.raises(ValueError, match="BlockPattern: (crow|col)_indices must"):
            program.module()(torch.randn(5, 33))
        program.constants[name].copy_(kept)


# --- fake tensors, autocast, functorch ------------------------------------------------------------------------------


def test_fake_tensors_touch_no_data(monkeypatch):
    model = SparseLinear(33, 7, density=0.5, block_size=4, activation="gelu")

    def touched(*_):
        raise AssertionError("a kernel was called")

    monkeypatch.setattr(sn.functional.native, "kernels_of", touched)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for leading in ((5,), (2, 3), (0,)):
            x = mode.from_tensor(torch.randn(*leading, 33).requires_grad_())
            y = model(x)
            assert y.shape == (*leading, 7) and y.dtype == torch.float32
            assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_autocast_inside_compile():
    model = SparseMLP([33, 70, 7], 0.5, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 33)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = compiled(x), model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def functions(activation):
    pattern = BlockPattern.random((33, 70), 0.5, 16)
    values, bias, x = torch.randn(pattern.num_blocks, 16, 16) / 5, torch.randn(33), torch.randn(4, 5, 70)

    def build(op):
        return lambda x, values, bias: op(x, values, pattern, bias, activation)

    return build(block_sparse_linear), build(sn.reference.block_sparse_linear), x, values, bias


def assert_all_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_over_x(activation, dim):
    ours, theirs, x, values, bias = functions(activation)
    y = torch.vmap(ours, (dim, None, None))(x, values, bias)
    torch.testing.assert_close(y, theirs(x.movedim(dim, 0), values, bias))
    rows = torch.vmap(torch.vmap(ours, (0, None, None)), (0, None, None))(x, values, bias)
    torch.testing.assert_close(rows, theirs(x, values, bias))


def test_vmap_over_weights_is_refused():
    ours, _, x, values, bias = functions("none")
    for dims, arguments in (((None, 0, None), (x, values[None], bias)), ((None, None, 0), (x, values, bias[None]))):
        with pytest.raises(RuntimeError, match="block_sparse_linear: vmap runs over x only"):
            torch.vmap(ours, dims)(*arguments)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_func_grad_and_vjp(activation):
    ours, theirs, x, values, bias = functions(activation)

    def gradients(f):
        return torch.func.grad(lambda *t: f(*t).square().sum(), (0, 1, 2))(x, values, bias)

    assert_all_close(gradients(ours), gradients(theirs))

    def pulled(f):
        y, pull = torch.func.vjp(f, x, values, bias)
        return y, *pull(torch.ones_like(y))

    assert_all_close(pulled(ours), pulled(theirs))


def test_gradients_of_each_sample():
    ours, theirs, x, values, bias = functions("gelu")

    def per_sample(f, dim):
        gradient = torch.func.grad(lambda *t: f(*t).square().sum(), (0, 1, 2))
        return torch.vmap(gradient, (dim, None, None))(x, values, bias)

    for dim in (0, 1):
        assert_all_close(per_sample(ours, dim), per_sample(theirs, dim))
    assert per_sample(ours, 0)[1].shape == (4, *values.shape)


def test_jacrev():
    ours, theirs, x, values, bias = functions("silu")
    torch.testing.assert_close(
        torch.func.jacrev(ours)(x[0, :2], values, bias), torch.func.jacrev(theirs)(x[0, :2], values, bias)
    )


def test_func_twice_raises():
    ours, _, x, values, bias = functions("gelu")

    def inner(x):
        return torch.func.grad(lambda x: ours(x, values, bias).sum())(x).sum()

    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.func.grad(inner)(x)
    with pytest.raises((RuntimeError, NotImplementedError), match="jvp|forward"):
        torch.func.jacfwd(lambda x: ours(x, values, bias))(x[0, 0])


def test_functional_call_of_a_layer():
    layer = SparseLinear(70, 33, density=0.5, block_size=16)
    x = torch.randn(5, 70)
    parameters = {k: v.detach() for k, v in layer.named_parameters()}
    gradients = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).square().sum())(parameters)
    layer(x).square().sum().backward()
    torch.testing.assert_close(gradients["values"], layer.values.grad)
    torch.testing.assert_close(gradients["bias"], layer.bias.grad)
