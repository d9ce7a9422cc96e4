"""SparseLinear where torch's own layers go: modes, copies, processes, weight norm, pruning, readers of ``weight``."""

from __future__ import annotations

import copy
import io
import os
import pickle

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import sparsenet as sn
from sparsenet import BlockPattern, SparseLinear


def make(density=0.5, **more):
    return SparseLinear(64, 48, density=density, block_size=16, **more)


def make_masked():
    pattern = BlockPattern.random((48, 64), 0.5, 16)
    return SparseLinear(64, 48, pattern=pattern, element_mask=torch.rand(pattern.num_blocks, 16, 16) < 0.5)


def rewire(layer):
    layer.set_pattern(BlockPattern.random(layer.pattern.shape, 0.25, layer.block_size))


def assert_trains(model, *, compiled=False):
    """One step changes the values, and masked elements stay zero."""
    layer, x = model[0] if isinstance(model, nn.Sequential) else model, torch.randn(5, 64, requires_grad=True)
    before = layer.values.detach().clone()
    call = torch.compile(model, backend="aot_eager") if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    call(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, layer.values) and x.grad.any()
    assert layer.element_mask is None or not (layer.values * ~layer.element_mask).any()


# --- modes ---


@pytest.mark.parametrize("build", [make, make_masked, lambda: sn.SparseMLP([64, 48, 10], density=0.5, block_size=16)])
def test_row78_what_is_done_in_inference_mode_trains_outside(build):
    with torch.inference_mode():
        model = build()
        state = {k: v.clone() for k, v in model.state_dict().items()}
        assert model(torch.randn(2, 64)).is_inference()
    assert_trains(model)
    with torch.inference_mode():
        model.load_state_dict(state)
    assert_trains(model)
    with torch.inference_mode():
        rewire(model[0] if isinstance(model, nn.Sequential) else model)
    assert_trains(model, compiled=True)
    with torch.inference_mode():
        model.double().float()
    assert_trains(model)
    with torch.no_grad():
        model = build()
        model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert all(p.requires_grad for p in model.parameters())
    assert_trains(model)


def test_row78_a_dense_network_swapped_and_a_pattern_made_in_inference_mode():
    network = nn.Sequential(nn.Linear(64, 48))
    with torch.inference_mode():
        sn.sparsify_(network, 0.5, 16)
        pattern = BlockPattern.random((48, 64), 0.5, 16)
    assert_trains(network)
    assert_trains(SparseLinear(64, 48, pattern=pattern), compiled=True)
    values = torch.randn(pattern.num_blocks, 16, 16, requires_grad=True)
    call = torch.compile(lambda x, v: sn.functional.block_sparse_linear(x, v, pattern), backend="aot_eager")
    call(torch.randn(3, 64), values).sum().backward()
    assert values.grad.any()


def test_row78_conversion_by_swapping_tensors():
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer, other, x = make(0.25), make(0.5), torch.randn(3, 64)
        parameter = layer.values
        layer.double().float()
        layer.load_state_dict(other.state_dict())
        assert layer.values is parameter and torch.equal(layer(x), other(x))
        layer.load_state_dict(make_masked().state_dict(), assign=True)
        assert_trains(layer)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


# --- copies and processes ---


@pytest.mark.parametrize("build", [make, make_masked])
def test_row78_copies_of_copies(build):
    layer, x, calls = build(), torch.randn(3, 64), []
    layer.register_forward_hook(lambda *_: calls.append(1))
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    twin = copy.deepcopy(copy.deepcopy(nn.Sequential(layer)))
    assert torch.equal(twin(x), layer(x)) and len(calls) == 2
    rewire(layer)
    assert twin[0].pattern != layer.pattern
    assert_trains(twin)
    layer = build()
    shallow = copy.copy(layer)
    assert torch.equal(shallow(x), layer(x)) and shallow.values is layer.values
    rewire(layer)
    assert shallow.pattern is layer.pattern and torch.equal(shallow(x), layer(x))


@pytest.mark.parametrize("build", [make, make_masked])
def test_row78_whole_modules_in_files(build):
    model, x, file = nn.Sequential(build()), torch.randn(3, 64), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False, map_location="cpu")):
        assert torch.equal(twin(x), model(x)) and twin[0].pattern == model[0].pattern
        assert_trains(twin)


