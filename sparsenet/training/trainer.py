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
from sparsenet.data.examples import Evaluation, Examples, batch_of, logits_of, num_batches, source_of
from sparsenet.functional.threads import torch_threads
from sparsenet.layers import sparse_layers
from sparsenet.memory.budget import format_bytes, measure_peak
from sparsenet.memory.planning import MemoryPlan
from sparsenet.sparsifier import Sparsifier, Update
from sparsenet.training.config import TrainConfig, usable_device
from sparsenet.training.parts import generator_of, make_optimizer, make_scheduler, make_sparsifier
from sparsenet.training.progress import FitResult, MetricsFile, ProgressBar, StopSignal, Tally

__all__ = ["CHECKPOINT", "FitResult", "Trainer"]

CHECKPOINT = "checkpoint.safetensors"
_BEST = "best.safetensors"


@dataclass
class _Fit:
    """One call of fit: where it shows and writes, when it must stop, and what it has seen since the last line."""

    labels: list[Tensor]  # of examples in memory, until the first logits say how many classes there are
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
        self.device = usable_device(config.device)
        self.peak = measure_peak(self.device).start()
        self.plan = model_or_plan if isinstance(model_or_plan, MemoryPlan) else None
        if self.plan is None:
            self.model = model_or_plan.to(self.device)
        else:
            self.model = self.plan.build(self.device, torch.Generator().manual_seed(config.seed))
        self.optimizer = make_optimizer(self.model, config)
        self.scheduler: Any = None
        self.sparsifier: Sparsifier | None = None
        self.normalization: data.Normalization | None = None
        self.step = 0
        self._tally = Tally()

    # --- evaluating ---

    def evaluate(self, examples: Any) -> Evaluation:
        """Loss and accuracy over what :meth:`fit` takes, or an iterator of batches; a batch at a time.

        Raises ValueError when there is no example, and as :meth:`fit`.
        """
        with torch_threads(self.config.threads):
            return data.evaluate(self.model, self._batches(source_of(examples)))

    def _batches(
        self, source: Examples | Iterable, epoch: int | None = None, skip: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches, x on the device in the model's dtype; with ``epoch`` shuffled and augmented, from ``skip`` on.

        Order and augmentation depend on seed and epoch only, so a resumed run sees the batches it would have seen.
        """
        config, dtype, shape = self.config, next(self.model.parameters()).dtype, None
        if isinstance(source, Examples):
            rows = source.rows
            if epoch is not None:
                rows = rows[torch.randperm(len(rows), generator=generator_of(config.seed, epoch))]
            rows, shape = rows[skip * config.batch_size :], source.x.shape[1:]
            self._check_widths(source)
            stream = data.batches(source.x, source.y, config.batch_size, indices=rows, normalization=self.normalization)
        else:
            stream = map(batch_of, islice(source, skip, None))
        for number, (x, y) in enumerate(stream, start=skip):
            if epoch is not None and (config.flip or config.shift):
                chance = generator_of(config.seed, epoch, number)
                x = augment(x, x.shape[1:] if shape is None else shape, config.flip, config.shift, chance)
            yield x.to(self.device, dtype), y  # labels are looked at where they are

    def _check_widths(self, *examples: Examples) -> None:
        """All as wide as each other and as what is known of the first fit's."""
        known = self.normalization.mean.numel() if self.normalization is not None else 1
        widths = [known] * (known > 1) + [some.x[:1].numel() for some in examples]
        for width in widths:
            if width != widths[0]:
                raise ValueError(f"Trainer: x must have {widths[0]} features as in the first fit or train, got {width}")

    # --- training ---

    def fit(self, train: Any, val: Any = None, *, resume: bool = False) -> FitResult:
        """Trains for ``config.epochs`` epochs: a classifier, by cross-entropy.

        Args:
            train: ``(x, y)``, tensors, NumPy arrays or lists, or :class:`Examples`; they are standardised by the mean
                and deviation of the first data trained on. Or an iterable of batches with a length, as a DataLoader:
                (x, y) or dictionaries of x (or input, inputs) and y (or label, labels, target). Labels are class
                numbers of any integer type.
            val: the same, to measure progress on after every epoch; early stopping needs it.
            resume: finish the fit that the folder's checkpoint is of: the same losses bit for bit as uninterrupted, on
                as many threads (batches of an iterable are skipped, their order is its own affair).

        A second call trains for ``config.epochs`` epochs more, whether the first one ended, stopped early or was
        interrupted, on the same data or on others. Weights, moments, steps, counts and ``metrics.jsonl`` go on. The
        learning rate, the rewiring and the patience begin anew; a falling density goes on to where it was to end.

        Early stopping puts the weights of the best epoch back where there is a folder, and the moments begin anew.

        Raises:
            ValueError, TypeError: no examples, examples or labels that do not fit, or no checkpoint that does; nothing
            was trained then. RuntimeError: the loss or the weights are no longer finite; the checkpoint is older.

        Ctrl-C and SIGTERM end the training after the step in work and leave a checkpoint; a second Ctrl-C is obeyed
        at once.

        Example:
            >>> import numpy, sparsenet as sn
            >>> x, y = numpy.random.rand(64, 20), numpy.arange(64, dtype=numpy.int32) % 2
            >>> config = sn.TrainConfig(epochs=2, batch_size=16, progress=False)
            >>> trainer = sn.Trainer(sn.SparseMLP([20, 32, 2], density=0.5, block_size=4), config)
            >>> trainer.fit((x, y)).steps, trainer.fit((x, y)).steps
            (8, 16)
        """
        config, source, held = self.config, source_of(train), None if val is None else source_of(val)
        sources = [some for some in (source, held) if some is not None]
        per_epoch = num_batches(source, config.batch_size)
        if not per_epoch:
            raise ValueError("Trainer: fit needs at least one example, got none")
        if held is not None and not num_batches(held, config.batch_size):
            raise ValueError("Trainer: val must hold at least one example, got none")
        if held is None and config.patience:
            raise ValueError(f"Trainer: patience must be 0 where val is not given, got {config.patience}")
        tally = self._begin(sources, per_epoch, resume)
        before = self.step
        with (
            torch_threads(config.threads),
            StopSignal() as stop,
            ProgressBar(tally.end, before, config.progress) as bar,
            MetricsFile(self.folder, before) as metrics,
        ):
            fit = _Fit([some.y[some.rows] for some in sources if isinstance(some, Examples)], stop, bar, metrics)
            fit.stopped_early = 0 < config.patience <= tally.epochs_without_better
            self._run_epochs(fit, source, held)
        state = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        if self.folder is not None and fit.stopped_early:
            self._restore_best()
        return FitResult(
            steps=self.step,
            seconds=tally.seconds,
            seconds_per_step=fit.seconds / max(self.step - before, 1),
            rewires=tally.rewires,
            blocks_moved=tally.blocks_moved,
            interrupted=stop.asked and self.step < tally.end and not fit.stopped_early,
            stopped_early=fit.stopped_early,
            validation=fit.validation,
            optimizer_bytes=sum(t.numel() * t.element_size() for t in state),
            peak_bytes=self.peak.bytes,
            peak_phases=dict(self.peak.phases),
            peak_method=self.peak.method,
        )

    def _begin(self, sources: list, per_epoch: int, resume: bool) -> Tally:
        """The schedules of this fit, and with ``resume`` its state; counts stay what they were if that fails."""
        earlier = self._tally, self.normalization
        try:
            if resume:
                self._tally, self.normalization = self._saved(per_epoch)
            else:
                self._tally = self._tally.next_fit(self.step, per_epoch, self.config.epochs, self.density)
                self.normalization = self.normalization if self.step else None  # nothing was trained with it
            examples = [source for source in sources if isinstance(source, Examples)]
            if self.normalization is None and isinstance(sources[0], Examples):
                self.normalization = data.Normalization.from_data(sources[0].x)
            self._check_widths(*examples)
            steps = self._tally.end - self._tally.began
            self.scheduler = make_scheduler(self.optimizer, self.config, steps, self.scheduler is not None)
            self.sparsifier = None  # an earlier fit's goes first: there is never more than one
            if sparse_layers(self.model):
                self.sparsifier = make_sparsifier(self.model, self.optimizer, self.config, self._tally)
            if resume:
                self._load()
        except BaseException:
            self._tally, self.normalization = earlier
            raise
        return self._tally

    def _run_epochs(self, fit: _Fit, source: Examples | Iterable, val: Examples | Iterable | None) -> None:
        tally = self._tally
        self.model.train()
        while self.step < tally.end and not (fit.stopped_early or fit.stop.asked):
            epoch, taken = divmod(self.step - tally.began, tally.per_epoch)
            for x, y in self._batches(source, tally.epochs_before + epoch, taken):
                if taken == tally.per_epoch:
                    taken += 1
                    break
                self._step(x, y, fit)
                taken += 1
                if fit.stop.asked:
                    break
            if taken == tally.per_epoch:
                self._end_epoch(fit, val)
            elif not fit.stop.asked:
                got = taken if taken < tally.per_epoch else "more"
                raise ValueError(f"Trainer: an epoch must be of {tally.per_epoch} batches, its length, got {got}")
        if self.folder is not None:
            self._check_finite(fit)
            self.save()

    def _step(self, x: Tensor, y: Tensor, fit: _Fit) -> None:
        """One optimizer step, perhaps a rewire, and what there is to say about it."""
        config, peak, begin = self.config, self.peak, time.perf_counter()
        rewires = self.sparsifier is not None and (self.step - self._tally.began + 1) % config.rewire_every == 0
        watched = rewires or self.step % config.log_every == 0
        if watched:
            peak.mark()
        logits = logits_of(self.model, x, y, *fit.labels)
        fit.labels, y = [], y.to(logits.device)
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
        reads_gradient = self.sparsifier is not None and self.sparsifier.policy.reads_gradient
        if not reads_gradient:
            self.optimizer.zero_grad()  # before the rewire, which needs the room
        update = None if self.sparsifier is None else self.sparsifier.step()
        if reads_gradient:
            self.optimizer.zero_grad()
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
        tally, description = self._tally, self._tally.epoch_at(self.step)
        if update is not None:
            tally.rewires += 1
            tally.blocks_moved += update.grown
            fields = ("dropped", "grown", "num_blocks", "density", "clamped", "skipped")
            layers = {name: {key: getattr(layer, key) for key in fields} for name, layer in update.layers.items()}
            fit.metrics.write("rewire", self.step, layers=layers)
        if self.step % self.config.log_every and (self.step - tally.began) % tally.per_epoch:
            fit.bar.advance(description)
            return
        now, loss = time.perf_counter(), self._finite("the loss", float(fit.loss) / fit.examples)
        accuracy, rate = int(fit.right) / fit.examples, fit.examples / (now - fit.since)
        density, peak = self.density, self.peak.bytes
        fit.metrics.write(
            "train", self.step, loss=loss, accuracy=accuracy, lr=self.scheduler.get_last_lr()[0], density=density,
            blocks_moved=tally.blocks_moved, peak_bytes=peak, examples_per_second=rate,
        )  # fmt: skip
        numbers = f"loss {loss:.3f}, {accuracy:.1%} right, density {density:.1%}, {tally.blocks_moved} moved"
        fit.bar.advance(description, f"{numbers}, {format_bytes(peak)}, {rate:.0f} ex/s")
        fit.loss, fit.right, fit.examples, fit.since = 0.0, 0, 0, now

    def _finite(self, what: str, value: float) -> float:
        if not math.isfinite(value):
            where = f"got {value} at step {self.step}"
            raise RuntimeError(f"Trainer: {what} must be finite, {where}; try a lower lr or a clip_norm")
        return value

    def _check_finite(self, fit: _Fit) -> None:
        """What was seen since the last line, and the weights, which the last step may have spoilt after its loss."""
        if fit.examples:
            self._finite("the loss", float(fit.loss) / fit.examples)
        for name, parameter in self.model.named_parameters():
            ends = torch.stack(parameter.detach().aminmax()).tolist() if parameter.numel() else []
            for value in ends:
                self._finite(f"the parameter {name}", value)

    def _end_epoch(self, fit: _Fit, val: Examples | Iterable | None) -> None:
        """Evaluates, saves, and decides whether to go on."""
        config, tally, started = self.config, self._tally, time.perf_counter()
        line = f"{tally.epoch_at(self.step)}: {tally.seconds:.0f} s, density {self.density:.1%}"
        if val is not None:
            self.peak.mark()
            fit.validation = self.evaluate(val)
            self.peak.mark("evaluation")
            self._finite("the validation loss", fit.validation.loss)
            fit.metrics.write("epoch", self.step, epoch=tally.epochs_at(self.step), **asdict(fit.validation))
            line += f", validation loss {fit.validation.loss:.3f}, {fit.validation.accuracy:.2%} right"
            better = fit.validation.loss < tally.best_loss
            tally.best_loss = min(tally.best_loss, fit.validation.loss)
            tally.epochs_without_better = 0 if better else tally.epochs_without_better + 1
            if config.patience and better and self.folder is not None:
                checkpoint.save(self.folder / _BEST, self.model, step=self.step)
            fit.stopped_early = 0 < config.patience <= tally.epochs_without_better
        fit.bar.say(line)
        if self.folder is not None and self.step < tally.end:
            self._check_finite(fit)
            self.save()
        fit.since += time.perf_counter() - started

    @property
    def density(self) -> float:
        """Weights in blocks / those in all block places, over all sparse layers; 1 where there are none."""
        patterns = [layer.pattern for layer in sparse_layers(self.model).values()]
        places = sum(p.block_rows * p.block_cols * p.block_size**2 for p in patterns)
        return sum(p.num_blocks * p.block_size**2 for p in patterns) / places if places else 1.0

    # --- saving ---

    def save(self) -> None:
        """Writes ``checkpoint.safetensors``, from which :meth:`fit` can resume."""
        extra = {"tally": asdict(self._tally), "normalization": self.normalization and asdict(self.normalization)}
        parts = self.model, self.optimizer, self.sparsifier, self.scheduler
        checkpoint.save(self.folder / CHECKPOINT, *parts, step=self.step, extra=extra)

    def _saved(self, per_epoch: int) -> tuple[Tally, data.Normalization | None]:
        """What the folder's checkpoint says of the fit that it is of; refuses another one."""
        if self.folder is None:
            raise ValueError("Trainer: resume needs a folder, got none")
        path = self.folder / CHECKPOINT
        extra = checkpoint.describe(path).extra
        try:
            now = {"epochs": self.config.epochs, "per_epoch": per_epoch, "density": self.density}
            tally, normalization = Tally(**now | extra["tally"]), extra["normalization"]
            normalization = None if normalization is None else data.Normalization(**normalization)
        except (TypeError, KeyError) as error:
            raise ValueError(f"Trainer: {path} must be of a Trainer, got {extra!r}") from error
        wanted = {"epochs": self.config.epochs, "batches per epoch": per_epoch}
        for (what, given), saved in zip(wanted.items(), (tally.epochs, tally.per_epoch), strict=True):
            if given != saved:
                raise ValueError(f"Trainer: resume needs {saved} {what}, as in the interrupted fit, got {given}")
        if not (self.folder / _BEST).exists():  # then there is nothing that could be put back
            tally.best_loss, tally.epochs_without_better = math.inf, 0
        return tally, normalization

    def _load(self) -> None:
        found = checkpoint.load(self.folder / CHECKPOINT, self.model, self.optimizer, self.sparsifier, self.scheduler)
        self.step = found.step
        found.restore_random_state()

    def _restore_best(self) -> None:
        self.optimizer.state.clear()  # moments of the last weights, of which some are at other places
        checkpoint.load(self.folder / _BEST, self.model)
        if self.sparsifier is not None:
            self.sparsifier.refresh()
