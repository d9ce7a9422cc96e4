"""Passes for the sake of gradients: what they show, and that they leave no trace."""

import copy
import pickle

import pytest
import torch
from torch import nn

import sparsenet as sn
from sparsenet.saliency import Call, LastCall, sampled_loss, show_backward_passes


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        sn.SparseLinear(12, 16, density=0.5, block_size=4, activation="relu"),
        nn.BatchNorm1d(16),
        nn.Dropout(0.5),
        sn.SparseLinear(16, 5, density=1.0, block_size=4),
    )


def shown(model, batches, **options):
    seen = []
    layers = {name: module for name, module in model.named_modules() if isinstance(module, sn.SparseLinear)}
    show_backward_passes(
        model, layers, batches, lambda name, x, g: seen.append((name, x.clone(), g.clone())), **options
    )
    return seen


def test_what_is_shown_gives_the_gradients_of_an_eval_pass():
    model, x, y = network(), torch.randn(6, 12), torch.randint(5, (6,))
    seen = {name: (x, g) for name, x, g in shown(model, [(x, y)], loss=nn.functional.cross_entropy)}
    twin = copy.deepcopy(model).eval()
    nn.functional.cross_entropy(twin(x), y).backward()
    assert list(seen) == ["3", "0"]
    for name, (inputs, gradient) in seen.items():
        layer = twin[int(name)]
        blocks = sn.functional.candidate_gradients(
            inputs, gradient, layer.pattern.row_indices, layer.pattern.col_indices, 4
        )
        torch.testing.assert_close(blocks, layer.values.grad)


def test_no_trace_is_left():
    model = network()
    model[3].eval()
    model[0].topology.observer = watcher = lambda x, g: pytest.fail("the armed observer is not for this pass")
    model(torch.randn(4, 12)).sum()
    calls = model[0].topology.expected_calls
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    hooked = []
    model[0].values.register_post_accumulate_grad_hook(lambda p: hooked.append(p))
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        assert len(shown(model, [torch.randn(4, 12), torch.randn(3, 12)], targets="softmax", samples=2)) == 8
    torch.randn(1)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert all(bool((p.grad == 3.0).all()) for p in model.parameters()) and not hooked
    assert [m.training for m in model] == [True, True, True, False] and model.training
    assert model[0].topology.observer is watcher and model[0].topology.expected_calls == calls
    torch.set_rng_state(random)


def test_random_numbers_and_buffers_of_restless_modules_are_put_back():
    class Restless(nn.Module):
        """Draws and counts in every mode."""

        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.layer = sn.SparseLinear(4, 4, density=1.0, block_size=4)

        def forward(self, x):
            self.count += 1
            self.count = self.count + 1
            return self.layer(x + torch.rand(()))

    model = Restless()
    buffer, before = model.count, torch.get_rng_state()
    shown(model, [torch.randn(2, 4)], targets="gaussian")
    torch.set_rng_state(before)
    shown(model, [torch.ones(2, 4)], targets="gaussian")
    assert torch.equal(torch.get_rng_state(), before)
    assert model.count is buffer and float(buffer) == 0.0


def test_a_failed_pass_leaves_no_trace_either():
    model = network()
    with pytest.raises(ZeroDivisionError):
        shown(model, [(torch.randn(4, 12), 1)], loss=lambda output, target: 1 / 0)
    assert model.training and model[0].topology.observer is None