def test_row78_spawned_processes(run_child, tmp_path):
    """The model, its patterns and masks go to a process that is started afresh; shared parameters stay shared."""
    script = tmp_path / "spawned.py"
    script.write_text(
        "import torch, torch.multiprocessing as mp, sparsenet as sn\n"
        "def make():\n"
        "    pattern = sn.BlockPattern.random((48, 64), 0.5, 16)\n"
        "    mask = torch.rand(pattern.num_blocks, 16, 16) < 0.5\n"
        "    masked = sn.SparseLinear(64, 48, pattern=pattern, element_mask=mask)\n"
        "    more = (sn.SparseLinear(48, 48, density=0.5, block_size=8) for _ in range(9))\n"
        "    return torch.nn.Sequential(masked, *more)\n"
        "def work(rank, model, x, expected):\n"
        "    assert torch.equal(model(x), expected)\n"
        "    model[1].pattern.to_mask()\n"
        "    with torch.no_grad(): model[1].bias.fill_(7.0)\n"
        "if __name__ == '__main__':\n"
        "    model, x = make().share_memory(), torch.randn(3, 64)\n"
        "    mp.spawn(work, (model, x, model(x).detach()), 1)\n"
        "    assert (model[1].bias == 7.0).all()\n"
        "    context = mp.get_context('spawn')\n"
        "    child = context.Process(target=work, args=(0, make(), x[:0], torch.empty(0, 48)))\n"
        "    child.start(); child.join()\n"
        "    print('exit code', child.exitcode)\n"
    )
    code = f"import runpy, sys; sys.argv = [{str(script)!r}]; runpy.run_path({str(script)!r}, run_name='__main__')"
    assert "exit code 0" in run_child(code).stdout


def test_row78_forked_processes():
    layer, x = make(), torch.randn(3, 64)
    layer(x).sum().backward()
    child = os.fork()
    if not child:
        code = 1
        try:
            layer(x).sum().backward()
            rewire(layer)
            layer(x).sum().backward()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def test_row78_data_parallel_on_the_cpu():
    model, x = sn.SparseMLP([64, 48, 10], density=0.5, block_size=16), torch.randn(3, 64)
    wrapped = nn.DataParallel(model)
    assert torch.equal(wrapped(x), model(x))
    assert_trains(wrapped.module)


def test_row78_functional_call_with_other_values():
    layer, x = make(), torch.randn(3, 64)
    values = torch.randn_like(layer.values, requires_grad=True)
    kept = layer.values.detach().clone()
    y = torch.func.functional_call(layer, {"values": values}, x)
    twin = SparseLinear(64, 48, pattern=layer.pattern)
    twin.load_state_dict({**layer.state_dict(), "values": values.detach()})
    assert torch.equal(y, twin(x)) and torch.equal(layer.values, kept)
    y.sum().backward()
    assert values.grad.any() and layer.values.grad is None
    with pytest.raises(ValueError, match=r"values must have shape \[6, 16, 16\], got \[5, 16, 16\]"):
        torch.func.functional_call(layer, {"values": values[:5]}, x)
    with pytest.raises(RuntimeError, match="values, bias and pattern must not be batched"):
        stacked, _ = torch.func.stack_module_state([layer, twin])
        torch.vmap(lambda p: torch.func.functional_call(layer, p, x))(stacked)


# --- reparametrizations of our values ---


@pytest.mark.parametrize(
    "apply",
    [
        lambda layer: parametrize.register_parametrization(layer, "values", nn.Identity()),
        lambda layer: weight_norm(layer, "values"),
        lambda layer: spectral_norm(layer, "values"),
        lambda layer: nn.utils.spectral_norm(layer, "values"),
        lambda layer: delattr(layer, "values"),
    ],
)
def test_row79_parametrized_values_are_refused_with_the_layer_whole(apply):
    layer, x = make(), torch.randn(3, 64)
    expected, parameter = layer(x), layer.values
    with pytest.raises(RuntimeError, match="values cannot be removed, parametrized .*; give computed values to torch"):
        apply(layer)
    assert type(layer) is SparseLinear and layer.values is parameter and torch.equal(layer(x), expected)
    assert_trains(layer)


