"""Search in the embedding: gradient descent on vectors whose decoded networks should fit a data set and be sparse.

Algorithm 1 of arXiv 2410.08339, for every decoder and for several restarts and sparsity weights *at once*: all
candidates of one depth are one batch. ``W~ = W * sigmoid(100 (|W| - t))`` with a learned threshold t in [0, 3], loss
``MSE + c * weight * sum(0.5 sigmoid(10 (|W| - t)) + 0.1 |W|)``, ``c = MSE / 7000`` at the first step. The best iterate
is kept by its *hard* threshold (the reference logs the soft one), then pruned further weight by weight and fine-tuned.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparsenet.architecture.embedding.autoencoder import NetworkAutoencoder, sample_teachers
from sparsenet.architecture.embedding.codec import NetworkBatch, ScaledOutput

__all__ = [
    "Candidate",
    "EmbeddingSearchConfig",
    "RegressionData",
    "SearchOutcome",
    "prune_and_tune",
    "search_embedding",
]

INITIALISATIONS = ("teachers", "uniform", "normal")


@dataclass(frozen=True)
class EmbeddingSearchConfig:
    """How to search.

    Attributes:
        depths: which decoders; None for all.
        restarts: starting points per depth and sparsity weight.
        sparsity_weights: multiples of the paper's ``c``; more gives fewer weights.
        iterations, learning_rate, threshold_learning_rate: Adam on z and t.
        start: ``teachers`` (codes of the random networks that fit best), ``normal``, or the paper's ``uniform`` U(0,1).
        prune_to: the pruning stops at this many weights.
        tune_iterations: Adam steps on the weights themselves before the pruning; a quarter as many after each stage.
        seed: of starts and samples.

    Raises ValueError for an unknown start or a number below 1.

    Example:
        >>> from sparsenet.architecture.embedding import EmbeddingSearchConfig
        >>> EmbeddingSearchConfig(depths=(1, 2), prune_to=10).start
        'teachers'
    """

    depths: tuple[int, ...] | None = None
    restarts: int = 2
    sparsity_weights: tuple[float, ...] = (1.0, 4.0)
    iterations: int = 1500
    learning_rate: float = 0.1
    threshold_learning_rate: float = 0.01
    start: str = "teachers"
    prune_to: int = 4
    tune_iterations: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        if self.start not in INITIALISATIONS:
            rule = f"start must be one of {', '.join(INITIALISATIONS)}"
            raise ValueError(f"EmbeddingSearchConfig: {rule}, got {self.start!r}")
        if self.restarts < 1 or self.iterations < 1 or not self.sparsity_weights:
            rule = "restarts and iterations must be at least 1 and sparsity_weights not empty"
            got = f"{self.restarts}, {self.iterations}, {self.sparsity_weights}"
            raise ValueError(f"EmbeddingSearchConfig: {rule}, got {got}")


@dataclass(frozen=True, eq=False)
class RegressionData:
    """Samples of a function, split in three; targets divided by ``scale``, the root mean square of the training
    targets.

    x: float32 [n, inputs]; y: float32 [n].

    Example:
        >>> import torch
        >>> from sparsenet.architecture.embedding import RegressionData
        >>> x = torch.rand(100, 3)
        >>> data = RegressionData.from_arrays(x, 5 * x[:, 0] - 5 * x[:, 1])
        >>> round(data.train_y.square().mean().item(), 4), len(data.train_y) + len(data.valid_y) + len(data.test_y)
        (1.0, 100)
    """

    train_x: Tensor
    train_y: Tensor
    valid_x: Tensor
    valid_y: Tensor
    test_x: Tensor
    test_y: Tensor
    scale: float
    shift: float = 0.0
    input_scale: Tensor | None = None

    @classmethod
    def from_arrays(
        cls, x: Tensor, y: Tensor, *, seed: int = 0, centre: bool = False, scale_inputs: bool = False
    ) -> RegressionData:
        """Half, three tenths, a fifth of the rows of ``x`` [n, inputs], ``y`` [n] or [n, 1].

        ``centre`` subtracts the mean of y first (networks without biases need the data as they are). ``scale_inputs``
        divides every input by its largest size, into [-1, 1], where the embedded networks were learned; the factors go
        back into the first layer of the network that is handed over.
        Raises ValueError for other shapes, fewer than 10 rows, NaN or infinities, or a target that never changes.
        """
        y = y.flatten() if y.dim() == 2 and y.shape[1] == 1 else y
        if x.dim() != 2 or y.dim() != 1 or len(x) != len(y) or len(y) < 10:
            rule = "x must be [n, inputs] and y [n] with n >= 10"
            raise ValueError(f"RegressionData: {rule}, got {list(x.shape)} and {list(y.shape)}")
        x, y = x.float(), y.float()
        if not bool(x.isfinite().all() and y.isfinite().all()):
            raise ValueError("RegressionData: x and y must be finite, got nan or inf")
        if float(y.std()) == 0:
            raise ValueError(f"RegressionData: y must vary, got {float(y[0])} everywhere")
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        parts = order.split([len(y) // 2, len(y) * 3 // 10, len(y) - len(y) // 2 - len(y) * 3 // 10])
        shift = float(y[parts[0]].mean()) if centre else 0.0
        scale = float((y[parts[0]] - shift).square().mean().sqrt().clamp(min=1e-12))
        y = (y - shift) / scale
        factors = x.abs().amax(0).clamp(min=1e-12) if scale_inputs else None
        x = x if factors is None else x / factors
        pairs = [part for rows in parts for part in (x[rows], y[rows])]
        return cls(*pairs, scale, shift, factors)


@dataclass(frozen=True, eq=False)
class Candidate:
    """One network that a search found.

    Attributes:
        nets: a batch of one, neurons and thresholds hard, targets normalised.
        depth, nonzeros: hidden layers, weights other than zero.
        valid_fvu, test_fvu: MSE / Var(y), the fraction of variance unexplained.
        test_mpe: median over samples of |y - y'| / |y| in the data's own units: flatters near-constant targets.
        sparsity_weight: of the search it came from.
        stage: ``search``, ``tuned`` or ``pruned``.
    """

    nets: NetworkBatch
    depth: int
    nonzeros: int
    valid_fvu: float
    test_fvu: float
    test_mpe: float
    sparsity_weight: float
    stage: str

    def module(self, data: RegressionData) -> nn.Module:
        """The network as an ordinary module in the data's units: [batch, inputs] -> [batch, 1]."""
        network = self.nets.to_module(0, 1.0 if data.shift else data.scale)
        if data.input_scale is not None:
            with torch.no_grad():
                network[0].weight.div_(data.input_scale)
        return ScaledOutput(network, data.scale, data.shift) if data.shift else network


