"""The main job: data, plan, training, test, comparison with dense, files and pictures of one run."""

from __future__ import annotations

import dataclasses
import json
import re
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from sparsenet import checkpoint, data, functional
from sparsenet.data.examples import Evaluation, Examples
from sparsenet.files import replace_text
from sparsenet.functional.build import build_info
from sparsenet.layers import sparse_layers
from sparsenet.memory.budget import format_bytes, release_freed_memory
from sparsenet.memory.planning import MemoryPlan
from sparsenet.training.comparison import Comparison, compare_in_child
from sparsenet.training.config import TrainConfig, usable_device
from sparsenet.training.plots import draw_run
from sparsenet.training.trainer import CHECKPOINT, FitResult, Trainer

__all__ = ["Interrupted", "report", "run"]


class Interrupted(Exception):
    """The run was stopped and can be resumed; says how."""


def run(config: TrainConfig) -> dict[str, Any]:
    """Trains as ``config`` says, writes the run's folder, and returns what ``summary.json`` holds.

    The folder holds ``config.json``, ``metrics.jsonl``, ``model.safetensors``, ``summary.json`` and the PNGs;
    ``checkpoint.safetensors`` while the run is not finished.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM. ValueError, TypeError, OSError: bad settings, data or files.
    """
    started = time.perf_counter()
    usable_device(config.device)  # before there is a folder
    folder, config, resumes = _open_folder(config)
    say = print if config.progress else (lambda *_: None)
    dataset = data.load(config.data)
    plan = config.plan(dataset.num_features, dataset.num_classes, dataset.train_x.element_size())
    say(f"data: {dataset.name}, {len(dataset.train_x)} + {len(dataset.test_x)} examples, from {dataset.source}")
    say(f"run: {folder}{', resumed' if resumes else ''}\n\n{plan.table()}\n")
    if not resumes:
        replace_text(folder / "config.json", config.to_json())
    train, validation = _split(dataset, config)
    _prepare_process(config)
    trainer = Trainer(plan, config, folder)
    result = trainer.fit(train, validation, resume=resumes)
    if result.interrupted:
        command = f"sparsenet train --resume {folder}"
        raise Interrupted(f"interrupted after step {result.steps}, checkpoint kept; continue with: {command}")
    trainer.peak.mark()
    test = trainer.evaluate(Examples(dataset.test_x, dataset.test_y))
    trainer.peak.mark("evaluation")
    trainer.peak.stop()
    comparison = Comparison(skipped="dense_steps is 0")
    if config.dense_steps:
        comparison = compare_in_child(plan, config.dense_steps, torch.get_num_threads())
    summary = _summary(folder, dataset, trainer, result, test, comparison)
    _save_model(folder, trainer, summary)
    summary["seconds_total"] = time.perf_counter() - started
    replace_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    summary["plots"] = _draw(folder) if config.plots else []
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return summary


def _prepare_process(config: TrainConfig) -> None:
    """What a job sets for the whole process: the allocator, the number of threads, torch's random numbers."""
    release_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)


def _open_folder(config: TrainConfig) -> tuple[Path, TrainConfig, bool]:
    """The run's folder, its configuration, and whether it continues an interrupted run."""
    out = Path(config.out).expanduser()
    if config.resume:
        folder = _latest(out) if config.resume == "latest" else Path(config.resume).expanduser()
        if not (folder / CHECKPOINT).is_file():
            raise FileNotFoundError(f"train: resume must name a folder with {CHECKPOINT}, got {folder}")
        saved = TrainConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        shown = {name: getattr(config, name) for name in ("plots", "progress", "dense_steps", "resume")}
        return folder, dataclasses.replace(saved, **shown), True
    if config.name:
        folder = out / config.name
        if folder.is_dir() and any(folder.iterdir()):
            raise FileExistsError(f"train: name must be of a new run, got {folder}; to continue it: --resume {folder}")
    else:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(config.data).stem).strip(".-") or "run"
        numbered = (out / (stem if number == 1 else f"{stem}-{number}") for number in range(1, 1_000_000))
        folder = next(f for f in numbered if not f.exists())
    folder.mkdir(parents=True, exist_ok=True)
    return folder, config, False


