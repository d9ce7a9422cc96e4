"""A small network, data and settings that train in milliseconds, for the tests of the Trainer."""

import dataclasses

import torch

import sparsenet as sn

SMALL = sn.TrainConfig(epochs=3, batch_size=32, lr=0.01, rewire_every=4, log_every=3, progress=False, threads=1)
DIGITS = sn.data.load("digits")
TRAIN = sn.Examples(DIGITS.train_x, DIGITS.train_y, torch.arange(330))  # 11 batches, the last one short
VALIDATION = sn.Examples(DIGITS.train_x, DIGITS.train_y, torch.arange(330, 400))


def small_model(seed=0, density=0.5):
    return sn.SparseMLP([64, 96, 80, 10], density, 16, generator=torch.Generator().manual_seed(seed))


def with_config(**changes):
    return dataclasses.replace(SMALL, **changes)


def stop_at(learner, number):
    """Asks the Trainer to stop after that step, as a signal would."""
    step = learner._step
    learner._step = lambda x, y, fit: (step(x, y, fit), setattr(fit.stop, "asked", learner.step == number))


def batches_of(examples):
    x, y = examples.x[examples.indices].float().flatten(1) / 16, examples.y[examples.indices]
    return list(zip(x.split(32), y.split(32), strict=True))