def test_the_same_seed_draws_the_same_targets():
    model, batches = network(), [torch.randn(8, 12)]
    runs = [shown(model, batches, targets="softmax", seed=seed)[0][2] for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("targets", ["softmax", "gaussian"])
def test_drawn_targets_estimate_the_gauss_newton_diagonal(targets):
    """Against J' H J with J by autograd and H = diag(p) - p p', or 1: within the error of 4000 draws."""
    layer = sn.SparseLinear(3, 4, density=1.0, block_size=4, dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    sums, rows = 0.0, 0

    def visit(name, inputs, gradient):
        nonlocal sums, rows
        sums = sums + sn.saliency.diagonal_fisher(inputs, gradient, layer.pattern) * len(inputs)
        rows += len(inputs)

    show_backward_passes(nn.Sequential(layer), {"0": layer}, [x], visit, targets=targets, samples=4000)
    p = torch.softmax(layer(x).detach(), 1)
    h = p * (1 - p) if targets == "softmax" else torch.ones_like(p)  # its diagonal: each weight feeds one output
    expected = h.T @ x.square() / len(x)
    torch.testing.assert_close((sums / rows)[0, :4, :3], expected, rtol=0.08, atol=0.004)


def test_classes_are_drawn_by_their_probabilities():
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log().repeat(20000, 1).requires_grad_()
    sampled_loss(logits, "softmax", torch.Generator().manual_seed(0)).backward()
    share = (torch.softmax(logits.detach(), 1) - logits.grad * len(logits)).mean(0)  # p - (p - onehot)
    torch.testing.assert_close(share, torch.tensor([0.2, 0.5, 0.3]), atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("output", "targets", "got"),
    [
        ({"logits": 1}, "softmax", "dict"),
        (torch.zeros(3, 1, requires_grad=True), "softmax", r"torch.float32 \[3, 1\]"),
        (torch.zeros(3, requires_grad=True), "gaussian", r"torch.float32 \[3\]"),
        (torch.zeros(3, 2), "softmax", r"torch.float32 \[3, 2\]"),
        (torch.zeros(2, 3, 4, 5, requires_grad=True), "softmax", r"torch.float32 \[2, 3, 4, 5\]"),
        (torch.zeros(2, 3, dtype=torch.int64), "gaussian", r"torch.int64 \[2, 3\]"),
    ],
)
def test_outputs_of_another_kind_are_refused(output, targets, got):
    with pytest.raises(ValueError, match=f"the model's output must be .* got {got}; give a loss"):
        sampled_loss(output, targets, torch.Generator())


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {"targets": "softmax"}, "batches must hold at least one batch, got none"),
        ([torch.randn(0, 12)], {"targets": "softmax"}, "batches must hold examples, got an empty batch"),
        ([3], {"targets": "softmax"}, r"got int"),
        ([(1, 2, 3)], {"targets": "softmax"}, r"got tuple of 3"),
        ([torch.randn(2, 12)], {"loss": nn.functional.mse_loss}, "got an input alone"),
        ([(torch.randn(2, 12), 0)], {"loss": lambda output, target: output}, r"one number .* got \[2, 5\]"),
        ([(torch.randn(2, 12), 0)], {"loss": lambda output, target: 3.0}, r"one number .* got float"),
        ([torch.randn(2, 12)], {}, "give either loss or targets, got neither"),
        ([torch.randn(2, 12)], {"targets": "softmax", "loss": max}, "got both"),
        ([torch.randn(2, 12)], {"targets": "uniform"}, "targets must be one of softmax, gaussian, got 'uniform'"),
    ],
)
def test_batches_and_losses_that_do_not_serve_are_refused(batches, options, message):
    with pytest.raises(ValueError, match=message):
        shown(network(), batches, **options)


def test_frozen_layers_are_refused():
    model = network().requires_grad_(False)
    with pytest.raises(ValueError, match="layers must be trainable, got '0'"):
        shown(model, [torch.randn(2, 12)], targets="softmax")


def test_a_layer_without_bias_is_reached_through_its_values():
    model = nn.Sequential(sn.SparseLinear(4, 4, bias=False, density=1.0, block_size=4), nn.Linear(4, 3))
    assert len(shown(model, [torch.randn(2, 4)], targets="softmax")) == 1
    assert model[0].values.grad is None


def test_the_last_call_that_trains_is_remembered_until_removed():
    model = nn.Linear(4, 2)
    last = LastCall(model)
    model(torch.ones(1, 4))
    x = torch.zeros(3, 4)
    model(input=x)
    with torch.no_grad():
        model(torch.ones(2, 4))
    assert last.call == Call((), {"input": x})
    twin, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (twin, thawed):
        other(torch.ones(1, 4))
        assert all(hook.call is None for hook in other._forward_pre_hooks.values()), "copies are not watched"
    last.remove()
    model(torch.ones(1, 4))
    assert last.call.kwargs["input"] is x and not model._forward_pre_hooks
