"""Whoever records calls gets the operation or a sentence, never a graph with memory that nothing writes to."""

from __future__ import annotations

import copy
import importlib.util
import io

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import sparsenet as sn
from sparsenet import BlockPattern, SparseLinear

pytestmark = [pytest.mark.filterwarnings("ignore:.*is deprecated.*"), pytest.mark.filterwarnings("ignore::UserWarning")]

ACTIVATIONS = ["none", "relu", "gelu", "silu"]
X, Y = torch.randn(4, 64), torch.randn(7, 64)


def make(activation="none", masked=False, **more):
    pattern = BlockPattern.random((48, 64), 0.5, 16)
    mask = torch.rand(pattern.num_blocks, 16, 16) < 0.5 if masked else None
    return SparseLinear(64, 48, pattern=pattern, element_mask=mask, activation=activation, **more)


def dirty():
    """Fills memory that is about to be taken again, so that reading it unwritten shows."""
    for size in (4 * 48, 7 * 48):
        torch.full((size,), torch.nan)


# --- torch.jit ---


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_row75_jit_trace(activation, grad, masked):
    layer = make(activation, masked)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(layer, X, check_trace=True)
    assert [n for n in traced.graph.nodes() if n.kind() == "sparsenet::block_sparse_linear"]
    assert not [n for n in traced.graph.nodes() if "empty" in n.kind()]
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for call in (traced, torch.jit.load(file)):
        dirty()
        assert torch.equal(call(Y), layer(Y))
    if grad:
        layer(Y).sum().backward()
        expected = layer.values.grad.clone()
        layer.zero_grad()
        traced(Y).sum().backward()
        torch.testing.assert_close(layer.values.grad, expected)


def test_row75_a_trace_from_before_a_rewire_raises():
    layer = make()
    traced = torch.jit.trace(layer, X)
    layer.set_pattern(BlockPattern.random((48, 64), 0.5, 16))
    with pytest.raises(RuntimeError, match="the layer was rewired since this forward"):
        traced(X)


def test_row75_jit_script_says_what_to_do():
    for model in (make(), sn.SparseMLP([64, 48, 10], density=0.5), nn.Sequential(nn.ReLU(), make())):
        with pytest.raises(
            RuntimeError, match=r"torch.jit.script cannot compile it; use torch.jit.trace or .*densify_"
        ):
            torch.jit.script(model)
        model(X)


# --- make_fx and other modes ---


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_row75_make_fx(mode, activation):
    layer = make(activation)
    for grad in (False, True):
        layer.requires_grad_(grad)
        graph = make_fx(layer, tracing_mode=mode, _allow_non_fake_inputs=mode != "real")(X)
        assert [n for n in graph.graph.nodes if "sparsenet.block_sparse_linear" in str(n.target)]
        y = torch.randn(4, 64)
        dirty()
        assert torch.equal(graph(y), layer(y))


def test_row75_make_fx_through_the_backward():
    layer = make("gelu")

    def gradient(x, values):
        return torch.autograd.grad(torch.func.functional_call(layer, {"values": values}, x).sum(), values)[0]

    values = torch.randn_like(layer.values, requires_grad=True)
    graph = make_fx(gradient)(X, layer.values.detach().clone().requires_grad_())
    dirty()
    torch.testing.assert_close(graph(Y[:4], values), gradient(Y[:4], values))


def test_row75_make_fx_of_the_function():
    layer = make()
    values = layer.values.detach()
    graph = make_fx(lambda x: sn.functional.block_sparse_linear(x, values, layer.pattern))(X)
    dirty()
    assert torch.equal(graph(Y[:4]), sn.functional.block_sparse_linear(Y[:4], values, layer.pattern))


def test_row75_a_backward_from_before_is_not_recorded():
    layer, x = make(), X.clone().requires_grad_()
    y = layer(x)
    with pytest.raises(RuntimeError, match="a backward pass of a forward from before: cannot be traced"):
        make_fx(lambda g: torch.autograd.grad(y, x, g, retain_graph=True)[0])(torch.ones_like(y))
    y.sum().backward()
    assert x.grad.any()


def new_places():
    return torch.tensor([1, 0]), torch.tensor([0, 1])


SMALL = BlockPattern([0, 1, 2], [1, 0], shape=(8, 8), block_size=4)
NOT_TRACED = {
    "block_gradient_squared_norms": lambda t: sn.functional.block_gradient_squared_norms(t, t, 4),
    "candidate_gradients": lambda t: sn.functional.candidate_gradients(t, t, *new_places(), block_size=4),
    "compact_blocks": lambda t: sn.functional.compact_blocks(
        [t.reshape(2, 4, 4)], SMALL, torch.arange(8), torch.arange(8), SMALL
    )[0],
    "select_extreme": lambda t: sn.functional.select_extreme(t.flatten(), 2, largest=True),
    "draw_free_places": lambda t: sn.functional.draw_free_places(t.flatten()[:2].long(), 9, 1, 0),
    "lowest_to_spare": lambda t: sn.functional.lowest_to_spare(t.flatten()[:2], 1, t.flatten()[:2].long()),
    "BlockPattern": lambda t: BlockPattern.from_dense(t).col_indices,
}


