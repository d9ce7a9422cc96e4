"""Random sequences of everything that changes a network while it trains, against a dense masked network in float64.

The dense network holds every weight, a mask, and torch's own optimizer with one moment per weight. After each rule the
sparse network and its optimizer must hold the same numbers at the same places. ``SPARSENET_SEQUENCES`` sets how many
sequences run (default 12; 1,000 take about three minutes).
"""

import copy
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

import sparsenet as sn

SEQUENCES = int(os.environ.get("SPARSENET_SEQUENCES", "12"))
EPS = 1e-3  # of the adaptive optimizers: gradients that cancel to nothing would else be steps of a random sign

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, eps=EPS, weight_decay=0.1),
    "adam fused": lambda p: torch.optim.Adam(p, 1e-2, eps=EPS, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, eps=EPS, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2, initial_accumulator_value=0.1, eps=EPS),
}
FIRST = {"adagrad": {"sum": 0.1}}  # what a new weight's state starts with, where it is not zero


class Magnitude(sn.Policy):
    """A policy of one's own: drops the smallest, grows the first free places."""

    def grow_scores(self, layer, places):
        return -places.float()


POLICIES = {"set": sn.SET(0.4), "rigl": sn.RigL(0.4), "gmp": sn.GMP(), "static": sn.Static(), "own": Magnitude(0.4)}


class Dense:
    """The same network with all weights: [out, in] parameters in float64, masks, and an optimizer of torch's."""

    def __init__(self, model):
        self.weights = [nn.Parameter(layer.weight_dense().detach().double().contiguous()) for layer in model]
        self.biases = [nn.Parameter(layer.bias.detach().double()) for layer in model]
        self.masks = [mask_of(layer) for layer in model]
        self.frozen = [False] * len(self.weights)

    def parameters(self):
        return [p for pair in zip(self.weights, self.biases, strict=True) for p in pair]

    def forward(self, x):
        self.effective = []
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            self.effective.append((w * self.masks[i]).requires_grad_())
            self.effective[-1].retain_grad()  # of all weights, masked or not, in the last pass
            x = x @ self.effective[-1].T + b
            x = torch.relu(x) if i + 1 < len(self.weights) else x
        return x


def mask_of(layer):
    """Bool [out, in]: the elements that may be other than zero."""
    twin = copy.deepcopy(layer).double()
    with torch.no_grad():
        twin.values.fill_(1.0)
        if twin.element_mask is not None:
            twin.values.mul_(twin.element_mask)
    return twin.weight_dense().detach() != 0


def dense_form(layer, tensor):
    """[out, in] of a tensor [num_blocks, b, b] on the layer's pattern."""
    p, b = layer.pattern, layer.block_size
    out = tensor.new_zeros(p.block_rows, p.block_cols, b, b)
    out[p.row_indices.long(), p.col_indices.long()] = tensor.detach()
    out = out.permute(0, 2, 1, 3).reshape(p.block_rows * b, p.block_cols * b)
    return out[: layer.out_features, : layer.in_features].double()


def blocks_of(layer, dense):
    """[block rows, block cols] of the squared norms of a dense matrix's blocks."""
    b, p = layer.block_size, layer.pattern
    padded = nn.functional.pad(dense, (0, -dense.shape[1] % b, 0, -dense.shape[0] % b))
    return padded.reshape(p.block_rows, b, p.block_cols, b).square().sum((1, 3))


def smallest_to_spare(pattern, norms, count, left):
    """Places of the smallest blocks, asked one by one, that are not the last of a row or column of blocks."""
    rows, cols = pattern.row_indices.tolist(), pattern.col_indices.tolist()
    row_left, col_left = (
        [lines.count(i) for i in range(n)] for lines, n in ((rows, pattern.block_rows), (cols, pattern.block_cols))
    )
    gone = []
    for place in sorted(pattern.linear_places().tolist(), key=lambda place: (float(norms[place]), place)):
        row, col = divmod(place, pattern.block_cols)
        last = (row_left[row] == 1 and left >= pattern.block_rows) or (
            col_left[col] == 1 and left >= pattern.block_cols
        )
        if len(gone) < count and not last:
            row_left[row] -= 1
            col_left[col] -= 1
            gone.append(place)
    return torch.tensor(gone, dtype=torch.int64)


