import json
import math
import os
import signal

import pytest
import torch
from small_trainings import DIGITS, SMALL, TRAIN, VALIDATION, batches_of, small_model, with_config
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sparsenet as sn
from sparsenet import checkpoint
from sparsenet.data import augmentation
from sparsenet.training import progress
from sparsenet.training.progress import read_metrics

# --- training ---


def test_fit_learns_rewires_and_reports(tmp_path):
    learner = sn.Trainer(small_model(seed=1), with_config(epochs=8), tmp_path)
    patterns = [layer.pattern for layer in learner.model]
    result = learner.fit(TRAIN, VALIDATION)
    assert (result.steps, result.interrupted, result.stopped_early) == (88, False, False)
    assert result.rewires == 16 and result.blocks_moved > 0, "every fourth of the first 66 steps"
    assert any(a != layer.pattern for a, layer in zip(patterns, learner.model, strict=True))
    assert result.validation.examples == 70 and result.validation.accuracy > 0.8
    test = learner.evaluate((DIGITS.test_x, DIGITS.test_y))
    assert test.accuracy > 0.8 and test.examples == len(DIGITS.test_y)
    assert 0 < result.seconds_per_step * 88 == pytest.approx(result.seconds)
    assert result.peak_bytes > 0 and result.peak_method == "VmHWM"
    phases = {"forward", "backward", "scoring growth", "optimizer step", "rewire", "evaluation"}
    assert set(result.peak_phases) == phases

    lines = read_metrics(tmp_path / "metrics.jsonl")
    by_kind = {kind: [line for line in lines if line["kind"] == kind] for kind in ("train", "epoch", "rewire")}
    assert [line["epoch"] for line in by_kind["epoch"]] == list(range(1, 9))
    assert len(by_kind["rewire"]) == 16
    moved = sum(layer["grown"] for line in by_kind["rewire"] for layer in line["layers"].values())
    assert moved == result.blocks_moved == by_kind["train"][-1]["blocks_moved"]
    assert {line["step"] for line in by_kind["train"]} >= {3, 6, 9, 11, 12, 88}
    assert by_kind["train"][-1]["loss"] < by_kind["train"][0]["loss"]
    assert set(by_kind["train"][0]) == {
        "kind", "step", "loss", "accuracy", "lr", "density", "blocks_moved", "peak_bytes", "examples_per_second",
    }  # fmt: skip


def test_plans_are_built(tmp_path):
    config = with_config(hidden=(96, 80), block_size=16, budget="4MiB", epochs=1)
    plan = config.plan(64, 10)
    learner = sn.Trainer(plan, config)
    assert [layer.pattern.num_blocks for layer in learner.model] == [layer.num_blocks for layer in plan.layers]
    assert learner.fit(TRAIN).steps == 11
    assert learner.density == pytest.approx(plan.density)


def test_same_seed_same_weights():
    def weights(seed):
        learner = sn.Trainer(small_model(), with_config(epochs=1, seed=seed, shift=1, flip=True))
        learner.fit(TRAIN)
        return [p.clone() for p in learner.model.parameters()]

    first = weights(3)
    assert all(torch.equal(a, b) for a, b in zip(first, weights(3), strict=True))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, weights(4), strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sgd", "lr": 0.1, "lr_schedule": "cosine"},
        {"optimizer": "sgd", "lr": 0.1, "momentum": 0.0, "clip_norm": 1.0},
        {"policy": "set", "lr_schedule": "constant", "label_smoothing": 0.1},
        {"policy": "static", "flip": True, "shift": 1},
        {"policy": "gmp", "final_density": 0.3},
        {"policy": "gmp"},
    ],
)
def test_every_knob_trains(changes):
    learner = sn.Trainer(small_model(), with_config(epochs=6, **changes))
    before = learner.density
    result = learner.fit(TRAIN)
    assert learner.evaluate(TRAIN).accuracy > 0.6
    policy = changes.get("policy", "rigl")
    assert (result.rewires > 0) == (policy != "static")
    expected = {"gmp": changes.get("final_density", before / 2)}.get(policy, before)
    assert learner.density == pytest.approx(expected, abs=0.02)


