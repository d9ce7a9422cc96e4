"""The Trainer: one loop that trains a sparse network, rewires it, measures it, and can be interrupted and resumed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsenet import checkpoint, data
from sparsenet.data.augmentation import augment
from sparsenet.data.examples import Evaluation, Examples
from sparsenet.functional.threads import torch_threads
from sparsenet.layers import sparse_layers
from sparsenet.memory.budget import format_bytes, measure_peak
from sparsenet.memory.planning import MemoryPlan
from sparsenet.policies import POLICIES
from sparsenet.schedules import Cosine, Cubic
from sparsenet.sparsifier import Sparsifier, Update
from sparsenet.training.config import TrainConfig
from sparsenet.training.progress import MetricsFile, ProgressBar, StopSignal

__all__ = ["CHECKPOINT", "FitResult", "Trainer"]

CHECKPOINT = "checkpoint.safetensors"
_BEST = "best.safetensors"


@dataclass(frozen=True)
class FitResult:
    """How a training went.

    ``steps``: taken in all, with those before a resume; ``seconds``: spent on them, rewires included, evaluation and
    saving not; ``seconds_per_step``: their mean over the steps of this process. ``interrupted``: by Ctrl-C or SIGTERM.
    ``peak_bytes``, ``peak_phases``, ``peak_method``: as in :class:`sparsenet.memory.budget.PeakMemory`.
    """

    steps: int
    seconds: float
    seconds_per_step: float
    rewires: int
    blocks_moved: int
    interrupted: bool
    stopped_early: bool
    validation: Evaluation | None
    peak_bytes: int
    peak_phases: dict[str, int] = field(default_factory=dict)
    peak_method: str = ""


@dataclass
class _Tally:
    """What a run has counted; part of a checkpoint."""

    seconds: float = 0.0
    rewires: int = 0
    blocks_moved: int = 0
    best_loss: float = math.inf
    epochs_without_better: int = 0


@dataclass
class _Fit:
    """One call of fit: where it shows and writes, when it must stop, and what it has seen since the last line."""

    per_epoch: int
    stop: StopSignal
    bar: ProgressBar
    metrics: MetricsFile
    seconds: float = 0.0
    validation: Evaluation | None = None
    stopped_early: bool = False
    loss: Tensor | float = 0.0
    right: Tensor | int = 0
    examples: int = 0
    since: float = field(default_factory=time.perf_counter)


class Trainer:
    """Trains a model with torch's optimizers and learning-rate schedules, and a :class:`Sparsifier`.

    Args:
        model_or_plan: a module that maps [batch, features] to logits, or a :class:`MemoryPlan`, whose network is built.
        config: how to train; ``data``, ``hidden``, ``budget`` and the like concern the job, not the Trainer.
        folder: for ``metrics.jsonl`` and ``checkpoint.safetensors``; None: neither is written.

    The memory that training needs is measured (``peak``) from the construction of the Trainer on.

    A Trainer sets nothing for the whole process. ``config.threads`` holds within :meth:`fit` and :meth:`evaluate`, and
    ``config.seed`` draws a planned network, the order of the examples and growth. Random numbers inside a model, as for
    dropout, are torch's: call ``torch.manual_seed`` yourself. To need no more memory than a plan predicts, call
    :func:`sparsenet.memory.release_freed_memory` at the start of the process, as ``sparsenet train`` does.

    Example:
        >>> import torch, sparsenet as sn
        >>> x, y = torch.rand(512, 64), torch.arange(512) % 2
        >>> x += y[:, None]
        >>> config = sn.TrainConfig(epochs=5, batch_size=64, lr=0.01, rewire_every=5, progress=False)
        >>> trainer = sn.Trainer(sn.SparseMLP([64, 128, 2], density=0.3, block_size=16), config)
        >>> result = trainer.fit((x, y))
        >>> result.steps, result.rewires, trainer.evaluate((x, y)).accuracy > 0.9
        (40, 6, True)
    """

    def __init__(
        self,
        model_or_plan: nn.Module | MemoryPlan,
        config: TrainConfig | None = None,
        folder: str | Path | None = None,
    ):
        self.config = config = config or TrainConfig()
        self.folder = None if folder is None else Path(folder)
        self.device = torch.device(config.device)
        self.peak = measure_peak(self.device).start()
        self.plan = model_or_plan if isinstance(model_or_plan, MemoryPlan) else None
        if self.plan is None:
            self.model = model_or_plan.to(self.device)
        else:
            self.model = self.plan.build(self.device, torch.Generator().manual_seed(config.seed))
        self.optimizer = _make_optimizer(self.model, config)
        self.scheduler: Any = None
        self.sparsifier: Sparsifier | None = None
        self.normalization: data.Normalization | None = None
        self.step = 0
        self._tally = _Tally()

    # --- evaluating ---

    def evaluate(self, examples: Any) -> Evaluation:
        """Loss and accuracy over ``(x, y)``, :class:`Examples` or an iterable of batches; a batch at a time.

        Raises ValueError when there is no example.
        """
        with torch_threads(self.config.threads):
            return data.evaluate(self.model, self._batches(_as_source(examples)))

    def _batches(
        self, source: Examples | Iterable, epoch: int | None = None, skip: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches on the device in the model's dtype; with ``epoch`` shuffled and augmented, from batch ``skip`` on.

        Order and augmentation depend on seed and epoch only, so a resumed run sees the batches it would have seen.
        """
        config, dtype, shape = self.config, next(self.model.parameters()).dtype, None
        if isinstance(source, Examples):
            rows = source.rows
            if epoch is not None:
                rows = rows[torch.randperm(len(rows), generator=_generator(config.seed, epoch))]
            rows, shape = rows[skip * config.batch_size :], source.x.shape[1:]
            stream = data.batches(source.x, source.y, config.batch_size, indices=rows, normalization=self.normalization)
        else:
            stream = islice(source, skip, None)
        for number, (x, y) in enumerate(stream, start=skip):
            if epoch is not None and (config.flip or config.shift):
                chance = _generator(config.seed, epoch, number)
                x = augment(x, x.shape[1:] if shape is None else shape, config.flip, config.shift, chance)
            yield x.to(self.device, dtype), y.to(self.device)

    # --- training ---

    def fit(self, train: Any, val: Any = None, *, resume: bool = False) -> FitResult:
        """Trains on ``(x, y)``, :class:`Examples` or an iterable of batches with a length (a DataLoader).

        Args:
            train: examples; those in memory are standardised by the mean and deviation of the training data.
            val: what to measure progress on after every epoch; early stopping needs it.
            resume: continue from the folder's checkpoint: the same losses bit for bit as without the interruption, with
                the same number of threads (batches of an iterable are skipped, their order is its own affair).

        Raises:
            ValueError: no examples, or no checkpoint that fits; RuntimeError: the loss is no longer finite.

        Ctrl-C and SIGTERM end the training after the step in work and leave a checkpoint; a second Ctrl-C is obeyed
        at once.
        """
        config, source = self.config, _as_source(train)
        per_epoch = math.ceil(len(source) / config.batch_size) if isinstance(source, Examples) else len(source)
        if not per_epoch:
            raise ValueError("Trainer: fit needs at least one example, got none")
        if isinstance(source, Examples):
            self.normalization = data.Normalization.from_data(source.x)
        self._prepare(per_epoch * config.epochs)
        if resume:
            self._load()
        before, total = self.step, per_epoch * config.epochs
        with (
            torch_threads(config.threads),
            StopSignal() as stop,
            ProgressBar(total, before, config.progress) as bar,
            MetricsFile(self.folder, before) as metrics,
        ):
            fit = _Fit(per_epoch, stop, bar, metrics)
            self._run_epochs(fit, source, None if val is None else _as_source(val))
        if self.folder is not None and fit.stopped_early:
            checkpoint.load(self.folder / _BEST, self.model)
        return FitResult(
            steps=self.step,
            seconds=self._tally.seconds,
            seconds_per_step=fit.seconds / max(self.step - before, 1),
            rewires=self._tally.rewires,
            blocks_moved=self._tally.blocks_moved,
            interrupted=stop.asked and self.step < total and not fit.stopped_early,
            stopped_early=fit.stopped_early,
            validation=fit.validation,
            peak_bytes=self.peak.bytes,
            peak_phases=dict(self.peak.phases),
            peak_method=self.peak.method,
        )

    def _prepare(self, total_steps: int) -> None:
        """Makes what depends on the length of the training: the schedules of the learning rate and of the pattern."""
        config, rewiring = self.config, max(1, round(self.config.rewire_until * total_steps))
        schedules = torch.optim.lr_scheduler
        if config.lr_schedule == "one_cycle":
            self.scheduler = schedules.OneCycleLR(
                self.optimizer, config.lr, total_steps, pct_start=config.warmup, cycle_momentum=False
            )
        elif config.lr_schedule == "cosine":
            self.scheduler = schedules.CosineAnnealingLR(self.optimizer, total_steps)
        else:
            self.scheduler = schedules.ConstantLR(self.optimizer, 1.0, 0)
        layers = sparse_layers(self.model).values()
        if not layers:
            return
        density, policy = None, POLICIES[config.policy]
        if policy.follows_density:
            places = sum(layer.pattern.block_rows * layer.pattern.block_cols for layer in layers)
            first = sum(layer.pattern.num_blocks for layer in layers) / max(places, 1)
            density = Cubic(first, config.final_density or first / 2, steps=rewiring)
        exchanging = {"drop_fraction": Cosine(config.drop_fraction, 0.0, rewiring)} if policy.exchanges else {}
        self.sparsifier = Sparsifier(
            self.model,
            self.optimizer,
            policy(**exchanging),
            density,
            config.distribution,
            config.rewire_every,
            end=rewiring if policy.exchanges or policy.follows_density else 0,
            seed=config.seed,
        )

    def _run_epochs(self, fit: _Fit, source: Examples | Iterable, val: Examples | Iterable | None) -> None:
        self.model.train()
        for epoch in range(self.step // fit.per_epoch, self.config.epochs):
            for x, y in self._batches(source, epoch, self.step % fit.per_epoch):
                self._step(x, y, fit)
                if fit.stop.asked and self.step % fit.per_epoch:
                    break
            if self.step % fit.per_epoch == 0:
                self._end_epoch(epoch, fit, val)
            if fit.stop.asked or fit.stopped_early:
                break
        if self.folder is not None:
            self.save()

    def _step(self, x: Tensor, y: Tensor, fit: _Fit) -> None:
        """One optimizer step, perhaps a rewire, and what there is to say about it."""
        config, peak, begin = self.config, self.peak, time.perf_counter()
        rewires = self.sparsifier is not None and (self.step + 1) % config.rewire_every == 0
        watched = rewires or self.step % config.log_every == 0
        if watched:
            peak.mark()
        logits = self.model(x).float()
        loss = nn.functional.cross_entropy(logits, y, label_smoothing=config.label_smoothing)
        if watched:
            peak.mark("forward")
        loss.backward()
        if watched:
            peak.mark("scoring growth" if rewires and self.sparsifier.policy.needs_gradient else "backward")
        if config.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.optimizer.step()
        if watched:
            peak.mark("optimizer step")
        self.scheduler.step()
        self.optimizer.zero_grad()  # before the rewire, which needs the room
        update = None if self.sparsifier is None else self.sparsifier.step()
        if update is not None:
            peak.mark("rewire")
        self.step += 1
        seconds = time.perf_counter() - begin
        fit.seconds += seconds
        self._tally.seconds += seconds
        fit.loss, fit.examples = fit.loss + loss.detach() * len(y), fit.examples + len(y)
        fit.right = fit.right + (logits.detach().argmax(1) == y).sum()
        self._report(fit, update)

    def _report(self, fit: _Fit, update: Update | None) -> None:
        """Metrics lines of the rewire and of the log interval, and the bar."""
        tally, description = self._tally, f"epoch {(self.step - 1) // fit.per_epoch + 1}/{self.config.epochs}"
        if update is not None:
            tally.rewires += 1
            tally.blocks_moved += update.grown
            fields = ("dropped", "grown", "num_blocks", "density", "clamped", "skipped")
            layers = {name: {key: getattr(layer, key) for key in fields} for name, layer in update.layers.items()}
            fit.metrics.write("rewire", self.step, layers=layers)
        if self.step % self.config.log_every and self.step % fit.per_epoch:
            fit.bar.advance(description)
            return
        now = time.perf_counter()
        loss, accuracy, rate = (
            float(fit.loss) / fit.examples,
            int(fit.right) / fit.examples,
            fit.examples / (now - fit.since),
        )
        if not math.isfinite(loss):
            raise RuntimeError(
                f"Trainer: the loss must be finite, got {loss} at step {self.step}; try a lower lr or a clip_norm"
            )
        density, peak = self.density, self.peak.bytes
        fit.metrics.write(
            "train", self.step, loss=loss, accuracy=accuracy, lr=self.scheduler.get_last_lr()[0], density=density,
            blocks_moved=tally.blocks_moved, peak_bytes=peak, examples_per_second=rate,
        )  # fmt: skip
        numbers = f"loss {loss:.3f}, {accuracy:.1%} right, density {density:.1%}, {tally.blocks_moved} moved"
        fit.bar.advance(description, f"{numbers}, {format_bytes(peak)}, {rate:.0f} ex/s")
        fit.loss, fit.right, fit.examples, fit.since = 0.0, 0, 0, now

    def _end_epoch(self, epoch: int, fit: _Fit, val: Examples | Iterable | None) -> None:
        """Evaluates, saves, and decides whether to go on."""
        config, tally, started = self.config, self._tally, time.perf_counter()
        line = f"epoch {epoch + 1}/{config.epochs}: {tally.seconds:.0f} s, density {self.density:.1%}"
        if val is not None:
            self.peak.mark()
            fit.validation = self.evaluate(val)
            self.peak.mark("evaluation")
            fit.metrics.write("epoch", self.step, epoch=epoch + 1, **asdict(fit.validation))
            line += f", validation loss {fit.validation.loss:.3f}, {fit.validation.accuracy:.2%} right"
            better = fit.validation.loss < tally.best_loss
            tally.best_loss = min(tally.best_loss, fit.validation.loss)
            tally.epochs_without_better = 0 if better else tally.epochs_without_better + 1
            if config.patience and better and self.folder is not None:
                checkpoint.save(self.folder / _BEST, self.model, step=self.step)
            fit.stopped_early = 0 < config.patience <= tally.epochs_without_better
        fit.bar.say(line)
        if self.folder is not None and epoch + 1 < config.epochs:
            self.save()
        fit.since += time.perf_counter() - started

    @property
    def density(self) -> float:
        """Active blocks / all block places, over all sparse layers; 1 where there are none."""
        patterns = [layer.pattern for layer in sparse_layers(self.model).values()]
        places = sum(p.block_rows * p.block_cols for p in patterns)
        return sum(p.num_blocks for p in patterns) / places if places else 1.0

    # --- saving ---

    def save(self) -> None:
        """Writes ``checkpoint.safetensors``, from which :meth:`fit` can resume."""
        extra = {
            "tally": asdict(self._tally),
            "normalization": None if self.normalization is None else asdict(self.normalization),
        }
        checkpoint.save(
            self.folder / CHECKPOINT, self.model, self.optimizer, self.sparsifier, self.scheduler, self.step, extra
        )

    def _load(self) -> None:
        if self.folder is None:
            raise ValueError("Trainer: resume needs a folder, got none")
        found = checkpoint.load(self.folder / CHECKPOINT, self.model, self.optimizer, self.sparsifier, self.scheduler)
        try:
            self._tally = _Tally(**found.extra["tally"])
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"Trainer: {self.folder / CHECKPOINT} must be of a Trainer, got {found.extra!r}"
            ) from error
        self.step = found.step
        found.restore_random_state()


def _make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Fused: one pass over weights, gradients and state, and no temporary tensors, on the CPU as well."""
    decay = config.weight_decay
    if config.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), config.lr, weight_decay=decay, fused=True)
    return torch.optim.SGD(model.parameters(), config.lr, config.momentum, weight_decay=decay, fused=True)


def _as_source(examples: Any) -> Examples | Iterable:
    """Examples, or an iterable of batches; a pair of tensors is examples."""
    if isinstance(examples, tuple) and len(examples) == 2 and all(isinstance(t, Tensor) for t in examples):
        return Examples(*examples)
    if isinstance(examples, (Iterable, Examples)):
        return examples
    raise TypeError(
        f"Trainer: examples must be (x, y), Examples or an iterable of batches, got {type(examples).__name__}"
    )


def _generator(*numbers: int) -> torch.Generator:
    """A generator seeded by a few small numbers: seed, epoch, batch."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return torch.Generator().manual_seed(seed)