@dataclass(frozen=True, eq=False)
class SearchOutcome:
    """Everything a search looked at; choices are made by validation, test figures are only reported."""

    candidates: list[Candidate]

    def best(self) -> Candidate:
        """The smallest validation error."""
        return min(self.candidates, key=lambda c: c.valid_fvu)

    def sparsest(self, max_fvu: float) -> Candidate | None:
        """The fewest weights with a validation FVU of at most ``max_fvu``, or None."""
        good = [c for c in self.candidates if c.valid_fvu <= max_fvu]
        return min(good, key=lambda c: (c.nonzeros, c.valid_fvu)) if good else None

    def within(self, nonzeros: int) -> Candidate | None:
        """The smallest validation error with at most ``nonzeros`` weights, or None."""
        small = [c for c in self.candidates if c.nonzeros <= nonzeros]
        return min(small, key=lambda c: c.valid_fvu) if small else None

    def front(self) -> list[Candidate]:
        """Candidates that no other beats in both weights and validation error, by weights."""
        kept: list[Candidate] = []
        for c in sorted(self.candidates, key=lambda c: (c.nonzeros, c.valid_fvu)):
            if not kept or c.valid_fvu < kept[-1].valid_fvu:
                kept.append(c)
        return kept


def search_embedding(model: NetworkAutoencoder, data: RegressionData, config: EmbeddingSearchConfig) -> SearchOutcome:
    """Finds networks for ``data`` with every decoder; see the module's docstring.

    Raises ValueError when the data has another number of inputs than the embedding.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.embedding import AutoencoderConfig, EmbeddingSearchConfig, NetworkAutoencoder
        >>> from sparsenet.architecture.embedding import RegressionData, search_embedding
        >>> model = NetworkAutoencoder(AutoencoderConfig(hidden=16, latent=8))   # see train_autoencoder
        >>> x = torch.rand(200, 3)
        >>> data = RegressionData.from_arrays(x, x[:, 0] - x[:, 1])
        >>> config = EmbeddingSearchConfig(depths=(1,), restarts=1, iterations=3, tune_iterations=3, prune_to=12)
        >>> search_embedding(model, data, config).best().module(data)(x).shape
        torch.Size([200, 1])
    """
    if data.train_x.shape[1] != model.space.inputs:
        raise ValueError(f"search_embedding: data must have {model.space.inputs} inputs, got {data.train_x.shape[1]}")
    model = model.eval().requires_grad_(False)
    candidates: list[Candidate] = []
    weights = torch.tensor(config.sparsity_weights).repeat_interleave(config.restarts)
    for depth in config.depths or range(1, model.space.max_depth + 1):
        nets = descend(model, data, depth, weights, config)
        candidates += judged(nets, data, weights, "search")
        candidates += prune_and_tune(nets, data, weights, config)
    return SearchOutcome(candidates)