def _latest(out: Path) -> Path:
    found = sorted(out.glob(f"*/{CHECKPOINT}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"train: resume needs an interrupted run in {out}, found none")
    return found[-1].parent


def _split(dataset: data.Dataset, config: TrainConfig) -> tuple[Examples, Examples | None]:
    if not config.validation:
        return Examples(dataset.train_x, dataset.train_y), None
    kept, held = data.split(dataset.train_y, config.validation, seed=config.seed)
    return Examples(dataset.train_x, dataset.train_y, kept), Examples(dataset.train_x, dataset.train_y, held)


def _summary(
    folder: Path,
    dataset: data.Dataset,
    trainer: Trainer,
    result: FitResult,
    test: Evaluation,
    comparison: Comparison,
) -> dict[str, Any]:
    config, plan, layers = trainer.config, trainer.plan, sparse_layers(trainer.model)
    return {
        "folder": str(folder),
        "data": dataset.name,
        "sizes": list(plan.sizes),
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "validation_accuracy": result.validation and result.validation.accuracy,
        "parameters_active": sum(layer.num_active for layer in layers.values())
        + sum(layer.bias.numel() for layer in layers.values() if layer.bias is not None),
        "parameters_dense": sum((inp + 1) * out for layer in plan.layers for out, inp in [layer.shape]),
        "density": trainer.density,
        "layers": [
            {
                "name": name,
                "shape": [layer.out_features, layer.in_features],
                "num_blocks": layer.pattern.num_blocks,
                "density": layer.density,
                "planned_density": planned.density,
            }
            for (name, layer), planned in zip(layers.items(), plan.layers, strict=True)
        ],
        "budget_bytes": plan.budget_bytes,
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        "measured_peak_bytes": trainer.peak.bytes,
        "memory": _memory(trainer, plan, result.optimizer_bytes),
        "seconds_per_step": result.seconds_per_step,
        **dataclasses.asdict(comparison),
        "speedup_over_dense": comparison.speedup,
        "dense_predicted_bytes": plan.dense_bytes,
        "seconds_training": result.seconds,
        "steps": result.steps,
        "epochs": config.epochs,
        "stopped_early": result.stopped_early,
        "rewires": result.rewires,
        "blocks_moved": result.blocks_moved,
        "seed": config.seed,
        "environment": build_info(),
    }


def _memory(trainer: Trainer, plan: MemoryPlan, optimizer_bytes: int) -> dict[str, Any]:
    """Predicted and measured bytes by item and by phase; of the items, those that can be counted."""
    measured = {
        "weights": sum(p.numel() * p.element_size() for p in trainer.model.parameters()),
        "optimizer state": optimizer_bytes,
        "kernel workspace": functional.workspace_bytes(),
    }
    return {
        "moment": plan.moment,
        "method": trainer.peak.method,
        "predicted_items": dict(plan.items),
        "measured_items": measured,
        "predicted_phases": plan.phases,
        "measured_phases": dict(trainer.peak.phases),
    }


def _save_model(folder: Path, trainer: Trainer, summary: dict[str, Any]) -> None:
    """The trained network alone, with what one needs to use it."""
    normalization = trainer.normalization
    extra = {
        "sizes": summary["sizes"],
        "test_accuracy": summary["test_accuracy"],
        "mean": normalization.mean,
        "std": normalization.std,
    }
    checkpoint.save(folder / "model.safetensors", trainer.model, step=trainer.step, extra=extra)


def _draw(folder: Path) -> list[str]:
    try:
        return [str(path) for path in draw_run(folder)]  # imports matplotlib, which takes memory: not earlier
    except ModuleNotFoundError as error:
        warnings.warn(str(error), stacklevel=2)
        return []


# --- the report -----------------------------------------------------------------------------------------------------


def report(summary: dict[str, Any]) -> str:
    """The summary as one screen of text."""
    predicted, measured = summary["predicted_peak_bytes"], summary["measured_peak_bytes"]
    active, dense = summary["parameters_active"], summary["parameters_dense"]
    difference = f"{measured / predicted - 1:+.1%}"
    rows = [
        ("network", f"{'-'.join(map(str, summary['sizes']))} on {summary['data']}"),
        ("test accuracy", f"{summary['test_accuracy']:.2%}{_validation(summary)}"),
        ("active weights", f"{active:,} of {dense:,}, density {summary['density']:.1%}"),
        *(_layer_row(layer) for layer in summary["layers"]),
        ("peak memory", f"predicted {format_bytes(predicted)}, measured {format_bytes(measured)} ({difference})"),
        ("  budget", format_bytes(summary["budget_bytes"])),
        ("  the same dense", _dense_memory(summary)),
        ("time per step", _time_per_step(summary)),
        ("rewires", f"{summary['rewires']}, {summary['blocks_moved']:,} blocks moved"),
        ("total", f"{summary['seconds_total']:.0f} s, {summary['steps']} steps of {summary['epochs']} epochs"),
        ("files", summary["folder"]),
    ]
    return "\n".join(f"{name:<18}{text}" for name, text in rows)


def _layer_row(layer: dict[str, Any]) -> tuple[str, str]:
    out, inputs = layer["shape"]
    return f"  layer {layer['name']}", f"{out} x {inputs}: {layer['num_blocks']:,} blocks, {layer['density']:.1%}"


def _validation(summary: dict[str, Any]) -> str:
    accuracy = summary["validation_accuracy"]
    return "" if accuracy is None else f" (validation {accuracy:.2%})"


def _dense_memory(summary: dict[str, Any]) -> str:
    text = f"predicted {format_bytes(summary['dense_predicted_bytes'])}"
    if summary["dense_peak_bytes"] is not None:
        text += f", measured {format_bytes(summary['dense_peak_bytes'])}"
    return text


def _time_per_step(summary: dict[str, Any]) -> str:
    text = f"{1000 * summary['seconds_per_step']:.1f} ms"
    if summary["speedup_over_dense"] is None:
        return f"{text}; not compared with dense: {summary['skipped']}"
    sparse, dense = summary["sparse_seconds_per_step"], summary["dense_seconds_per_step"]
    return (
        f"{text}; dense {1000 * dense:.1f} ms against {1000 * sparse:.1f} ms side by side: "
        f"{summary['speedup_over_dense']:.1f} times as fast"
    )