APPLIED = {
    "weight_norm": (lambda m: nn.utils.weight_norm(m, "values"), lambda m: nn.utils.remove_weight_norm(m, "values")),
    "prune": (
        lambda m: nn.utils.prune.l1_unstructured(m, "values", 0.5),
        lambda m: nn.utils.prune.remove(m, "values"),
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize(("apply", "remove"), APPLIED.values(), ids=APPLIED)
def test_row79_weight_norm_and_pruning_of_values(apply, remove):
    """They compute, train, save and load; the pattern changes again once they are removed."""
    layer, x = make(), torch.randn(3, 64)
    apply(layer)
    y = layer(x)
    torch.testing.assert_close(y, nn.functional.linear(x, layer.weight_dense(), layer.bias))
    y.sum().backward()
    pattern = layer.pattern
    with pytest.raises(
        RuntimeError, match="values must be a Parameter for the pattern to change, .* remove that first"
    ):
        rewire(layer)
    assert layer.pattern is pattern and torch.equal(layer(x), y)
    twin = SparseLinear(64, 48, pattern=pattern)
    apply(twin)
    assert twin.load_state_dict(layer.state_dict()) == ([], [])
    assert torch.equal(twin(x), y)
    other = SparseLinear(64, 48, pattern=BlockPattern.random((48, 64), 0.25, 16))
    apply(other)
    with pytest.raises(RuntimeError, match="must come together or fit the layer's pattern"):
        other.load_state_dict(layer.state_dict())
    remove(layer)
    assert torch.equal(layer(x), y)
    rewire(layer)
    assert layer(x).isfinite().all()


# --- layer.weight ---


def test_row82_weight_tells_dtype_device_and_shape():
    layer = SparseLinear(64, 48, density=0.5, block_size=16, dtype=torch.bfloat16)
    weight = layer.weight
    assert (weight.dtype, weight.device, tuple(weight.shape)) == (torch.bfloat16, torch.device("cpu"), (48, 64))
    assert weight.size() == (48, 64) and weight.size(1) == 64 and weight.dim() == weight.ndim == 2
    assert weight.numel() == 48 * 64 and len(weight) == 48 and weight.is_floating_point() and not weight.is_cuda
    assert isinstance(weight, torch.Tensor) and not isinstance(weight, nn.Parameter) and weight.requires_grad
    assert torch.randn(3).to(weight).dtype == torch.randn(3).type_as(weight).dtype == torch.bfloat16
    assert weight.new_zeros(2, 3).shape == (2, 3) and weight.new_ones(2).dtype == torch.bfloat16
    assert "shape=[48, 64]" in repr(weight) and layer.requires_grad_(False).weight.requires_grad is False
    assert SparseLinear(64, 48, device="meta").weight.is_meta
    assert not [name for name, _ in (*layer.named_parameters(), *layer.named_buffers()) if name == "weight"]
    assert "weight" not in layer.state_dict() and "weight" not in vars(layer)
    huge = SparseLinear(2**20, 2**20, pattern=BlockPattern.random((2**20, 2**20), num_blocks=3))
    assert huge.weight.shape == (2**20, 2**20)  # 4 TiB, were it there


OTHER = torch.ones(48, 64)
USES = {
    "data": lambda layer: layer.weight.data,
    "data.normal_": lambda layer: layer.weight.data.normal_(),
    "normal_": lambda layer: layer.weight.normal_(),
    "init.normal_": lambda layer: nn.init.normal_(layer.weight),
    "init.kaiming": lambda layer: nn.init.kaiming_uniform_(layer.weight),
    "init.xavier": lambda layer: nn.init.xavier_uniform_(layer.weight),
    "copy_": lambda layer: layer.weight.copy_(OTHER),
    "set": lambda layer: setattr(layer, "weight", nn.Parameter(OTHER)),
    "set tensor": lambda layer: setattr(layer, "weight", OTHER),
    "set None": lambda layer: setattr(layer, "weight", None),
    "register": lambda layer: layer.register_parameter("weight", nn.Parameter(OTHER)),
    "delete": lambda layer: delattr(layer, "weight"),
    "set data": lambda layer: setattr(layer.weight, "data", OTHER),
    "set requires_grad": lambda layer: setattr(layer.weight, "requires_grad", False),
    "requires_grad_": lambda layer: layer.weight.requires_grad_(False),
    "set attribute": lambda layer: setattr(layer.weight, "tag", 1),
    "grad": lambda layer: layer.weight.grad,
    "hook": lambda layer: layer.weight.register_hook(print),
    "linear": lambda layer: nn.functional.linear(torch.ones(2, 64), layer.weight),
    "matmul": lambda layer: torch.ones(2, 64) @ layer.weight.T,
    "sum": lambda layer: torch.sum(layer.weight),
    "index": lambda layer: layer.weight[0],
    "set index": lambda layer: layer.weight.__setitem__(0, 1.0),
    "clone": lambda layer: layer.weight.clone(),
    "detach": lambda layer: layer.weight.detach(),
    "to": lambda layer: layer.weight.to("cpu"),
    "numpy": lambda layer: layer.weight.numpy(),
    "tolist": lambda layer: layer.weight.tolist(),
    "deepcopy": lambda layer: copy.deepcopy(layer.weight),
    "pickle": lambda layer: pickle.dumps(layer.weight),
    "tie": lambda layer: setattr(nn.Linear(64, 48), "weight", layer.weight),
    "Parameter": lambda layer: nn.Parameter(layer.weight),
    "optimizer": lambda layer: torch.optim.SGD([layer.weight], 0.1),
    "clip": lambda layer: nn.utils.clip_grad_norm_(layer.weight, 1.0),
    "prune": lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_row82_whoever_wants_the_data_of_weight_gets_a_sentence(use):
    layer = make()
    before, names = copy.deepcopy(layer.state_dict()), set(vars(layer))
    with pytest.raises(
        RuntimeError, match=r"weight only stands for .*; use values .*, weight_dense\(\) .* to_linear\(\)"
    ):
        use(layer)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items()) and set(vars(layer)) == names
    assert layer.values.requires_grad and layer.weight.shape == (48, 64)