def start_codes(model: NetworkAutoencoder, data: RegressionData, depth: int, count: int, config) -> Tensor:
    """[count, latent]: where the descent begins."""
    generator = torch.Generator().manual_seed(config.seed * 101 + depth)
    latent = model.config.latent
    if config.start == "uniform":
        return torch.rand(count, latent, generator=generator)
    if config.start == "normal":
        return torch.randn(count, latent, generator=generator)
    x, y = data.train_x[:500], data.train_y[:500]
    with torch.no_grad():
        groups, _ = sample_teachers(model.space, max(256, 4 * count), x, generator)
        z = torch.cat([model.encode(nets) for nets in groups])
        misfit = (model.decode(z, depth).outputs(x) - y).square().mean(1)
    return z[misfit.argsort()[:count]][torch.randperm(count, generator=generator)]


def thresholded(nets: NetworkBatch, threshold: Tensor, steepness: float | None) -> NetworkBatch:
    """Weights below the threshold [n] softly (``steepness``) or exactly (None) set to zero."""
    t = threshold[:, None, None]
    if steepness is None:
        return replace(nets, weights=tuple(torch.where(w.abs() >= t, w, 0.0) for w in nets.weights))
    return replace(nets, weights=tuple(w * ((w.abs() - t) * steepness).sigmoid() for w in nets.weights))


def sparsity_penalty(nets: NetworkBatch, threshold: Tensor) -> Tensor:
    """[n]: ``sum 0.5 sigmoid(10 (|W| - t)) + 0.1 |W|`` over the weights between neurons that exist."""
    t, total = threshold[:, None, None], torch.zeros(len(nets))
    ends = [torch.ones(1, nets.space.inputs), *nets.neurons.unbind(1), torch.ones(1, 1)]
    for weight, before, after in zip(nets.weights, ends[:-1], ends[1:], strict=True):
        size = weight.abs()
        cost = 0.5 * ((size - t) * 10).sigmoid() + 0.1 * size
        total = total + (cost * after[:, :, None] * before[:, None, :]).sum((1, 2))
    return total


def sharpened(nets: NetworkBatch, temperature: float) -> NetworkBatch:
    """Per-neuron activations closer to one choice; temperature 0 is the choice itself."""
    if nets.mixture is None:
        return nets
    if temperature == 0:
        mixture = nn.functional.one_hot(nets.mixture.argmax(3), 3).to(nets.mixture.dtype)
    else:
        mixture = (nets.mixture.clamp(min=1e-8).log() / temperature).softmax(3)
    return replace(nets, mixture=mixture)


def descend(
    model: NetworkAutoencoder, data: RegressionData, depth: int, weights: Tensor, config: EmbeddingSearchConfig
) -> NetworkBatch:
    """Gradient descent on one code per entry of ``weights`` [n]; the best hard-thresholded networks found."""
    x, y, count = data.train_x[:2000], data.train_y[:2000], len(weights)
    z = start_codes(model, data, depth, count, config).requires_grad_(True)
    threshold = torch.zeros(count, requires_grad=True)
    optimizer = torch.optim.Adam(
        [{"params": [z], "lr": config.learning_rate}, {"params": [threshold], "lr": config.threshold_learning_rate}]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.iterations, eta_min=0.0)
    unit = best = best_nets = None
    for step in range(config.iterations):
        temperature = max(0.05, 1 - step / (0.6 * config.iterations))
        nets = sharpened(model.decode(z, depth), temperature)
        misfit = (thresholded(nets, threshold, 100.0).outputs(x) - y).square().mean(1)
        if unit is None:
            unit = (misfit.detach() / 7000.0).clamp(max=1.0 / 7000.0) * weights
        loss = (misfit + unit * sparsity_penalty(nets, threshold)).sum()
        optimizer.zero_grad()
        loss.backward()
        if step % 10 == 0 or step == config.iterations - 1:
            with torch.no_grad():
                hard = sharpened(thresholded(nets, threshold, None), 0.0)
                score = (hard.outputs(x) - y).square().mean(1) + unit * 0.5 * hard.nonzeros()
                best, best_nets = _keep_better(best, best_nets, score, hard)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            threshold.clamp_(0.0, 3.0)
    return best_nets.effective()


