"""What a Trainer refuses in a sentence: data that does not fit, losses and weights that are not finite, devices."""

import json
import math

import numpy as np
import pytest
import torch
from small_trainings import SMALL, TRAIN, VALIDATION, small_model, stop_at, with_config
from torch import nn

import sparsenet as sn


class Counting(nn.Module):
    """A dense classifier of 64 features in 10 classes that counts its passes."""

    def __init__(self):
        super().__init__()
        self.linear, self.passes = nn.Linear(64, 10), 0

    def forward(self, x):
        self.passes += 1
        return self.linear(x)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (lambda x, y: (x, y + 1), r"Trainer: labels must be in \[0, 10\), the model's outputs, got 10"),
        (lambda x, y: (x, y - 1), "Examples: y must be class numbers of 0 or more, got -1"),
        (lambda x, y: [(x, y + 5)], r"Trainer: labels must be in \[0, 10\), the model's outputs, got 14"),
        (lambda x, y: [(x, y - 1)], r"Trainer: labels must be in \[0, 10\), the model's outputs, got -1"),
        (lambda x, y: (x[:, :32], y), r"Trainer: x must be as wide as .* got \[20, 32\]: .*20x32 and 64x10"),
        (lambda x, y: [(x[:, :32], y)], r"Trainer: x must be as wide as .* got \[20, 32\]: .*20x32 and 64x10"),
        (lambda x, y: zip([x], [y], strict=True), "batches must have a length and be there again .* got a zip"),
        (lambda x, y: (pair for pair in [(x, y)]), "batches must have a length and be there again .* got a generator"),
        (lambda x, y: [(x, y, y)], "a batch must be .x, y. or a dictionary of x and y, got a tuple of 3 entries"),
        (lambda x, y: [x], "a batch must be .x, y. or a dictionary of x and y, got a Tensor"),
        (lambda x, y: [(x[:0], y[:0])], r"x of a batch must be \[b >= 1, features...\], got \[0, 64\]"),
        (lambda x, y: (x[:0], y[:0]), "fit needs at least one example, got none"),
    ],
)
def test_row84_data_that_does_not_fit_is_refused_before_a_step(examples, message):
    learner = sn.Trainer(Counting(), SMALL)
    x, y = torch.rand(20, 64), torch.arange(20) % 10
    before = learner.model.linear.weight.clone()
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        learner.fit(examples(x, y))
    assert "\n" not in str(caught.value) and learner.step == 0 and torch.equal(learner.model.linear.weight, before)
    assert learner.fit((x, y)).steps == 3, "nothing of it is left"


