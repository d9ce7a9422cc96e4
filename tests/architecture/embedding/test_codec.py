"""Batches of small MLPs, their matrix form, and the random networks that teach the autoencoder."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sparsenet.architecture.embedding.autoencoder import AutoencoderConfig, NetworkAutoencoder
from sparsenet.architecture.embedding.codec import (
    MIXED,
    NetworkBatch,
    NetworkSpace,
    from_matrix,
    from_vector,
    to_matrix,
)
from sparsenet.architecture.embedding.teachers import fixture_network, grid_points, normalised, random_networks

MODERN = NetworkSpace(inputs=2, activation=MIXED, bias=True)


pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def all_kinds():
    spaces = [NetworkSpace(activation=a) for a in ("sigmoid", "leaky_relu", "linear", "tanh")]
    return [*spaces, NetworkSpace(bias=True), MODERN]


# --- codec ---


def test_forward_by_hand():
    space = NetworkSpace(inputs=2, width=2, max_depth=1)
    weights = (torch.tensor([[[1.0, -1.0], [2.0, 0.0]]]), torch.tensor([[[3.0, -2.0]]]))
    x = torch.tensor([[1.0, 2.0], [3.0, 1.0]])
    nets = NetworkBatch(space, weights, torch.ones(1, 1, 2))
    # first sample: (-1, 2) -> (-0.1, 2) -> -0.3 - 4; second: (2, 6) -> 6 - 12
    torch.testing.assert_close(nets.outputs(x), torch.tensor([[-4.3, -6.0]]))
    masked = replace(nets, neurons=torch.tensor([[[1.0, 0.0]]]))
    torch.testing.assert_close(masked.outputs(x), torch.tensor([[-0.3, 6.0]]))
    assert (nets.nonzeros().item(), masked.nonzeros().item()) == (5, 3)


def test_fixture_of_the_authors_repository():
    nets = fixture_network()
    x = torch.rand(20000, 3, generator=seeded()) * 2 - 1
    y = nets.outputs(x)[0]
    assert nets.nonzeros().tolist() == [13]
    assert float(y.mean()) == pytest.approx(-8.886, abs=0.05)
    assert float(y.std()) == pytest.approx(1.918, abs=0.02)


@pytest.mark.parametrize("space", all_kinds(), ids=lambda s: s.activation + "_bias" * s.bias)
@pytest.mark.parametrize("depth", [1, 4])
def test_module_vector_and_permutation_compute_the_same(space, depth):
    nets = random_networks(space, depth, 6, seeded(depth))
    x = torch.rand(50, space.inputs, generator=seeded(1)) * 2 - 1
    y = nets.outputs(x)
    torch.testing.assert_close(nets.permuted(seeded(2)).outputs(x), y, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(nets.effective().outputs(x), y)
    for i in (0, 5):
        module = nets.to_module(i, scale=2.0)
        with torch.no_grad():
            torch.testing.assert_close(module(x)[:, 0], 2 * y[i], rtol=1e-4, atol=1e-3)
        assert {type(m) for m in module} & {nn.Linear}
    factor = torch.linspace(1, 2, 6)
    torch.testing.assert_close(nets.scaled(factor).outputs(x), y * factor[:, None], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_matrix_form_is_lossless(depth):
    space = NetworkSpace()
    nets = random_networks(space, depth, 20, seeded(depth)).effective()
    matrix = to_matrix(nets)
    assert list(matrix.shape) == [20, 7, 8 * depth + 1]
    assert torch.all(matrix[:, :2, :7] == 0) and torch.all(matrix[:, 5:, :7] == 0)  # W_0 is centred
    again = from_matrix(space, matrix)
    assert all(torch.equal(a, b) for a, b in zip(nets.weights, again.weights, strict=True))
    assert torch.equal(nets.neurons, again.neurons)


def test_matrix_form_refuses():
    with pytest.raises(ValueError, match="networks must have no biases and one activation"):
        to_matrix(random_networks(MODERN, 1, 2, seeded()))
    with pytest.raises(ValueError, match=r"matrix must have shape \[n, 7, 8 L \+ 1\].*got \[2, 7, 10\]"):
        from_matrix(NetworkSpace(), torch.zeros(2, 7, 10))


def test_neuron_masks_learn():
    space = NetworkSpace()
    vector = torch.randn(3, space.vector_size(2), requires_grad=True)
    nets, logits = from_vector(space, 2, vector)
    assert torch.equal(nets.neurons, (logits > 0).float())
    nets.outputs(torch.rand(10, 3)).square().sum().backward()
    count = sum(out * inp for out, inp in space.shapes(2))
    assert vector.grad[:, count:].abs().sum() > 0  # a plain threshold would give nothing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "width must be an integer >= 1, got 0"),
        ({"inputs": 9}, "inputs must be at most width 7, got 9"),
        ({"activation": "relu6"}, "activation must be one of sigmoid, leaky_relu, linear, tanh, mixed, got 'relu6'"),
    ],
)
def test_bad_spaces(arguments, message):
    with pytest.raises(ValueError, match=message):
        NetworkSpace(**arguments)


def test_bad_depth():
    with pytest.raises(ValueError, match=r"depth must lie in \[1, 4\], got 5"):
        NetworkSpace().shapes(5)
    with pytest.raises(ValueError, match=r"depth must lie in \[1, 4\], got 0"):
        NetworkAutoencoder(AutoencoderConfig()).decode(torch.zeros(1, 128), 0)


# --- teachers ---


def test_teachers_have_the_papers_sizes():
    nets = random_networks(NetworkSpace(), 3, 400, seeded())
    widths = nets.neurons.sum(2)
    assert (int(widths.min()), int(widths.max())) == (3, 6)
    sizes = torch.cat([torch.full((400, 1), 3.0), widths, torch.ones(400, 1)], 1)
    total = (sizes[:, 1:] * sizes[:, :-1]).sum(1)
    share = nets.nonzeros() / total
    assert float(share.max()) <= 0.5 and float(share.min()) < 0.25
    assert all(float(w.abs().max()) <= 10 for w in nets.weights)


def test_every_input_reaches_the_output():
    nets = random_networks(NetworkSpace(activation="linear"), 4, 300, seeded())
    paths = torch.eye(3).expand(300, 3, 3)
    for w in nets.weights:
        paths = (w != 0).float() @ paths
    assert torch.all(paths > 0)


@pytest.mark.parametrize(("depth", "nonzeros"), [(2, 14), (3, 35), (2, 13)])
def test_exact_numbers_of_weights(depth, nonzeros):
    nets = random_networks(NetworkSpace(), depth, 50, seeded(), width=5, nonzeros=nonzeros)
    assert set(nets.nonzeros().tolist()) == {nonzeros}


def test_impossible_teachers():
    with pytest.raises(ValueError, match=r"nonzeros must lie in \[\d+, 45\] for this width, got 46"):
        random_networks(NetworkSpace(), 2, 5, seeded(), width=5, nonzeros=46)
    with pytest.raises(ValueError, match=r"width must lie in \[1, 7\], got 8"):
        random_networks(NetworkSpace(), 2, 5, seeded(), width=8)


def test_normalised_outputs():
    x = grid_points(3)
    nets, y = normalised(random_networks(NetworkSpace(), 2, 30, seeded()), x)
    assert x.shape == (1000, 3)
    torch.testing.assert_close(y.square().mean(1), torch.ones(30))
    torch.testing.assert_close(nets.outputs(x), y, rtol=1e-4, atol=1e-4)


def test_module_leaves_out_neurons_that_nothing_reads():
    space = NetworkSpace(inputs=1, width=3, max_depth=2, activation="sigmoid")
    first = torch.tensor([[[1.0], [2.0], [3.0]]])
    second = torch.tensor([[[0.0, 5.0, 0.0], [7.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])  # nothing reads the second neuron
    nets = NetworkBatch(space, (first, second, torch.tensor([[[4.0, 0.0, 6.0]]])), torch.ones(1, 2, 3))
    module, x = nets.to_module(0), torch.randn(9, 1)
    assert [list(m.weight.shape) for m in module if hasattr(m, "weight")] == [[1, 1], [2, 1], [1, 2]]
    torch.testing.assert_close(module(x)[:, 0], nets.outputs(x)[0])
    silent = replace(nets, weights=(first, second, torch.zeros(1, 1, 3)))
    assert silent.to_module(0)(x).abs().max() == 0