def test_bfloat16_and_float64():
    for dtype in ("bfloat16", "float64"):
        config = with_config(hidden=(96, 80), block_size=16, budget="8MiB", dtype=dtype, epochs=4)
        learner = sn.Trainer(config.plan(64, 10), config)
        learner.fit(TRAIN)
        assert learner.evaluate(TRAIN).accuracy > 0.6
        assert next(learner.model.parameters()).dtype == getattr(torch, dtype)


def test_data_loaders_and_dense_models():
    x = torch.randn(96, 20)
    loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=32, shuffle=True)
    learner = sn.Trainer(nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 2)), with_config(epochs=20))
    result = learner.fit(loader, loader)
    assert result.steps == 60 and result.rewires == 0 and learner.density == 1.0
    assert learner.evaluate(loader).accuracy > 0.8


def test_early_stopping_keeps_the_best(tmp_path):
    config = with_config(epochs=40, patience=2, lr=0.03, lr_schedule="constant")
    learner = sn.Trainer(small_model(), config, tmp_path)
    result = learner.fit(TRAIN, VALIDATION)
    losses = [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "epoch"]
    assert result.stopped_early and result.steps < 40 * 11
    assert min(losses) == losses[-3] and len(losses) * 11 == result.steps
    assert learner.evaluate(VALIDATION).loss == pytest.approx(min(losses), rel=1e-5)


# --- the process is left as it was ---


def test_a_trainer_sets_nothing_for_the_process(run_child):
    """Neither the allocator, nor random numbers, nor the number of threads; the job of the command line does."""
    code = """
        import os, torch, sparsenet as sn
        from sparsenet.memory import budget
        from sparsenet.training import job

        def refuse():
            called.append("release_freed_memory")

        called, before = [], (torch.get_num_threads(), torch.get_rng_state())
        budget.release_freed_memory = job.release_freed_memory = refuse
        config = sn.TrainConfig(epochs=1, batch_size=32, threads=before[0] + 1, seed=5, progress=False)
        plan = sn.plan([64, 96, 10], None, density=0.3, block_size=16, batch_size=32)
        x, y = torch.arange(64 * 64).reshape(64, 64).float(), torch.arange(64) % 10
        trainer = sn.Trainer(plan, config)
        trainer.fit((x, y), (x, y))
        trainer.evaluate((x, y))
        assert torch.get_num_threads() == before[0] and torch.equal(torch.get_rng_state(), before[1])
        assert not called and "THP_MEM_ALLOC_ENABLE" not in os.environ
        job._prepare_process(config)
        assert torch.get_num_threads() == before[0] + 1 and called
        assert torch.initial_seed() == 5
    """
    run_child(code, THP_MEM_ALLOC_ENABLE=None)  # which a job in the process of the tests has set


def test_threads_hold_while_fitting(one_thread):
    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.seen = nn.Linear(64, 10), set()

        def forward(self, x):
            self.seen.add(torch.get_num_threads())
            return self.linear(x)

    model = Watched()
    learner = sn.Trainer(model, with_config(epochs=1, threads=2))
    learner.fit(TRAIN, VALIDATION)
    learner.evaluate(VALIDATION)
    assert model.seen == {2} and torch.get_num_threads() == 1


def test_the_seed_draws_a_planned_network():
    plan = sn.plan([64, 96, 10], None, density=0.3, block_size=16)
    one, two, other = (sn.Trainer(plan, with_config(seed=seed)).model for seed in (3, 3, 4))
    torch.manual_seed(3)
    drawn = plan.build()
    for a, b, c, d in zip(*(m.parameters() for m in (one, two, drawn, other)), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c), "as torch's own generator of that seed draws it"
        assert a.shape != d.shape or not torch.equal(a, d)


# --- interrupted and resumed ---