def _keep_better(
    best: Tensor | None, best_nets: NetworkBatch | None, score: Tensor, nets: NetworkBatch
) -> tuple[Tensor, NetworkBatch]:
    """For each place the network with the smaller score."""
    nets = nets.select(torch.arange(len(score)))
    if best is None:
        return score, nets
    better = score < best

    def pick(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(better.reshape(-1, *[1] * (new.dim() - 1)), new, old)

    weights = tuple(pick(n, o) for n, o in zip(nets.weights, best_nets.weights, strict=True))
    biases = None
    if nets.biases is not None:
        biases = tuple(pick(n, o) for n, o in zip(nets.biases, best_nets.biases, strict=True))
    mixture = None if nets.mixture is None else pick(nets.mixture, best_nets.mixture)
    merged = NetworkBatch(nets.space, weights, pick(nets.neurons, best_nets.neurons), biases, mixture)
    return torch.where(better, score, best), merged


@torch.no_grad()
def judged(nets: NetworkBatch, data: RegressionData, weights: Tensor, stage: str) -> list[Candidate]:
    """One :class:`Candidate` per network."""
    valid = (nets.outputs(data.valid_x) - data.valid_y).square().mean(1) / data.valid_y.var()
    outputs = nets.outputs(data.test_x)
    test = (outputs - data.test_y).square().mean(1) / data.test_y.var()
    own = data.test_y + data.shift / data.scale
    percentage = ((outputs - data.test_y).abs() / own.abs().clamp(min=1e-8)).median(1).values
    counts = nets.nonzeros()
    rows = zip(counts.tolist(), valid.tolist(), test.tolist(), percentage.tolist(), weights.tolist(), strict=True)
    return [
        Candidate(nets.select([i]), nets.depth, count, v, t, p, w, stage)
        for i, (count, v, t, p, w) in enumerate(rows)
        if v == v  # a diverged network is none
    ]


def tune(nets: NetworkBatch, x: Tensor, y: Tensor, iterations: int, learning_rate: float) -> NetworkBatch:
    """Adam on the weights (and biases) themselves; zeros stay zero. All networks at once."""
    keep = [(w != 0).float() for w in nets.weights]
    weights = [w.clone().requires_grad_(True) for w in nets.weights]
    biases = None if nets.biases is None else [b.clone().requires_grad_(True) for b in nets.biases]
    optimizer = torch.optim.Adam([*weights, *(biases or [])], learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, iterations), eta_min=learning_rate / 20)
    for _ in range(iterations):
        trial = replace(nets, weights=tuple(w * k for w, k in zip(weights, keep, strict=True)), biases=biases)
        loss = (trial.outputs(x) - y).square().mean(1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    final = tuple((w * k).detach() for w, k in zip(weights, keep, strict=True))
    return replace(nets, weights=final, biases=None if biases is None else tuple(b.detach() for b in biases))


def with_flat_weights(nets: NetworkBatch, flat: Tensor) -> NetworkBatch:
    """The networks with all their weights taken from ``flat`` [n, weights], layer after layer."""
    parts = flat.split([w[0].numel() for w in nets.weights], 1)
    return replace(nets, weights=tuple(p.reshape(-1, *w.shape[1:]) for p, w in zip(parts, nets.weights, strict=True)))


@torch.no_grad()
def deletion_losses(nets: NetworkBatch, x: Tensor, y: Tensor) -> Tensor:
    """[n, weights]: the mean squared error after deleting each weight, by itself; infinite where it is zero already.

    All deletions of all networks are one batch of n x weights networks, in slices that bound the memory.
    """
    flat = torch.cat([w.flatten(1) for w in nets.weights], 1)
    owner, place = (flat != 0).nonzero(as_tuple=True)
    losses = torch.full(flat.shape, torch.inf)
    for rows in torch.arange(len(owner)).split(512):
        variants = flat[owner[rows]]
        variants[torch.arange(len(rows)), place[rows]] = 0.0
        changed = with_flat_weights(nets.select(owner[rows]), variants)
        losses[owner[rows], place[rows]] = (changed.outputs(x) - y).square().mean(1)
    return losses


def prune_and_tune(
    nets: NetworkBatch, data: RegressionData, weights: Tensor, config: EmbeddingSearchConfig
) -> list[Candidate]:
    """Deletes the weights whose loss rises least, an eighth at a time, tuning between; every stage is a candidate."""
    x, y = data.train_x[:1000], data.train_y[:1000]
    nets = tune(nets, x, y, config.tune_iterations, 0.02)
    found = judged(nets, data, weights, "tuned")
    while int(nets.nonzeros().max()) > config.prune_to:
        losses = deletion_losses(nets, x[:300], y[:300])
        counts = (losses < torch.inf).sum(1)
        quota = torch.where(counts > config.prune_to, (counts // 8).clamp(min=1), 0)
        rank = losses.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
        flat = torch.cat([w.flatten(1) for w in nets.weights], 1)
        pruned = with_flat_weights(nets, torch.where(rank >= quota[:, None], flat, 0.0))
        nets = tune(pruned, x, y, config.tune_iterations // 4, 0.01)
        found += judged(nets, data, weights, "pruned")
    return found
