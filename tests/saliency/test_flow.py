"""Synaptic flow: the formula, what is left out of it, and the models that it refuses."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparsenet as sn
from sparsenet.saliency import Call, synaptic_flow

pytestmark = pytest.mark.usefixtures("one_thread")


def call(*shape):
    return Call((torch.randn(*shape),), {})


def dense_of(layer, stored):
    p, b = layer.pattern, layer.block_size
    dense = stored.new_zeros(p.block_rows, p.block_cols, b, b)
    dense[p.row_indices.long(), p.col_indices.long()] = stored
    return dense.permute(0, 2, 1, 3).reshape(p.block_rows * b, p.block_cols * b)[
        : layer.out_features, : layer.in_features
    ]


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "none"])
@pytest.mark.parametrize("bias", [False, True])
def test_two_layers_follow_the_formula(activation, bias):
    """First layer: (1' |W2|)_i |W1_ij|; second: |W2_ki| (|W1| 1 + |b1|)_i."""
    torch.manual_seed(0)
    model = sn.SparseMLP([10, 9, 6], density=0.6, block_size=4, activation=activation, bias=bias)
    one, two = (layer.weight_dense().detach().abs().double() for layer in model)
    hidden = one.sum(1) + (model[0].bias.detach().abs().double() if bias else 0)
    first, second = (
        dense_of(layer, f) for layer, f in zip(model, synaptic_flow(model, list(model), call(3, 10)), strict=True)
    )
    expected = two.sum(0)[:, None] * one, two * hidden
    largest = max(float(e.max()) for e in expected)
    torch.testing.assert_close(first, expected[0] / largest, rtol=1e-12, atol=0)
    torch.testing.assert_close(second, expected[1] / largest, rtol=1e-12, atol=0)


def test_the_flow_through_every_layer_is_the_same_without_biases():
    """Conservation, the theorem that their method stands on."""
    torch.manual_seed(0)
    model = sn.SparseMLP([20, 32, 24, 16, 8], density=0.5, block_size=4, bias=False)
    totals = [float(f.sum()) for f in synaptic_flow(model, list(model), call(1, 20))]
    assert totals == pytest.approx([totals[0]] * 4, rel=1e-12)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(16), nn.LayerNorm(16), nn.GroupNorm(4, 16), nn.RMSNorm(16)])
def test_norms_scale_by_the_size_of_their_weight(norm):
    torch.manual_seed(0)
    model = nn.Sequential(
        sn.SparseLinear(8, 16, density=1.0, block_size=4, bias=False), norm, nn.GELU(),
        sn.SparseLinear(16, 4, density=1.0, block_size=4, bias=False),
    )  # fmt: skip
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16))
        if getattr(norm, "bias", None) is not None:
            norm.bias.copy_(torch.randn(16))
        if hasattr(norm, "running_var"):
            norm.running_mean.copy_(torch.randn(16))
            norm.running_var.copy_(torch.rand(16) + 0.5)
    scale = norm.weight.detach().abs().double()
    if hasattr(norm, "running_var"):
        scale = scale / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.detach().abs().double() if getattr(norm, "bias", None) is not None else 0
    one, two = (model[i].weight_dense().detach().abs().double() for i in (0, 3))
    found = synaptic_flow(model, [model[0], model[3]], call(5, 8))
    expected = (two.sum(0) * scale)[:, None] * one, two * (one.sum(1) * scale + shift)
    largest = max(float(e.max()) for e in expected)
    for layer, f, e in zip((model[0], model[3]), found, expected, strict=True):
        torch.testing.assert_close(dense_of(layer, f), e / largest, rtol=1e-10, atol=0)


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2)
        self.one = sn.SparseLinear(36, 36, density=1.0, block_size=4)
        self.last = sn.SparseLinear(36, 10, density=1.0, block_size=4)

    def forward(self, x, scale=1.0):
        x = self.pool(torch.relu(self.norm(self.conv(x)))).flatten(1)
        return self.last(x + nn.functional.silu(self.one(x))) * scale