class Interrupting:
    """Batches that send this process a signal while one of them is being made."""

    def __init__(self, batches, at, number=signal.SIGINT):
        self.batches, self.at, self.number, self.made = batches, at, number, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            self.made += 1
            if self.made == self.at:
                os.kill(os.getpid(), self.number)
            yield batch


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [5, 11, 16])
def test_interrupted_training_resumes_bit_for_bit(tmp_path, at, number):
    batches = batches_of(TRAIN)
    whole = sn.Trainer(small_model(), SMALL, tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    whole.fit(batches, VALIDATION)
    (tmp_path / "parts").mkdir()
    part = sn.Trainer(small_model(), SMALL, tmp_path / "parts")
    before = signal.getsignal(signal.SIGINT)
    result = part.fit(Interrupting(batches, at, number), VALIDATION)
    assert result.interrupted and result.steps == at
    assert signal.getsignal(signal.SIGINT) is before
    rest = sn.Trainer(small_model(9, 0.2), SMALL, tmp_path / "parts")
    result = rest.fit(batches, VALIDATION, resume=True)
    assert result.steps == 33 and not result.interrupted
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True))
    kinds = ("loss", "accuracy", "lr", "density")
    first, second = (
        [{k: line.get(k) for k in (*kinds, "kind", "step")} for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "parts")
    )
    losses = [{line["step"]: line for line in lines if line["kind"] != "train"} for lines in (first, second)]
    assert losses[0] == losses[1]
    assert first[-2:] == second[-2:]


def test_resumed_examples_are_shuffled_and_moved_alike(tmp_path):
    config = with_config(flip=True, shift=1, dense_steps=0)
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = sn.Trainer(small_model(), config, tmp_path / "whole")
    whole.fit(TRAIN, VALIDATION)
    part = sn.Trainer(small_model(), config, tmp_path / "parts")
    step, part._step = part._step, lambda x, y, fit: (step(x, y, fit), setattr(fit.stop, "asked", part.step == 15))
    assert part.fit(TRAIN, VALIDATION).interrupted
    rest = sn.Trainer(small_model(4), config, tmp_path / "parts")
    result = rest.fit(TRAIN, VALIDATION, resume=True)
    assert result.rewires == whole._tally.rewires and result.blocks_moved == whole._tally.blocks_moved
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True))


