"""Networks in a continuous space: an autoencoder of small MLPs, trained by what the networks compute.

An encoder reads a network of any depth into a vector; one decoder per depth turns the vector into networks of 1, 2, ...
hidden layers. Training compares functions, never weights: the loss is the smallest error over the decoders on sampled
inputs (Huang, Montazerin, Srivastava, arXiv 2410.08339), here as an annealed soft minimum with a floor for every
decoder, because the hard minimum lets decoders die. ``embedding_search`` then descends in this space for a given data
set.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsenet.architecture.embedding.codec import MIXED, NetworkBatch, NetworkSpace
from sparsenet.architecture.embedding.decoders import DECODERS
from sparsenet.architecture.embedding.encoders import ENCODERS
from sparsenet.architecture.embedding.teachers import grid_points, normalised, random_networks
from sparsenet.files import replace_file

__all__ = ["AutoencoderConfig", "NetworkAutoencoder", "load_autoencoder", "save_autoencoder", "train_autoencoder"]

FORMAT_VERSION = 1
VARIANCE_FLOOR = (
    0.01  # added to the variance of a (normalised) teacher, so that near-constant ones do not rule the mean
)


@dataclass(frozen=True)
class AutoencoderConfig:
    """Everything that decides an autoencoder and its training; the same config and seed give the same weights.

    Attributes:
        space: the networks.
        encoder: ``probe``, ``conv``, ``graph`` or ``transformer``.
        decoder: ``mlp``, ``conv`` or ``transformer``.
        latent, hidden: sizes.
        weight_scale: decoded weights are multiplied by it (None: 5 for sigmoid and mixed, else 1).
        steps, batch, points, learning_rate: Adam, warm-up and cosine; ``batch`` networks, ``points`` inputs a step.
        floor: weight of the plain mean over decoders, which keeps every decoder alive.
        isometry: weight of a term that makes distances of codes follow distances of functions.
        seed: of weights, teachers and points.

    Raises ValueError for an unknown encoder or decoder or a number out of range.

    Example:
        >>> from sparsenet.architecture.embedding import AutoencoderConfig, NetworkSpace
        >>> AutoencoderConfig(NetworkSpace(inputs=2, activation="sigmoid"), steps=2000).space.activation
        'sigmoid'
        >>> AutoencoderConfig(encoder="perceptron")
        Traceback (most recent call last):
        ValueError: AutoencoderConfig: encoder must be one of probe, conv, graph, transformer, got 'perceptron'
    """

    space: NetworkSpace = field(default_factory=NetworkSpace)
    encoder: str = "probe"
    decoder: str = "mlp"
    latent: int = 128
    hidden: int = 512
    weight_scale: float | None = None
    steps: int = 8000
    batch: int = 64
    points: int = 256
    learning_rate: float = 1e-3
    floor: float = 0.2
    isometry: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("encoder", ENCODERS), ("decoder", DECODERS)):
            if getattr(self, name) not in known:
                rule = f"{name} must be one of {', '.join(known)}"
                raise ValueError(f"AutoencoderConfig: {rule}, got {getattr(self, name)!r}")
        for name in ("latent", "hidden", "steps", "points"):
            if getattr(self, name) < 1:
                raise ValueError(f"AutoencoderConfig: {name} must be at least 1, got {getattr(self, name)!r}")
        if self.batch < self.space.max_depth:
            rule = f"batch must be at least max_depth {self.space.max_depth}"
            raise ValueError(f"AutoencoderConfig: {rule}, got {self.batch!r}")
        for name in ("floor", "isometry"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"AutoencoderConfig: {name} must lie in [0, 1], got {getattr(self, name)!r}")

    @property
    def scale(self) -> float:
        """What decoded weights are multiplied by."""
        if self.weight_scale is not None:
            return self.weight_scale
        return 5.0 if self.space.activation in ("sigmoid", MIXED) else 1.0


class NetworkAutoencoder(nn.Module):
    """Encoder and decoders of one :class:`NetworkSpace`.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.embedding.autoencoder import AutoencoderConfig, NetworkAutoencoder
        >>> from sparsenet.architecture.embedding.teachers import random_networks
        >>> model = NetworkAutoencoder(AutoencoderConfig())
        >>> z = model.encode(random_networks(model.space, depth=2, count=5))
        >>> z.shape, model.decode(z, depth=3).outputs(torch.rand(10, 3)).shape
        (torch.Size([5, 128]), torch.Size([5, 10]))
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config, self.space = config, config.space
        self.encoder = ENCODERS[config.encoder](config.space, config.latent, config.hidden)
        self.decoder = DECODERS[config.decoder](config.space, config.latent, config.hidden, config.scale)

    def encode(self, nets: NetworkBatch) -> Tensor:
        """N networks of one depth -> [n, latent]. They should have outputs of root mean square 1."""
        return self.encoder(nets)

    def decode(self, z: Tensor, depth: int) -> NetworkBatch:
        """[n, latent] -> n networks of ``depth`` hidden layers, neuron masks 0 or 1 with straight-through gradients."""
        if not 1 <= depth <= self.space.max_depth:
            raise ValueError(f"NetworkAutoencoder: depth must lie in [1, {self.space.max_depth}], got {depth}")
        return self.decoder(z, depth)

    def errors(self, z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """[n, max_depth]: mean squared error of every decoder against ``y`` [n, s] on ``x`` [s, inputs]."""
        depths = range(1, self.space.max_depth + 1)
        return torch.stack([(self.decode(z, d).outputs(x) - y).square().mean(1) for d in depths], 1)


def soft_minimum(losses: Tensor, temperature: float, floor: float) -> Tensor:
    """Per network a weighted mean over decoders: [n, decoders] -> [n].

    Weights are ``softmax(-loss / (temperature * mean loss))``, constants for the gradient, mixed with
    ``floor`` / decoders: temperature -> 0 with floor 0 is the paper's minimum (relaxed winner-takes-all, Rupprecht et
    al. 2017).
    """
    typical = losses.detach().mean(1, keepdim=True).clamp(min=1e-12)
    share = (-losses.detach() / (temperature * typical)).softmax(1)
    return (losses * ((1 - floor) * share + floor / losses.shape[1])).sum(1)


def distance_mismatch(z: Tensor, y: Tensor) -> Tensor:
    """Mean over all pairs of ``log(|z_i - z_j| / sqrt(latent) / rms(y_i - y_j))^2``, each distance plus 0.01.

    Codes z [n, latent], outputs y [n, s]. In logarithms, because the order of small distances counts as well: networks
    of sigmoids are nearly constant, so that most distances are near 0 or 2.
    """
    first, second = torch.triu_indices(len(z), len(z), 1)
    codes = ((z[first] - z[second]).square().mean(1) + 1e-8).sqrt()
    functions = (y[first] - y[second]).square().mean(1).sqrt()
    return ((codes + 0.01).log() - (functions + 0.01).log()).square().mean()


def sample_teachers(
    space: NetworkSpace, batch: int, x: Tensor, generator: torch.Generator
) -> tuple[list[NetworkBatch], Tensor]:
    """About ``batch`` normalised networks, equally many of each depth, and their outputs [n, s]."""
    groups, outputs = [], []
    modern = space.bias or space.activation == MIXED
    for depth in range(1, space.max_depth + 1):
        count = max(1, batch // space.max_depth)
        nets = random_networks(space, depth, count, generator, weight_bound=5.0 if modern else 10.0)
        nets, y = normalised(nets, x)
        groups.append(nets)
        outputs.append(y)
    return groups, torch.cat(outputs)


def train_autoencoder(
    config: AutoencoderConfig, report: Callable[[int, float, float], None] | None = None, every: int = 250
) -> NetworkAutoencoder:
    """Trains on teachers drawn on the fly; ``report(step, loss, seconds)`` is called every ``every`` steps.

    The loss of a network is MSE / (Var(y) + 0.01), the soft minimum over decoders, temperature 1 to 0.05.

    Example:
        >>> from sparsenet.architecture.embedding import AutoencoderConfig, train_autoencoder
        >>> losses = []
        >>> config = AutoencoderConfig(steps=4, batch=8, points=16, hidden=16, latent=8)
        >>> model = train_autoencoder(config, report=lambda step, loss, seconds: losses.append(loss), every=2)
        >>> len(losses) >= 2, all(loss > 0 for loss in losses)
        (True, True)
    """
    torch.manual_seed(config.seed)
    model = NetworkAutoencoder(config)
    optimizer = torch.optim.Adam(model.parameters(), config.learning_rate)
    warm = max(1, config.steps // 20)

    def rate(step: int) -> float:
        done = (step - warm) / max(1, config.steps - warm)
        return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(config.seed + 1)
    started, average = time.perf_counter(), math.nan
    for step in range(config.steps):
        x = torch.rand(config.points, config.space.inputs, generator=generator) * 2 - 1
        with torch.no_grad():
            teachers, y = sample_teachers(config.space, config.batch, x, generator)
        z = torch.cat([model.encode(nets) for nets in teachers])
        relative = model.errors(z, x, y) / (y.var(1, keepdim=True) + VARIANCE_FLOOR)
        temperature = 0.05 ** (step / config.steps)
        loss = soft_minimum(relative, temperature, config.floor).mean()
        if config.isometry:
            loss = loss + config.isometry * distance_mismatch(z, y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        best = float(relative.detach().min(1).values.mean())
        average = best if math.isnan(average) else 0.98 * average + 0.02 * best
        if report is not None and (step + 1) % every == 0:
            report(step + 1, average, time.perf_counter() - started)
    return model.eval()


@torch.no_grad()
def evaluate_autoencoder(model: NetworkAutoencoder, networks: int = 512, seed: int = 12345) -> dict[str, object]:
    """How well decoded networks match fresh teachers on a regular grid.

    Returns: ``min_nmse`` (mean over teachers of the smallest MSE / (var + .01)), ``decoder_nmse`` (each decoder alone),
    ``median_fvu`` (median of the smallest MSE / var), ``mpe_mean`` and ``mpe_median`` (median over samples of
    |y - y'| / |y|, of the best decoder), ``shares`` (how often each decoder is the best).
    """
    generator = torch.Generator().manual_seed(seed)
    x = grid_points(model.space.inputs, 10 if model.space.inputs <= 3 else 4)
    groups, y = sample_teachers(model.space, networks, x, generator)
    z = torch.cat([model.encode(nets) for nets in groups])
    depths = range(1, model.space.max_depth + 1)
    outputs = torch.stack([model.decode(z, d).outputs(x) for d in depths], 1)  # [n, decoders, s]
    mse = (outputs - y[:, None]).square().mean(2)
    variance = y.var(1)
    relative = mse / (variance + VARIANCE_FLOOR)[:, None]
    percentage = ((outputs - y[:, None]).abs() / y[:, None].abs().clamp(min=1e-8)).median(2).values.min(1).values
    winner = relative.argmin(1)
    return {
        "min_nmse": float(relative.min(1).values.mean()),
        "decoder_nmse": relative.mean(0).tolist(),
        "median_fvu": float((mse.min(1).values / variance.clamp(min=1e-12)).median()),
        "mpe_mean": float(percentage.mean()),
        "mpe_median": float(percentage.median()),
        "shares": [float((winner == d - 1).float().mean()) for d in depths],
        "networks": len(y),
    }


def save_autoencoder(path: str | Path, model: NetworkAutoencoder) -> None:
    """Writes a safetensors file with the config in its header, whole or not at all.

    Example:
        >>> import tempfile
        >>> from sparsenet.architecture.embedding import AutoencoderConfig, NetworkAutoencoder
        >>> from sparsenet.architecture.embedding import load_autoencoder, save_autoencoder
        >>> model = NetworkAutoencoder(AutoencoderConfig(hidden=16, latent=8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_autoencoder(f"{folder}/embedding.safetensors", model)
        ...     load_autoencoder(f"{folder}/embedding.safetensors").config == model.config
        True
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"sparsenet_autoencoder": json.dumps({"version": FORMAT_VERSION, **asdict(model.config)})}
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    replace_file(path, lambda part: save_file(state, str(part), metadata=header))


def load_autoencoder(path: str | Path) -> NetworkAutoencoder:
    """Reads what :func:`save_autoencoder` wrote. ValueError for another file or version, or tensors that do not fit.

    Example:
        >>> import tempfile, torch
        >>> from sparsenet.architecture.embedding import AutoencoderConfig, NetworkAutoencoder
        >>> from sparsenet.architecture.embedding import load_autoencoder, save_autoencoder
        >>> model = NetworkAutoencoder(AutoencoderConfig(hidden=16, latent=8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_autoencoder(f"{folder}/embedding.safetensors", model)
        ...     twin = load_autoencoder(f"{folder}/embedding.safetensors")
        >>> z = torch.randn(2, 8)
        >>> torch.equal(twin.decode(z, depth=1).weights[0], model.decode(z, depth=1).weights[0])
        True
    """
    try:
        with safe_open(str(path), "pt") as file:
            header = json.loads((file.metadata() or {}).get("sparsenet_autoencoder", "null"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"load_autoencoder: {path} must be a whole safetensors file, got: {error}") from error
    if not isinstance(header, dict) or header.get("version") != FORMAT_VERSION:
        found = header.get("version") if isinstance(header, dict) else "none"
        raise ValueError(f"load_autoencoder: {path} must be an autoencoder of version {FORMAT_VERSION}, got {found}")
    header.pop("version")
    try:
        config = AutoencoderConfig(**{**header, "space": NetworkSpace(**header["space"])})
        model = NetworkAutoencoder(config)
        model.load_state_dict(load_file(str(path)))
    except (TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"load_autoencoder: {path} does not fit its own header: {error}") from error
    return model.eval()
