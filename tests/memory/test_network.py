"""Bytes of a training step: counts worked by hand, and the predicted peak against the measured one."""

import json

import pytest
import torch
from torch import nn

import sparsenet as sn
from sparsenet.memory import step_bytes
from sparsenet.optimizer_state import scratch_twin, state_bytes

MIB = 1 << 20

# Trains one network in a process of its own and prints bytes predicted and measured.
TRAIN = """
    import json, sys, torch
    from torch import nn
    import sparsenet as sn
    from sparsenet.memory import step_bytes
    sn.memory.release_freed_memory()
    kind, optimizer, kept = json.loads(sys.argv[1])
    def conv(*channels):
        return [m for i, o in channels for m in (nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2))]
    model, shape = {
        "dense": lambda: (nn.Sequential(nn.Linear(784, 1536), nn.ReLU(), nn.Linear(1536, 1536), nn.ReLU(), nn.Linear(1536, 10)), (256, 784)),
        "batch": lambda: (nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.LayerNorm(512), nn.GELU(), nn.Linear(512, 10)), (3000, 784)),
        "block": lambda: (sn.SparseMLP([784, 4096, 4096, 10], density=0.2, block_size=32), (256, 784)),
        "gelu": lambda: (sn.SparseMLP([784, 2048, 2048, 10], density=0.2, block_size=16, activation="gelu"), (1024, 784)),
        "conv": lambda: (nn.Sequential(*conv((1, 32), (32, 64)), nn.Flatten(), nn.Linear(3136, 256), nn.ReLU(), nn.Linear(256, 10)), (128, 1, 28, 28)),
    }[kind]()
    def make(model):
        if optimizer == "sgd":
            return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        return torch.optim.AdamW(model.parameters(), fused=optimizer == "fused")
    def step(model, optimizer, x):
        if not kept:
            optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long))
        if kept:
            optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()
    tiny = nn.Sequential(*conv((1, 2)), nn.Flatten(), nn.Linear(8, 10))  # loads what is loaded at first use
    step(tiny, make(tiny), torch.randn(2, 1, 4, 4))
    x, opt = torch.randn(shape), make(model)
    predicted = step_bytes(model, opt, x, gradients_kept=kept).total
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    with sn.measure_peak() as peak:
        for _ in range(3):
            step(model, opt, x)
    print(json.dumps([predicted, held + peak.bytes, peak.method]))
"""  # noqa: E501


@pytest.mark.parametrize(
    "how",
    [
        ("dense", "adamw", False),
        ("dense", "fused", True),
        ("batch", "sgd", False),
        ("block", "adamw", False),
        ("block", "fused", True),
        ("gelu", "sgd", False),
        ("conv", "adamw", False),
    ],
)
def test_predicted_peak_is_within_a_tenth_of_the_measured_one(run_child, how):
    predicted, measured, method = json.loads(run_child(TRAIN, json.dumps(how)).stdout)
    assert method == "VmHWM" and measured > 20 * MIB
    assert abs(predicted - measured) < 0.1 * measured, (predicted / MIB, measured / MIB)


def test_items_worked_by_hand():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 4))
    found = step_bytes(model, torch.optim.AdamW(model.parameters()), torch.randn(32, 8))
    weights = 8 * 16 + 16 + 2 * 16 + 16 * 4 + 4
    assert found.items["parameters"] == found.items["gradients"] == 4 * weights
    assert found.items["optimizer state"] == 2 * 4 * weights + 6 * 4, "two moments, and six counts of steps"
    assert found.items["buffers"] == 4 * (16 + 16) + 8
    relu_and_norm, statistics = 2 * 4 * 32 * 16, 2 * 4 * 16
    assert found.activation_bytes == {"0": relu_and_norm + statistics}
    assert found.items["activations"] == relu_and_norm + statistics
    assert found.items["outputs"] == 2 * 4 * 32 * 4
    assert found.total == found.moments[found.moment] == max(found.moments.values())


def test_activations_are_put_down_to_the_layer_whose_outputs_they_scale_with():
    def network(width):
        return nn.Sequential(nn.Linear(8, width), nn.GELU(), sn.SparseLinear(width, 24, density=0.5, block_size=4), nn.ReLU(), nn.Linear(24, 3))  # fmt: skip # noqa: E501

    x = torch.randn(10, 8)
    narrow, wide = (step_bytes(network(width), None, x).activation_bytes for width in (16, 32))
    assert narrow == {"0": 2 * 4 * 10 * 16, "2": 4 * 10 * 24}
    assert wide == {"0": 2 * narrow["0"], "2": narrow["2"]}


def test_a_residual_network_and_a_layer_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = x + self.inner(x).relu()
            return self.last(x + self.inner(x).relu())

    found = step_bytes(Twice(), None, torch.randn(6, 8))
    assert found.items["activations"] == 4 * (4 * 6 * 8), "two results of relu and two sums"
    assert sum(found.activation_bytes.values()) == found.items["activations"]


def test_it_changes_nothing():
    sparse = sn.SparseLinear(16, 4, density=1.0, block_size=4)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), sparse)
    optimizer = torch.optim.Adam(model.parameters())
    model[3].topology.observer = lambda *_: None
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    step_bytes(model, optimizer, torch.randn(4, 8, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not optimizer.state and all(p.grad is None for p in model.parameters())
    assert model[3].topology.expected_calls == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_go_when_the_model_raises():
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(RuntimeError, match="shapes"):
        step_bytes(model, None, torch.randn(4, 9))
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks


def test_a_loss_of_ones_own():
    model, x = nn.Linear(8, 4), torch.randn(5, 8)
    found = step_bytes(model, None, x, loss=lambda y: y.square().square().mean())
    assert found.items["outputs"] == 2 * 4 * 5 * 4, "the output, which the first square keeps, and its square"


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.AdamW(p), lambda p: torch.optim.SGD(p, momentum=0.9), lambda p: torch.optim.SGD(p),
    lambda p: torch.optim.Adafactor(p), lambda p: torch.optim.Rprop(p), lambda p: torch.optim.Adam(p, amsgrad=True),
])  # fmt: skip
@pytest.mark.parametrize("shape", [(7, 4, 4), (5,), (), (3, 6)])
def test_state_is_known_before_the_first_step(make, shape):
    parameter = nn.Parameter(torch.randn(shape))
    optimizer = make([parameter])
    entries = shape[0] if shape else 1
    each, fixed = state_bytes([optimizer], parameter)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = sum(t.nbytes for t in optimizer.state[parameter].values() if isinstance(t, torch.Tensor))
    assert each * entries + fixed == kept
    now_each, now_fixed = state_bytes([optimizer], parameter)
    assert now_each * entries + now_fixed == kept
    assert scratch_twin(optimizer, parameter, 2)[0] is not optimizer


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="step_bytes: model must be a module, got int"):
        step_bytes(3, None, torch.ones(1))
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer"):
        step_bytes(nn.Linear(1, 1), 3, torch.ones(1))
