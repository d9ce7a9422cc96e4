"""Networks in a continuous space: codec, teachers, encoders, decoders, training, search, hand-over."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from sparsenet.architecture.embedding.autoencoder import (
    AutoencoderConfig,
    NetworkAutoencoder,
    distance_mismatch,
    evaluate_autoencoder,
    load_autoencoder,
    sample_teachers,
    save_autoencoder,
    soft_minimum,
    train_autoencoder,
)
from sparsenet.architecture.embedding.codec import (
    MIXED,
    NetworkBatch,
    NetworkSpace,
)
from sparsenet.architecture.embedding.decoders import ConvDecoder
from sparsenet.architecture.embedding.encoders import row_columns, to_rows
from sparsenet.architecture.embedding.search import (
    EmbeddingSearchConfig,
    RegressionData,
    SearchOutcome,
    deletion_losses,
    judged,
    search_embedding,
    sharpened,
    sparsity_penalty,
    thresholded,
)
from sparsenet.architecture.embedding.teachers import grid_points, normalised, random_networks
from sparsenet.commands.embedding import load_network, read_table, save_network
from sparsenet.reproduce.embedding_baselines import dense_then_prune
from sparsenet.reproduce.regression_functions import FUNCTIONS, sample_function

MODERN = NetworkSpace(inputs=2, activation=MIXED, bias=True)


pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def trained():
    """A leaky ReLU autoencoder, a few seconds of training."""
    torch.set_num_threads(1)
    return train_autoencoder(AutoencoderConfig(steps=150, batch=32, points=128, hidden=256))


# --- autoencoder ---


@pytest.mark.parametrize("encoder", ["probe", "graph"])
def test_order_of_neurons_does_not_matter(encoder):
    model = NetworkAutoencoder(AutoencoderConfig(encoder=encoder, hidden=64)).eval()
    for depth in (1, 3):
        nets, _ = normalised(random_networks(model.space, depth, 8, seeded()), grid_points(3))
        with torch.no_grad():
            moved = model.encode(nets) - model.encode(nets.permuted(seeded(1)))
        assert float(moved.abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("encoder", "decoder", "space"),
    [
        ("probe", "mlp", NetworkSpace()),
        ("graph", "mlp", MODERN),
        ("conv", "conv", NetworkSpace(activation="sigmoid")),
        ("transformer", "transformer", NetworkSpace()),
        ("transformer", "transformer", MODERN),
    ],
)
def test_encoders_and_decoders_train(encoder, decoder, space):
    config = AutoencoderConfig(
        space, encoder, decoder, latent=56, hidden=64, steps=3, batch=8, points=32, learning_rate=1e-3
    )
    steps = []
    model = train_autoencoder(config, lambda step, loss, seconds: steps.append((step, loss)), every=1)
    assert [s for s, _ in steps] == [1, 2, 3] and all(np.isfinite(loss) for _, loss in steps)
    fresh = NetworkAutoencoder(config)
    assert set(fresh.state_dict()) == set(model.state_dict())
    numbers = evaluate_autoencoder(model, networks=16)
    assert len(numbers["decoder_nmse"]) == 4 and sum(numbers["shares"]) == pytest.approx(1)


def test_conv_sizes_are_the_papers():
    model = NetworkAutoencoder(AutoencoderConfig(encoder="conv", decoder="conv"))
    assert model.encoder.sizes == [768, 1280, 1792, 2304] == model.decoder.sizes
    with pytest.raises(ValueError, match="space must have no biases and one activation; use mlp or transformer"):
        ConvDecoder(MODERN, 128)


def test_rows_of_the_modern_form():
    assert row_columns(MODERN, 4) == 56  # SWAT-NN's number
    assert list(to_rows(random_networks(MODERN, 2, 3, seeded())).shape) == [3, 7, 2 * 11 + 8 + 2]


def test_training_repeats_itself():
    config = AutoencoderConfig(steps=4, batch=8, points=16, hidden=32)
    first, second = (train_autoencoder(config).state_dict() for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_no_decoder_dies(trained):
    numbers = evaluate_autoencoder(trained, 256)
    assert max(numbers["decoder_nmse"]) <= 0.5
    assert numbers["min_nmse"] <= 0.3


def test_soft_minimum_by_hand():
    losses = torch.tensor([[1.0, 3.0]], requires_grad=True)
    assert float(soft_minimum(losses.detach(), 1e-3, 0.0)) == pytest.approx(1.0)
    assert float(soft_minimum(losses.detach(), 1e6, 0.0)) == pytest.approx(2.0, abs=1e-4)
    soft_minimum(losses, 1e-3, 0.2).sum().backward()
    torch.testing.assert_close(losses.grad, torch.tensor([[0.9, 0.1]]))  # the loser still learns


def test_distance_mismatch_by_hand():
    z, y = torch.tensor([[0.0, 0.0], [3.0, 3.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    expected = math.log(3.01 / 1.01) ** 2  # distances 3 and 1
    assert float(distance_mismatch(z, y)) == pytest.approx(expected, rel=1e-5)
    config = AutoencoderConfig(steps=2, batch=8, points=16, hidden=32, isometry=0.5)
    assert all(p.isfinite().all() for p in train_autoencoder(config).parameters())


def test_teachers_of_every_depth():
    groups, y = sample_teachers(NetworkSpace(), 10, grid_points(3, 4), seeded())
    assert [nets.depth for nets in groups] == [1, 2, 3, 4] and list(y.shape) == [8, 64]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder": "lstm"}, "encoder must be one of probe, conv, graph, transformer, got 'lstm'"),
        ({"decoder": "lstm"}, "decoder must be one of mlp, conv, transformer, got 'lstm'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch": 3}, "batch must be at least max_depth 4, got 3"),
        ({"floor": 1.5}, r"floor must lie in \[0, 1\], got 1.5"),
        ({"isometry": -1}, r"isometry must lie in \[0, 1\], got -1"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(**arguments)


def test_files_round_trip(tmp_path):
    model = NetworkAutoencoder(AutoencoderConfig(hidden=32, latent=16))
    save_autoencoder(tmp_path / "a.safetensors", model)
    again = load_autoencoder(tmp_path / "a.safetensors")
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_bad_files(tmp_path):
    from safetensors.torch import save_file

    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\xff" * 40)
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        load_autoencoder(broken)
    save_file({"a": torch.zeros(1)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="must be an autoencoder of version 1, got none"):
        load_autoencoder(tmp_path / "other.safetensors")
    header = '{"version": 1, "space": {"inputs": 3}, "hidden": 8}'
    save_file({"a": torch.zeros(1)}, str(tmp_path / "c.safetensors"), {"sparsenet_autoencoder": header})
    with pytest.raises(ValueError, match="does not fit its own header"):
        load_autoencoder(tmp_path / "c.safetensors")


# --- search ---


def teacher_data(depth=2, nonzeros=14, seed=1):
    nets = random_networks(NetworkSpace(), depth, 1, seeded(seed), width=5, nonzeros=nonzeros)
    x = torch.rand(3000, 3, generator=seeded(seed + 1)) * 2 - 1
    return RegressionData.from_arrays(x, nets.outputs(x)[0])


def test_thresholds_and_penalty_by_hand():
    space = NetworkSpace(inputs=2, width=2, max_depth=1)
    weights = (torch.tensor([[[1.0, -0.1], [2.0, 0.0]]]), torch.tensor([[[3.0, -2.0]]]))
    nets = NetworkBatch(space, weights, torch.tensor([[[1.0, 0.0]]]))
    hard = thresholded(nets, torch.tensor([0.5]), None)
    assert hard.weights[0].tolist() == [[[1.0, 0.0], [2.0, 0.0]]]
    soft = thresholded(nets, torch.tensor([0.5]), 100.0)
    torch.testing.assert_close(soft.weights[0], hard.weights[0], atol=1e-4, rtol=0)
    alive = torch.tensor([1.0, 0.1, 3.0])  # weights between neurons that exist
    expected = (0.5 * ((alive - 0.5) * 10).sigmoid() + 0.1 * alive).sum()
    torch.testing.assert_close(sparsity_penalty(nets, torch.tensor([0.5]))[0], expected)


def test_deletion_losses_by_hand():
    space = NetworkSpace(inputs=1, width=1, max_depth=1, activation="linear")
    nets = NetworkBatch(space, (torch.tensor([[[2.0]]]), torch.tensor([[[3.0]]])), torch.ones(1, 1, 1))
    x = torch.tensor([[1.0], [2.0]])
    losses = deletion_losses(nets, x, nets.outputs(x)[0])
    torch.testing.assert_close(losses, torch.tensor([[90.0, 90.0]]))  # (6^2 + 12^2) / 2
    zero = replace(nets, weights=(torch.zeros(1, 1, 1), nets.weights[1]))
    assert deletion_losses(zero, x, torch.zeros(2))[0, 0] == torch.inf


def test_sharpened_choices():
    nets = random_networks(MODERN, 1, 2, seeded())
    soft = replace(nets, mixture=torch.tensor([0.5, 0.3, 0.2]).expand(2, 1, 7, 3))
    assert sharpened(soft, 0).mixture[0, 0, 0].tolist() == [1.0, 0.0, 0.0]
    assert float(sharpened(soft, 0.1).mixture[0, 0, 0, 0]) > 0.95
    plain = random_networks(NetworkSpace(), 1, 2, seeded())
    assert sharpened(plain, 0.1) is plain


def test_search_recovers_a_small_network(trained):
    data = teacher_data()
    config = EmbeddingSearchConfig(depths=(1, 2), iterations=200, tune_iterations=150)
    outcome = search_embedding(trained, data, config)
    assert outcome.best().test_fvu <= 0.02
    small = outcome.within(28)
    assert small.nonzeros <= 28 and small.test_fvu <= 0.03
    assert outcome.sparsest(0.03).nonzeros <= small.nonzeros
    assert outcome.sparsest(0.0) is None and outcome.within(0) is None
    front = outcome.front()
    assert [c.valid_fvu for c in front] == sorted((c.valid_fvu for c in front), reverse=True)
    module = small.module(data)
    with torch.no_grad():
        error = (module(data.test_x)[:, 0] / data.scale - data.test_y).square().mean() / data.test_y.var()
    assert float(error) == pytest.approx(small.test_fvu, rel=1e-3)
    assert all(type(m) in (nn.Linear, nn.LeakyReLU) for m in module)


def test_inputs_are_scaled_and_the_factors_handed_over(trained):
    plain = teacher_data()
    x, y = plain.train_x * torch.tensor([10.0, 0.1, 3.0]), plain.train_y
    data = RegressionData.from_arrays(x, y, scale_inputs=True)
    assert float(data.train_x.abs().max()) <= 1
    config = EmbeddingSearchConfig((1,), 1, (1.0,), iterations=5, tune_iterations=40, prune_to=20)
    found = search_embedding(trained, data, config).best()
    with torch.no_grad():
        error = found.module(data)(data.test_x * data.input_scale)[:, 0] / data.scale - data.test_y
    assert float(error.square().mean() / data.test_y.var()) == pytest.approx(found.test_fvu, rel=1e-3)


@pytest.mark.parametrize("start", ["uniform", "normal"])
def test_search_starts_and_single_depth(trained, start):
    config = EmbeddingSearchConfig((3,), 1, (1.0,), iterations=5, start=start, tune_iterations=3, prune_to=20)
    assert {c.depth for c in search_embedding(trained, teacher_data(), config).candidates} == {3}


def test_modern_mode_on_a_formula(tmp_path):
    config = AutoencoderConfig(MODERN, "transformer", "transformer", latent=56, hidden=32, steps=5, batch=8, points=64)
    model = train_autoencoder(config)
    x, y = sample_function("mccormick", 600)
    data = RegressionData.from_arrays(x, y, centre=True)
    search_config = EmbeddingSearchConfig((2,), 1, (1.0,), iterations=10, tune_iterations=90, prune_to=20)
    found = search_embedding(model, data, search_config).best()
    file = tmp_path / "network.safetensors"
    save_network(file, found.module(data), MODERN)
    with torch.no_grad():
        error = (load_network(file)(data.test_x)[:, 0] - data.shift) / data.scale - data.test_y
    assert float(error.square().mean() / data.test_y.var()) == pytest.approx(found.test_fvu, rel=1e-3)
    file.write_bytes(b"pickle")
    with pytest.raises(ValueError, match="must be a network of sparsenet search --method embedding"):
        load_network(file)
    shares = found.nets.mixture
    assert torch.all((shares == 0) | (shares == 1))  # every neuron has chosen


def test_baselines(trained):
    config = EmbeddingSearchConfig(iterations=60, restarts=1, sparsity_weights=(1.0,), tune_iterations=30)
    pruned = dense_then_prune(trained.space, teacher_data(), config, depths=(1,))
    dense = dense_then_prune(trained.space, teacher_data(), config, depths=(1,), prune=False)
    assert {c.nonzeros for c in dense.candidates} == {28}
    assert min(c.nonzeros for c in pruned.candidates) <= 4
    assert dense_then_prune(MODERN, _formula("booth"), config, depths=(1,), prune=False).best().test_fvu < 1.5


def _formula(name):
    x, y = sample_function(name, 300)
    return RegressionData.from_arrays(x, y, centre=True)


def test_outcomes_without_candidates_that_diverged():
    nets = random_networks(NetworkSpace(), 1, 2, seeded())
    bad = replace(nets, weights=(nets.weights[0], nets.weights[1] * torch.tensor([1.0, float("nan")])[:, None, None]))
    found = judged(bad, teacher_data(), torch.zeros(2), "search")
    assert len(found) == 1 and SearchOutcome(found).best() is found[0]


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.rand(20, 3), torch.full((20,), 2.0), "y must vary, got 2.0 everywhere"),
        (torch.rand(20, 3), torch.tensor([float("nan"), *range(19)]), "x and y must be finite"),
        (torch.rand(5, 3), torch.rand(5), r"n >= 10, got \[5, 3\] and \[5\]"),
        (torch.rand(20, 3), torch.rand(20, 2), r"y \[n\] with n >= 10, got \[20, 3\] and \[20, 2\]"),
    ],
)
def test_bad_regression_data(x, y, message):
    with pytest.raises(ValueError, match=message):
        RegressionData.from_arrays(x, y)


def test_bad_searches(trained):
    with pytest.raises(ValueError, match="start must be one of teachers, uniform, normal, got 'zeros'"):
        EmbeddingSearchConfig(start="zeros")
    with pytest.raises(ValueError, match="restarts and iterations must be at least 1"):
        EmbeddingSearchConfig(restarts=0)
    with pytest.raises(ValueError, match="data must have 3 inputs, got 2"):
        search_embedding(trained, _formula("booth"), EmbeddingSearchConfig())


# --- functions, tables, command line ---


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_finite_and_vary(name):
    x, y = sample_function(name, 500)
    assert x.shape == (500, 2) and y.isfinite().all() and y.std() > 0


def test_functions_by_hand():
    matyas = FUNCTIONS["matyas"][0]
    assert float(matyas(torch.tensor(1.0), torch.tensor(2.0))) == pytest.approx(0.26 * 5 - 0.96)
    assert float(FUNCTIONS["himmelblau"][0](torch.tensor(3.0), torch.tensor(2.0))) == 0.0
    for minimum, x, y, least in (("rosenbrock", 1.0, 1.0, 0.0), ("beale", 3.0, 0.5, 0.0), ("griewank", 0.0, 0.0, -1.0)):
        assert float(FUNCTIONS[minimum][0](torch.tensor(x), torch.tensor(y))) == pytest.approx(least, abs=1e-5)
    assert float(FUNCTIONS["three_hump_camel"][0](torch.tensor(1.0), torch.tensor(2.0))) == pytest.approx(7.11667, 1e-4)
    branin = FUNCTIONS["branin"][0](torch.tensor(torch.pi), torch.tensor(2.275))
    assert float(branin) + 10 == pytest.approx(0.3979, abs=1e-3)
    with pytest.raises(ValueError, match="name must be one of ackley"):
        sample_function("sphere", 10)


def test_regression_tables(tmp_path):
    (tmp_path / "a.csv").write_text("p,q,target\n1,2,3\n4,5,6\n")
    x, y = read_table(tmp_path / "a.csv")
    assert x.tolist() == [[1, 2], [4, 5]] and y.tolist() == [3, 6]
    np.savez(tmp_path / "b.npz", x=np.ones((4, 3)), y=np.arange(4.0))
    assert [list(t.shape) for t in read_table(tmp_path / "b.npz")] == [[4, 3], [4]]


def test_bad_regression_tables(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path must be an existing .npz or .csv file"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "a.txt").write_text("1")
    with pytest.raises(ValueError, match=r"path must end in .npz or .csv"):
        read_table(tmp_path / "a.txt")
    (tmp_path / "a.csv").write_text("1,2\n3,nan\n")
    with pytest.raises(ValueError, match="must hold numbers only, got none in row 2, column 2"):
        read_table(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("1\n3\n")
    with pytest.raises(ValueError, match=r"must be rows of two or more numbers each, got \[2\]"):
        read_table(tmp_path / "a.csv")
    np.savez(tmp_path / "b.npz", x=np.ones(3))
    with pytest.raises(ValueError, match="must hold x and y, got x"):
        read_table(tmp_path / "b.npz")


def test_command_line(tmp_path, capsys):
    import argparse

    pytest.importorskip("optuna")
    from sparsenet.commands import search as command

    data = teacher_data()
    np.savez(tmp_path / "t.npz", x=data.train_x.numpy()[:300], y=data.train_y.numpy()[:300])
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    line = ["--method", "embedding", "--data", str(tmp_path / "t.npz"), "--out", str(tmp_path / "out")]
    args = parser.parse_args([*line, "--train-steps", "5", "--restarts", "1", "--max-fvu", "1e-9"])
    from unittest.mock import patch

    quick = EmbeddingSearchConfig(restarts=1, iterations=5, tune_iterations=3, prune_to=25)
    with patch("sparsenet.commands.embedding.EmbeddingSearchConfig", lambda **_: quick):
        assert command.run(args) == 0
        assert "training the autoencoder once" in capsys.readouterr().out
        assert command.run(args) == 0  # the second time it is there
    printed = capsys.readouterr().out
    assert "training" not in printed and "Pareto front" in printed
    assert "no network has a validation FVU of at most 1e-09" in printed
    network = load_network(tmp_path / "out" / "network.safetensors")
    assert [type(m) for m in network][:2] == [nn.Linear, nn.LeakyReLU]
    table = json.loads((tmp_path / "out" / "front.json").read_text())
    assert int(sum((p != 0).sum() for p in network.parameters())) in [row[0] for row in table["rows"]]
    args.checkpoint = str(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="checkpoint must be an existing file"):
        command.run(args)