def test_row84_validation_data_is_looked_at_before_training():
    learner = sn.Trainer(Counting(), with_config(patience=1))
    x, y = torch.rand(20, 64), torch.arange(20) % 10
    for val, message in (
        ((x, y + 1), r"labels must be in \[0, 10\)"),
        ((x[:0], y[:0]), "val must hold at least one example"),
        ([], "val must hold at least one example"),
        (iter([(x, y)]), "be there again for every epoch"),
        ((x.where(x > 0.5, math.nan), y), "x must be finite"),
        (None, "patience must be 0 where val is not given, got 1"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            learner.fit((x, y), val)
        assert learner.step == 0


def test_row84_an_epoch_of_another_length_than_it_says():
    class Says(list):
        def __len__(self):
            return 3

    x, y = torch.rand(4, 64), torch.arange(4)
    for real, got in ((2, "2"), (4, "more")):
        with pytest.raises(ValueError, match=f"Trainer: an epoch must be of 3 batches, its length, got {got}"):
            sn.Trainer(Counting(), SMALL).fit(Says([(x, y)] * real))


def test_row84_models_that_are_no_classifiers():
    class Two(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    data = (torch.rand(20, 64), torch.arange(20) % 10)
    with pytest.raises(TypeError, match="Trainer: the model must return a tensor of logits, got tuple"):
        sn.Trainer(Two(64, 10), SMALL).fit(data)
    with pytest.raises(ValueError, match=r"Trainer: the model must return logits \[20, classes\], got \[20, 5, 2\]"):
        sn.Trainer(nn.Sequential(nn.Linear(64, 10), nn.Unflatten(1, (5, 2))), SMALL).evaluate(data)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("val", [None, VALIDATION])
def test_row84_losses_that_are_not_finite_end_in_a_sentence(tmp_path, bad, val):
    """With early stopping as without; the checkpoint that an earlier epoch left can be loaded."""
    learner = sn.Trainer(small_model(), with_config(patience=1 if val else 0, log_every=1000), tmp_path)
    step, good = learner._step, []

    def spoiling(x, y, fit):
        step(x, y, fit)
        if learner.step == 11 + 4:
            with torch.no_grad():
                learner.model[0].bias[0] = bad
        good.append(learner.step)

    learner._step = spoiling
    with pytest.raises(
        RuntimeError, match="Trainer: the loss must be finite, got (nan|inf) at step 22; try a lower lr"
    ):
        learner.fit(TRAIN, val)
    found = sn.load(tmp_path / "checkpoint.safetensors", small_model())
    assert found.step == 11 and good[-1] == 21


def test_row84_a_validation_loss_that_is_not_finite(tmp_path):
    learner = sn.Trainer(small_model(), with_config(patience=1), tmp_path)
    learner.evaluate = lambda val: sn.data.Evaluation(math.nan, 0.1, 70)
    with pytest.raises(
        RuntimeError, match="Trainer: the validation loss must be finite, got nan at step 11; try a lower"
    ):
        learner.fit(TRAIN, VALIDATION)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_row84_no_checkpoint_of_weights_that_are_not_finite(tmp_path):
    """A last step that spoils the weights after its loss was finite, at the end of an epoch or when interrupted."""
    for at in (22, 25):
        learner = sn.Trainer(small_model(), with_config(policy="static"), tmp_path)
        step = learner._step

        def spoiling(x, y, fit, at=at, step=step, learner=learner):
            step(x, y, fit)
            if learner.step == at:
                fit.stop.asked = at == 25
                with torch.no_grad():
                    learner.model[1].bias[3] = math.inf

        learner._step = spoiling
        with pytest.raises(RuntimeError, match=f"Trainer: the parameter 1.bias must be finite, got inf at step {at}"):
            learner.fit(TRAIN)
        assert sn.load(tmp_path / "checkpoint.safetensors", small_model()).step == at // 11 * 11 - (at == 22) * 11


def test_row84_an_interruption_looks_at_the_losses_since_the_last_line(tmp_path):
    learner = sn.Trainer(small_model(), with_config(log_every=1000), tmp_path)
    with torch.no_grad():
        learner.model[0].bias[0] = math.nan
    stop_at(learner, 4)
    with pytest.raises(RuntimeError, match="Trainer: the loss must be finite, got nan at step 4"):
        learner.fit(TRAIN)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_row84_a_missing_best_file_is_no_error(tmp_path):
    config = with_config(epochs=8, patience=3)
    learner = sn.Trainer(small_model(), config, tmp_path)
    stop_at(learner, 14)
    learner.fit(TRAIN, VALIDATION)
    (tmp_path / "best.safetensors").unlink()
    assert sn.Trainer(small_model(), config, tmp_path).fit(TRAIN, VALIDATION, resume=True).steps > 14


def test_row84_a_device_that_is_not_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="Trainer: device must be on this machine, got 'cuda'; torch finds no CUDA"):
        sn.Trainer(small_model(), with_config(device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="got 'cuda:2'; torch finds 2 CUDA devices"):
        sn.Trainer(small_model(), with_config(device="cuda:2"))


def test_row83_numbers_of_numpy_and_torch_in_a_configuration():
    given = {"epochs": np.int64(3), "lr": np.float64(0.01), "batch_size": torch.tensor(32), "hidden": (np.int32(96),)}
    config = with_config(**given, momentum=np.float32(0.5), plots=np.bool_(False))
    assert config == with_config(epochs=3, lr=0.01, batch_size=32, hidden=(96,), momentum=0.5, plots=False)
    assert sn.TrainConfig.from_dict(json.loads(config.to_json())) == config
    with pytest.raises(TypeError, match="epochs must be of type int"):
        with_config(epochs=torch.tensor([3]))