def test_a_convolutional_residual_model():
    torch.manual_seed(0)
    model = Convolutional()
    flow = synaptic_flow(model, [model.one, model.last], Call((torch.randn(3, 1, 8, 8),), {"scale": 2.0}))
    assert [int((f > 0).sum()) for f in flow] == [model.one.num_active, model.last.num_active]


class Checkpointed(nn.Module):
    """Its backward pass computes forward anew."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return checkpoint(self.model, x, use_reentrant=False)


def test_what_backward_computes_anew_is_positive_as_well():
    torch.manual_seed(0)
    model = sn.SparseMLP([16, 16, 16, 8], density=1.0, block_size=4, dtype=torch.float64)
    flows = [synaptic_flow(m, list(model), call(1, 16)) for m in (model, Checkpointed(model))]
    assert all(torch.equal(one, other) for one, other in zip(*flows, strict=True))


def test_deep_networks_do_not_overflow_the_scores():
    torch.manual_seed(0)
    model = sn.SparseMLP([128] * 61, density=1.0, block_size=16)
    flow = synaptic_flow(model, list(model), call(1, 128))
    assert float(torch.stack([f.max() for f in flow]).max()) == 1.0
    assert all(bool(f.float().sum().isfinite()) and float(f.float().sum()) > 0 for f in flow)


def test_a_flow_beyond_float64_is_nan_and_nobody_is_pruned_by_it():
    model = sn.SparseMLP([8, 8, 8, 8, 4], density=1.0, block_size=4, dtype=torch.float64)
    with torch.no_grad():
        for layer in model:
            layer.values.fill_(1e100)
    with pytest.raises(ValueError, match="got no scores of '0': its drop scores hold NaN or Inf"):
        sn.prune_at_initialization(model, sn.SynFlow(), 0.5)


def test_a_network_without_a_path_has_no_flow():
    model = sn.SparseMLP([8, 8, 4], density=1.0, block_size=4, bias=False)
    with torch.no_grad():
        model[0].values.zero_()
    assert not any(bool(f.any()) for f in synaptic_flow(model, list(model), call(1, 8)))


class Around(nn.Module):
    """A sparse layer, with something done to what comes out."""

    def __init__(self, after):
        super().__init__()
        self.layer, self.after = sn.SparseLinear(8, 8, density=1.0, block_size=4), after

    def forward(self, x):
        return self.after(self.layer(x))


LINEAR = "got one whose output is not linear in its input when torch's activations and norms are left out"


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (lambda y: y.softmax(-1), "model must be a sum of products of its weights, got a softmax in it"),
        (lambda y: nn.functional.log_softmax(y, -1), "got a softmax in it"),
        (lambda y: y * torch.sigmoid(y), LINEAR),
        (lambda y: y / y.norm(), LINEAR),
        (lambda y: y.exp(), LINEAR),
        (lambda y: (y, y), "model must return one floating-point tensor, got tuple"),
        (lambda y: y.argmax(-1), "model must return one floating-point tensor, got torch.int64"),
        (lambda y: y.detach(), "model must return what its sparse layers computed, got an output without a graph"),
        (lambda y: y @ torch.ones(3, 3), r"model must run on ones of its inputs' shape, here \[1, 8\], got: "),
    ],
)
def test_models_that_the_formula_does_not_describe(after, message):
    model = Around(after)
    with pytest.raises(ValueError, match=f"synaptic_flow: .*{message}"):
        synaptic_flow(model, [model.layer], call(2, 8))
    assert "forward" not in model.layer.__dict__ and model.layer(torch.ones(1, 8)).dtype == torch.float32


def test_attention_is_refused():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    sn.sparsify_(model, density=1.0, block_size=4)
    with pytest.raises(ValueError, match="SynFlow: model must be a sum of products of its weights, got an attention"):
        sn.prune_at_initialization(model, sn.SynFlow(torch.ones(2, 5, 16)), 0.5)