class Training(RuleBasedStateMachine):
    """One network through its life."""

    @initialize(
        sizes=st.lists(st.integers(5, 40), min_size=3, max_size=4),
        block_size=st.sampled_from([1, 4, 8]),
        density=st.floats(0.3, 0.9),
        optimizer=st.sampled_from(sorted(OPTIMIZERS)),
        policy=st.sampled_from(sorted(POLICIES)),
        seed=st.integers(0, 999),
    )
    def begin(self, sizes, block_size, density, optimizer, policy, seed):
        self.draw = torch.Generator().manual_seed(seed)
        self.dtype, self.steps = torch.float64, 0
        self.model = sn.SparseMLP(sizes, density, block_size, dtype=torch.float64, generator=self.draw)
        self.dense = Dense(self.model)
        self.saved = None
        self.change_optimizer(optimizer)
        self.change_policy(policy)

    # --- what happens to a network ---

    def new_sparsifier(self):
        policy = POLICIES[self.policy]
        now = sum(m.pattern.num_blocks for m in self.model)
        places = sum(m.pattern.block_rows * m.pattern.block_cols for m in self.model)
        falls = sn.Linear(now / places, 0.6 * now / places, 12) if policy.follows_density else None
        self.sparsifier = sn.Sparsifier(self.model, self.optimizer, policy, falls, every=2, seed=self.steps, grace=1)

    @rule(name=st.sampled_from(sorted(OPTIMIZERS)))
    def change_optimizer(self, name):
        self.kind = name
        self.optimizer = OPTIMIZERS[name](self.model.parameters())
        self.reference = OPTIMIZERS[name](self.dense.parameters())
        if hasattr(self, "sparsifier"):
            self.new_sparsifier()

    @rule(name=st.sampled_from(sorted(POLICIES)))
    def change_policy(self, name):
        self.policy = name
        self.new_sparsifier()

    @rule(count=st.integers(1, 4), calls=st.integers(1, 2))
    def train(self, count, calls):
        """Steps of the optimizer; the Sparsifier rewires at every second."""
        for _ in range(count):
            x = torch.randn(7, self.model.sizes[0], generator=self.draw, dtype=torch.float64)
            target = torch.randn(7, self.model.sizes[-1], generator=self.draw, dtype=torch.float64)
            self.optimizer.zero_grad()
            self.reference.zero_grad()
            for _ in range(calls):  # gradients of several passes add up; growth counts the last
                y, z = self.model(x.to(self.dtype)), self.dense.forward(x)
                (y - target.to(self.dtype)).square().mean().backward()
                (z - target).square().mean().backward()
            self.optimizer.step()
            self.reference.step()
            young = self.sparsifier.state_dict().get("young", {})
            young = [torch.cat(young.get(str(i), [torch.empty(0, dtype=torch.int64)])) for i in range(len(self.model))]
            before = [
                (m.pattern, m.weight_dense().detach().double(), y) for m, y in zip(self.model, young, strict=True)
            ]
            update = self.sparsifier.step()
            self.steps += 1
            if update is not None:
                self.check_and_follow(update, before)

    def check_and_follow(self, update, before):
        """The choices are those of the policy by the dense network's numbers; then the dense network does the same."""
        dense_gradients = [w.grad for w in self.dense.effective] if self.policy == "rigl" else None
        for i, layer in enumerate(self.model):
            change = update.layers.get(str(i))
            if change is None or change.skipped:
                assert layer.pattern is before[i][0]
                continue
            old, weight, young = before[i]
            (newest,) = self.sparsifier.state_dict()["young"][str(i)]
            assert torch.equal(newest, change.grown_places)  # they stay at the next rewire
            active = old.linear_places()
            dropped, grown = change.dropped_places, change.grown_places
            assert set(dropped.tolist()) <= set(active.tolist()) and not set(grown.tolist()) & set(active.tolist())
            cols = old.block_cols
            if grown.numel() and dense_gradients is not None:
                scores = blocks_of(layer, dense_gradients[i]).flatten()
                free = torch.ones_like(scores, dtype=torch.bool)
                free[active] = False
                free[grown] = False
                rest = scores[free].max() if free.any() else torch.tensor(0.0)
                assert scores[grown].min() >= rest * (1 - self.tolerance) - self.tolerance
            norms = blocks_of(layer, weight).flatten()
            norms[young] = torch.inf
            spared = smallest_to_spare(old, norms, len(dropped), layer.pattern.num_blocks)
            if len(spared) == len(dropped):  # else the density has left too few blocks for every row and column
                close = {"rtol": 1e-5 + self.tolerance, "atol": self.tolerance}  # equal but for float32 scores
                if layer.element_mask is None:
                    torch.testing.assert_close(norms[dropped].sort().values, norms[spared].sort().values, **close)
                for dead, before_that, lines in zip(
                    layer.pattern.unreached(), old.unreached(), (old.block_rows, old.block_cols), strict=True
                ):
                    assert dead <= before_that or layer.pattern.num_blocks < lines
            moved = torch.zeros(old.block_rows, cols, dtype=torch.bool)
            moved.view(-1)[torch.cat([dropped, grown])] = True
            b = layer.block_size
            moved = moved.repeat_interleave(b, 0).repeat_interleave(b, 1)[: layer.out_features, : layer.in_features]
            self.forget(i, moved)
            self.dense.masks[i] = mask_of(layer)

    def forget(self, i, moved):
        """Weights that left or came are zero, and their moments what a new weight's are."""
        with torch.no_grad():
            self.dense.weights[i][moved] = 0.0
            for key, tensor in self.reference.state.get(self.dense.weights[i], {}).items():
                if isinstance(tensor, torch.Tensor) and tensor.dim():
                    tensor[moved] = FIRST.get(self.kind, {}).get(key, 0.0)

    @rule(layer=st.integers(0, 3), frozen=st.booleans())
    def freeze(self, layer, frozen):
        layer %= len(self.dense.weights)
        self.dense.frozen[layer] = frozen
        self.apply_frozen()
        self.model[layer].values.grad = self.dense.weights[layer].grad = None

    def apply_frozen(self):
        for i, frozen in enumerate(self.dense.frozen):
            self.model[i].values.requires_grad_(not frozen)
            self.dense.weights[i].requires_grad_(not frozen)

    @rule()
    def continue_with_a_copy(self):
        state = self.sparsifier.state_dict()
        self.model, self.optimizer = copy.deepcopy((self.model, self.optimizer))
        density = self.sparsifier.density
        self.sparsifier = sn.Sparsifier(
            self.model, self.optimizer, POLICIES[self.policy], density, every=2, seed=self.sparsifier.seed, grace=1
        )
        self.sparsifier.load_state_dict(state)

    @rule()
    def save_and_load(self):
        """Into a network that was built anew, with another pattern."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "a.safetensors")
            sn.save(path, self.model, self.optimizer, self.sparsifier)
            sides = [layer.block_size for layer in self.model]
            fresh = sn.SparseMLP(list(self.model.sizes), 0.5, sides, dtype=self.dtype)
            optimizer = OPTIMIZERS[self.kind](fresh.parameters())
            density = self.sparsifier.density
            sparsifier = sn.Sparsifier(fresh, optimizer, POLICIES[self.policy], density, every=2, seed=1, grace=1)
            sn.load(path, fresh, optimizer, sparsifier)
        self.model, self.optimizer, self.sparsifier = fresh, optimizer, sparsifier
        self.apply_frozen()

    @rule()
    def remember(self):
        self.dense.effective = []
        self.saved = copy.deepcopy((self.model.state_dict(), self.model.sizes, self.dense))

    @precondition(lambda self: self.saved is not None and self.saved[1] == self.model.sizes)
    @rule()
    def put_an_earlier_state_back(self):
        """The model alone: the optimizer goes on, with its moments at the places where they were."""
        state, _, dense = copy.deepcopy(self.saved)
        now = [mask_of(layer) for layer in self.model]
        self.model.load_state_dict(state)
        with torch.no_grad():
            for i, layer in enumerate(self.model):
                self.dense.weights[i].copy_(dense.weights[i])
                self.dense.biases[i].copy_(dense.biases[i])
                self.dense.masks[i] = mask_of(layer)
                changed = self.dense.masks[i] != now[i]
                weights = self.dense.weights[i].detach().clone()
                self.forget(i, changed)
                self.dense.weights[i].copy_(weights)
        self.sparsifier._states.follow()  # what the optimizer's next step does first

    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def move_to(self, dtype):
        """Optimizers convert their state when it is loaded; from float32 on the dense network is compared loosely."""
        if dtype == self.dtype:
            return
        self.dtype = dtype
        self.model.to(dtype)
        self.optimizer.load_state_dict(self.optimizer.state_dict())
        self.loose = True
        self.new_sparsifier()

    @precondition(lambda self: min(self.model.sizes[1:-1]) > 3 and not any(self.dense.frozen))
    @rule(share=st.floats(0.1, 0.5), at=st.integers(0, 3))
    def compact(self, share, at):
        """Some units of a hidden layer leave, by name; constant ones go into the next bias."""
        at %= len(self.model) - 1
        remove = {str(i): [] for i in range(len(self.model))}
        reached = (self.dense.weights[at] != 0).any(1).nonzero().flatten()
        remove[str(at)] = reached[
            torch.randperm(len(reached), generator=self.draw)[: int(share * len(reached))]
        ].tolist()
        report = sn.compact(self.model, self.optimizer, remove=remove, sparsifier=self.sparsifier)
        self.saved = None
        if any(change.after == 1 for change in report.layers.values()):  # the last unit is kept as a shell: begin anew
            self.dense = Dense(self.model)
            self.change_optimizer(self.kind)
            return
        keep_in = torch.arange(self.model.sizes[0])
        for i, layer in enumerate(self.model):
            order = report.layers[str(i)].kept_units
            kept = torch.arange(len(self.dense.biases[i])) if i + 1 == len(self.model) else torch.as_tensor(order)
            if i:
                gone = torch.ones(self.dense.weights[i].shape[1], dtype=torch.bool)
                gone[keep_in] = False
                gone[torch.tensor(remove[str(i - 1)], dtype=torch.int64)] = False
                with torch.no_grad():  # constant units that nobody named
                    self.dense.biases[i] += self.dense.weights[i][:, gone] @ self.constants[gone]
            self.constants = torch.relu(self.dense.biases[i].detach())
            self.resize(i, kept, keep_in)
            keep_in = kept
            self.dense.masks[i] = mask_of(layer)

    def resize(self, i, rows, cols):
        for parameters, index in ((self.dense.weights, (rows[:, None], cols[None])), (self.dense.biases, (rows,))):
            old = parameters[i]
            new = nn.Parameter(old.detach()[index].clone(), old.requires_grad)
            state = self.reference.state.pop(old, None)
            if state is not None:
                self.reference.state[new] = {
                    k: v[index].clone() if isinstance(v, torch.Tensor) and v.dim() else v for k, v in state.items()
                }
            group = self.reference.param_groups[0]["params"]
            group[next(n for n, p in enumerate(group) if p is old)] = new
            parameters[i] = new

    # --- what must hold ---

    loose = False

    @property
    def tolerance(self):
        return 1e-3 if self.loose else 1e-9

    @invariant()
    def the_same_numbers_at_the_same_places(self):
        if not hasattr(self, "sparsifier"):
            return
        close = {"atol": self.tolerance, "rtol": self.tolerance}
        for i, layer in enumerate(self.model):
            torch.testing.assert_close(layer.weight_dense().detach().double(), self.dense.weights[i].detach(), **close)
            torch.testing.assert_close(layer.bias.detach().double(), self.dense.biases[i].detach(), **close)
            for mine, theirs in ((layer.values, self.dense.weights[i]), (layer.bias, self.dense.biases[i])):
                state, expected = self.optimizer.state.get(mine, {}), self.reference.state.get(theirs, {})
                assert state.keys() == expected.keys()
                for key, tensor in state.items():
                    if not isinstance(tensor, torch.Tensor) or not tensor.dim():
                        assert float(tensor or 0) == float(expected[key] or 0)
                        continue
                    got = dense_form(layer, tensor) if tensor.dim() == 3 else tensor.double()
                    want = expected[key] * self.dense.masks[i] if tensor.dim() == 3 else expected[key]
                    torch.testing.assert_close(got * (self.dense.masks[i] if tensor.dim() == 3 else 1), want, **close)


TestTraining = pytest.mark.filterwarnings("ignore")(Training.TestCase)
TestTraining.settings = settings(
    max_examples=SEQUENCES,
    stateful_step_count=15,
    deadline=None,
    derandomize="SPARSENET_SEQUENCES" not in os.environ,
    suppress_health_check=list(HealthCheck),
    database=None,
    phases=[Phase.generate],  # a failing sequence is short enough to read; shrinking takes minutes
    report_multiple_bugs=False,
)
