"""Calling fit again: it continues, on the same data or on others, after an end, an interruption or early stopping."""

from itertools import chain

import pytest
import torch
from small_trainings import SMALL, TRAIN, VALIDATION, batches_of, small_model, stop_at, with_config

import sparsenet as sn
from sparsenet.training.progress import read_metrics


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "constant"])
def test_row84_a_second_fit_continues(tmp_path, schedule):
    learner = sn.Trainer(small_model(), with_config(lr_schedule=schedule), tmp_path)
    first = learner.fit(TRAIN, VALIDATION)
    before, sparsifier = [p.clone() for p in learner.model.parameters()], learner.sparsifier
    moments = learner.optimizer.state[learner.model[0].values]["step"]
    second = learner.fit(TRAIN, VALIDATION)
    assert (first.steps, second.steps) == (33, 66) and int(moments) == 66
    assert second.rewires == 2 * first.rewires == 12 and second.blocks_moved > first.blocks_moved
    assert not all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(before, learner.model.parameters(), strict=True)
    )
    assert learner.sparsifier is not sparsifier and learner.sparsifier.steps == 33
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["epoch"] for line in lines if line["kind"] == "epoch"] == [1, 2, 3, 4, 5, 6]
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps) and steps[0] == 3 and steps[-1] == 66
    rates = [{line["step"] - at: line["lr"] for line in lines if line["kind"] == "train"} for at in (0, 33)]
    assert all(rates[0][n] == pytest.approx(rates[1][n]) for n in (3, 9, 15, 24, 33)), "the schedule begins anew"
    assert max(rates[1].values()) > 0.005


def test_row84_a_second_fit_sees_other_orders_and_no_more_than_one_sparsifier():
    seen, updates = [], []
    learner = sn.Trainer(small_model(), with_config(epochs=1, policy="set"))
    step = learner._step
    learner._step = lambda x, y, fit: (seen.append(y.tolist()), step(x, y, fit))
    for _ in range(2):
        learner.fit(TRAIN)
        updates.append(learner.sparsifier.seed)
    assert seen[:11] != seen[11:] and sorted(chain(*seen[:11])) == sorted(chain(*seen[11:]))
    assert updates == [0, 11], "other random numbers for the growth of the second fit"


def test_row84_a_falling_density_goes_on_to_where_it_was_to_end():
    for changes, expected in (({}, 0.25), ({"final_density": 0.3}, 0.3)):
        learner = sn.Trainer(small_model(), with_config(epochs=6, policy="gmp", **changes))
        for _ in range(2):
            learner.fit(TRAIN)
            assert learner.density == pytest.approx(expected, abs=0.02)


def test_row84_a_second_fit_on_other_data_and_batches():
    learner = sn.Trainer(small_model(), with_config(epochs=1))
    learner.fit(TRAIN, VALIDATION)
    normalization = learner.normalization
    learner.evaluate(VALIDATION)
    batches = batches_of(TRAIN)[:4]
    assert learner.fit(VALIDATION).steps == 11 + 3 and learner.fit(batches).steps == 11 + 3 + 4
    assert learner.normalization is normalization, "what the weights were trained for"
    narrow = (torch.rand(8, 10), torch.arange(8))
    with pytest.raises(ValueError, match=r"block_sparse_linear.*: x must have 64 columns, got \[8, 10\]"):
        learner.fit(narrow)
    with pytest.raises(ValueError, match="Trainer: x must have 64 features as in the first fit or train, got 10"):
        learner.fit(TRAIN, narrow)
    assert learner.step == 18 and learner.fit(TRAIN).steps == 29
    learner = sn.Trainer(small_model(), with_config(epochs=1))
    learner.fit((torch.rand(32, 64), torch.arange(32) % 10))  # floats are standardised feature by feature
    for some in (learner.fit, learner.evaluate):
        with pytest.raises(ValueError, match="Trainer: x must have 64 features as in the first fit or train, got 10"):
            some(narrow)


def test_row84_an_interrupted_second_fit_resumes_bit_for_bit(tmp_path):
    whole = sn.Trainer(small_model(), with_config(policy="gmp"))
    for _ in range(2):
        whole.fit(TRAIN, VALIDATION)
    part = sn.Trainer(small_model(), with_config(policy="gmp"), tmp_path)
    part.fit(TRAIN, VALIDATION)
    stop_at(part, 47)
    assert part.fit(TRAIN, VALIDATION).interrupted and part.step == 47
    rest = sn.Trainer(small_model(3, 0.7), with_config(policy="gmp"), tmp_path)
    result = rest.fit(TRAIN, VALIDATION, resume=True)
    assert (result.steps, result.rewires, result.interrupted) == (66, whole._tally.rewires, False)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True))
    assert rest.fit(TRAIN, resume=True).steps == 66, "nothing is left to do"
    assert rest.fit(TRAIN).steps == 99


def test_row84_a_fit_after_an_interrupted_one(tmp_path):
    learner = sn.Trainer(small_model(), SMALL, tmp_path)
    stop_at(learner, 15)
    assert learner.fit(TRAIN).interrupted and learner.step == 15
    result = learner.fit(TRAIN)
    assert result.steps == 15 + 33 and not result.interrupted
    stop_at(learner, 60)
    assert learner.fit(TRAIN).interrupted
    assert learner.fit(TRAIN, resume=True).steps == 15 + 33 + 33, "the rest of the third"


def test_row84_resuming_another_fit_is_refused(tmp_path):
    learner = sn.Trainer(small_model(), SMALL, tmp_path)
    learner.fit(TRAIN)
    for config, examples, message in (
        (with_config(epochs=4), TRAIN, "Trainer: resume needs 3 epochs, as in the interrupted fit, got 4"),
        (with_config(batch_size=64), TRAIN, "Trainer: resume needs 11 batches per epoch, as in .* got 6"),
        (SMALL, VALIDATION, "Trainer: resume needs 11 batches per epoch, as in .* got 3"),
    ):
        other = sn.Trainer(small_model(), config, tmp_path)
        before = [p.clone() for p in other.model.parameters()]
        with pytest.raises(ValueError, match=message):
            other.fit(examples, resume=True)
        assert other.step == 0 and all(map(torch.equal, before, other.model.parameters()))


def test_row84_a_fit_after_early_stopping(tmp_path):
    """The best weights are back, of other places than the last moments: these begin anew, and training goes on."""
    config = with_config(epochs=40, patience=2, lr=0.03, lr_schedule="constant", rewire_until=1.0)
    learner = sn.Trainer(small_model(), config, tmp_path)
    first = learner.fit(TRAIN, VALIDATION)
    best = learner.evaluate(VALIDATION).loss
    assert first.stopped_early and first.optimizer_bytes > 0
    learner.save()
    sn.load(tmp_path / "checkpoint.safetensors", small_model(), None)
    second = learner.fit(TRAIN, VALIDATION)
    assert second.steps > first.steps
    assert learner.evaluate(VALIDATION).loss < 2 * best
    for layer in learner.model:
        for state in learner.optimizer.state.get(layer.values, {}).values():
            assert state.numel() == 1 or state.shape == layer.values.shape