@pytest.mark.parametrize("name", NOT_TRACED)
def test_row75_operations_without_a_traceable_form_are_refused(name):
    x, call = torch.arange(32.0).reshape(4, 8), NOT_TRACED[name]
    call(x)
    for trace in (
        lambda: torch.jit.trace(call, x, check_trace=False),
        lambda: make_fx(call)(x),
        lambda: make_fx(call, tracing_mode="fake")(x),
    ):
        with pytest.raises(RuntimeError, match=f"{name}: cannot be traced; call it outside torch.jit.trace, make_fx"):
            trace()
    assert torch.equal(call(x), call(x))


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_row75_whoever_watches_calls_sees_the_operation():
    layer = make("gelu")
    layer(X).sum().backward()
    expected, growth = layer.values.grad.clone(), []
    layer.zero_grad()
    with Recorder() as recorder:
        layer.topology.observer = lambda x, g: growth.append(sn.functional.block_gradient_squared_norms(x, g, 16))
        layer(X).sum().backward()
    names = [name for name in recorder.seen if name.startswith("sparsenet")]
    assert names == ["sparsenet.block_sparse_linear.default", "sparsenet.block_sparse_linear_backward.default"]
    torch.testing.assert_close(layer.values.grad, expected)
    assert growth[0].shape == (3, 4)


def test_row75_flops_are_those_of_the_active_blocks():
    layer, x = make(), X.clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 4 * layer.values.numel()
    with FlopCounterMode(display=False) as counter:
        layer(X).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 4 * layer.values.numel()


def test_row75_fake_tensors():
    layer = make()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(X)).shape == (4, 48)
    with FakeTensorMode(), pytest.raises(RuntimeError, match="BlockPattern: cannot be traced; call it outside"):
        SparseLinear(64, 48)


class Units(torch.Tensor):
    """A subclass that only keeps its type."""


def test_row75_subclasses_keep_their_type():
    layer = make("relu")
    y = layer(X.as_subclass(Units))
    assert type(y) is Units and torch.equal(y.as_subclass(torch.Tensor), layer(X))


# --- torch.fx ---


def test_row75_symbolic_trace_calls_the_layer_as_a_whole():
    mlp = sn.SparseMLP([64, 48, 10], density=0.5, block_size=16)
    for model in (mlp, nn.Sequential(make(masked=True), nn.ReLU(), nn.Linear(48, 3)), nn.Sequential(mlp, nn.ReLU())):
        graph = torch.fx.symbolic_trace(model)
        assert torch.equal(graph(X), model(X))
    layer = mlp[0]
    layer.set_pattern(BlockPattern.random((48, 64), 0.25, 16))
    assert torch.equal(torch.fx.symbolic_trace(mlp)(X), mlp(X))
    graph = torch.fx.symbolic_trace(mlp)
    layer.set_pattern(BlockPattern.random((48, 64), 0.75, 16))
    assert torch.equal(graph(X), mlp(X)), "a graph follows the rewires of its layers"
    assert mlp(torch.randn(2, 8, 8)).shape == graph(torch.randn(2, 8, 8)).shape == (2, 10)
    with pytest.raises(RuntimeError, match=r"must be traced in a model; give it torch.nn.Sequential\(layer\)"):
        torch.fx.symbolic_trace(layer)


# --- export and derivatives ---


@pytest.mark.skipif(importlib.util.find_spec("onnx") is None, reason="needs onnx")
@pytest.mark.parametrize("dynamo", [False, True])
def test_row75_onnx_says_what_to_do(dynamo, tmp_path):
    if dynamo:
        pytest.importorskip("onnxscript")
    with pytest.raises(Exception, match=r"ONNX has no operation for it; export a dense copy, sparsenet.densify_"):
        torch.onnx.export(make(), (X,), tmp_path / "a.onnx", dynamo=dynamo)
    dense = sn.densify_(copy.deepcopy(nn.Sequential(make())))
    torch.onnx.export(dense, (X,), tmp_path / "a.onnx", dynamo=dynamo)


def test_row75_forward_mode_says_what_to_do():
    layer = make()
    message = "has no forward-mode derivative; sparsenet.reference.block_sparse_linear has"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(layer, (X,), (X,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        layer(forward_ad.make_dual(X, X))
    values, pattern = layer.values.detach(), layer.pattern
    y, tangent = torch.func.jvp(lambda x: sn.reference.block_sparse_linear(x, values, pattern), (X,), (X,))
    torch.testing.assert_close(y, tangent)