def test_a_second_signal_is_obeyed_at_once():
    with pytest.raises(KeyboardInterrupt), progress.StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_metrics_of_lost_steps_are_dropped(tmp_path):
    with progress.MetricsFile(tmp_path) as file:
        for step in range(1, 6):
            file.write("train", step, loss=1.0 / step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    with progress.MetricsFile(tmp_path, step=3) as file:
        file.write("train", 4, loss=0.5)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["loss"] == 0.5
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_progress_lines_without_a_terminal(capsys):
    sn.Trainer(small_model(), with_config(epochs=2, progress=True)).fit(TRAIN, VALIDATION)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == 2 and lines[1].startswith("epoch 2/2: ") and "validation loss" in lines[1]
    assert err == ""


# --- refused ---


def test_training_without_examples():
    learner = sn.Trainer(small_model(), SMALL)
    with pytest.raises(ValueError, match="Trainer: fit needs at least one example, got none"):
        learner.fit([])
    with pytest.raises(ValueError, match="evaluate: stream must have at least one example, got none"):
        learner.evaluate([])
    with pytest.raises(
        TypeError, match=r"Trainer: examples must be .x, y., Examples or an iterable of batches, got int"
    ):
        learner.fit(3)


def test_resuming_needs_a_checkpoint_of_a_trainer(tmp_path):
    learner = sn.Trainer(small_model(), SMALL)
    with pytest.raises(ValueError, match="Trainer: resume needs a folder, got none"):
        learner.fit(TRAIN, resume=True)
    learner = sn.Trainer(small_model(), SMALL, tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        learner.fit(TRAIN, resume=True)
    checkpoint.save(
        tmp_path / "checkpoint.safetensors", learner.model, learner.optimizer, learner.sparsifier, learner.scheduler
    )
    learner = sn.Trainer(small_model(), SMALL, tmp_path)
    with pytest.raises(ValueError, match="must be of a Trainer, got None"):
        learner.fit(TRAIN, resume=True)


def test_a_loss_that_is_not_finite_stops():
    learner = sn.Trainer(small_model(), with_config(policy="static"))
    with torch.no_grad():
        learner.model[0].bias[0] = math.nan
    with pytest.raises(RuntimeError, match="Trainer: the loss must be finite, got nan at step 3; try a lower lr"):
        learner.fit(TRAIN)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"patience": -1}, ValueError, "patience must be at least 0, got -1"),
        ({"lr": 0.0}, ValueError, "lr must be above 0, got 0.0"),
        ({"lr": math.inf}, ValueError, "lr must be finite, got inf"),
        ({"density": 1.5}, ValueError, "density must lie in .0, 1., got 1.5"),
        ({"momentum": 1.0}, ValueError, "momentum must lie in .0, 1., got 1.0"),
        ({"hidden": (64, 0)}, ValueError, "hidden must be integers of at least 1, got .64, 0."),
        ({"hidden": 64}, ValueError, "hidden must be integers of at least 1, got 64"),
        ({"epochs": 1.5}, TypeError, "epochs must be of type int, got 1.5"),
        ({"flip": 1}, TypeError, "flip must be of type bool, got 1"),
        ({"policy": "magic"}, ValueError, "policy must be one of static, random, set, rigl, .*got 'magic'"),
        ({"block_size": 24}, ValueError, "block_size must be one of 0, 1, 4, .*got 24"),
        ({"budget": "lots"}, ValueError, "amount must be a number with KiB"),
        ({"name": "../x"}, ValueError, "name must be a plain folder name, got '../x'"),
        ({"device": "tpu"}, ValueError, "device must be cpu or cuda, got 'tpu'"),
        ({"patience": 2, "validation": 0.0}, ValueError, "patience needs validation data"),
    ],
)
def test_configurations_refused(changes, error, message):
    with pytest.raises(error, match=message):
        sn.TrainConfig(**changes)


def test_configurations_travel_as_json():
    config = with_config(hidden=(7, 8), lr=1)
    assert config.lr == 1.0 and isinstance(config.lr, float)
    assert sn.TrainConfig.from_dict(json.loads(config.to_json())) == config
    with pytest.raises(ValueError, match="TrainConfig: fields must be known, got speed"):
        sn.TrainConfig.from_dict({"speed": 3})


# --- augmentation ---


def test_images_are_mirrored_and_moved():
    image = torch.arange(12.0).reshape(1, 12).repeat(64, 1)
    generator = torch.Generator().manual_seed(0)
    flipped = augmentation.augment(image, (3, 4), True, 0, generator).reshape(64, 3, 4)
    straight = torch.arange(12.0).reshape(3, 4)
    as_is = (flipped == straight).flatten(1).all(1)
    assert torch.equal(flipped[~as_is], straight.flip(1).expand(int((~as_is).sum()), 3, 4))
    assert 16 < int(as_is.sum()) < 48
    seen = {tuple(augmentation.augment(image[:1], (3, 4), False, 1, generator)[0].tolist()) for _ in range(200)}
    assert len(seen) == 9, "three moves down times three to the right"
    left = tuple(straight[:, [1, 2, 3, 3]].flatten().tolist())
    assert left in seen and tuple(straight.flatten().tolist()) in seen
    colour = torch.rand(2, 3 * 4 * 5)
    assert augmentation.augment(colour, (3, 4, 5), True, 2, generator).shape == colour.shape


def test_only_images_can_be_moved():
    with pytest.raises(ValueError, match=r"augment: shape must be of images .*, got \(12,\)"):
        augmentation.augment(torch.ones(2, 12), (12,), True, 0, torch.Generator())
