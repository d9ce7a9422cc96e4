"""sn.save and sn.load through wrappers, with strict=False, into models on meta, and when something fails late."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import sparsenet as sn
from sparsenet import checkpoint
from sparsenet.distributed import unwrap


def make_model(seed=0, density=0.5):
    torch.manual_seed(seed)
    return sn.SparseMLP([64, 48, 10], density=density, block_size=16)


def make_run(seed=0, density=0.5):
    """Model, optimizer, sparsifier and scheduler after one step."""
    model = make_model(seed, density)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier = sn.Sparsifier(model, optimizer, sn.SET(0.3), every=1, seed=seed)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model(torch.randn(8, 64)).square().sum().backward()
    optimizer.step()
    scheduler.step()
    sparsifier.step()
    return model, optimizer, sparsifier, scheduler


def state_of(model, *others):
    """Everything, as one flat list of comparable things."""
    state = [(k, v.tolist() if isinstance(v, torch.Tensor) else v) for k, v in model.state_dict().items()]
    return state, [torch.utils._pytree.tree_map(to_list, thing.state_dict()) for thing in others]


def to_list(value):
    return value.tolist() if isinstance(value, torch.Tensor) else value


def ours(model):
    """Our wrapper without the process group that DistributedDataParallel asks for."""
    wrapped = sn.distributed.DataParallel.__new__(sn.distributed.DataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    return wrapped


WRAPPERS = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "ours": ours,
    "average": AveragedModel,
}


# --- wrappers ---


@pytest.mark.parametrize("names", [*itertools.permutations(WRAPPERS, 1), *itertools.permutations(WRAPPERS, 2)])
def test_row76_wrappers_are_looked_through(tmp_path, names):
    def wrap(model):
        for name in names:
            model = WRAPPERS[name](model)
        return model

    path, wrapped = tmp_path / "a.safetensors", wrap(make_model())
    if names[-1] == "average":
        wrapped.n_averaged += 3
    sn.save(path, wrapped)
    inner, plain = unwrap(wrapped), make_model(1, 0.2)
    assert type(inner) is sn.SparseMLP
    assert set(checkpoint.describe(path).layers) == {"0", "1"}
    assert {n for n in load_file(path) if n.startswith(("module", "_orig_mod"))} == set()
    sn.load(path, plain)
    assert state_of(plain) == state_of(inner)
    other = wrap(make_model(1, 0.2))
    sn.load(path, other)
    assert state_of(other) == state_of(wrapped)
    if "average" not in names:
        sn.save(path, plain)
        sn.load(path, wrap(make_model(1, 0.2)))


def test_row76_an_average_misses_its_count_in_a_plain_file(tmp_path):
    """Without it the next update would put the network itself in the average's place."""
    sn.save(tmp_path / "a.safetensors", make_model())
    average = AveragedModel(make_model(1, 0.2))
    with pytest.raises(ValueError, match=r"missing in the file \['n_averaged'\]"):
        sn.load(tmp_path / "a.safetensors", average)
    assert sn.load(tmp_path / "a.safetensors", average, strict=False).missing_keys == ("n_averaged",)
    assert average.module[0].pattern == make_model()[0].pattern


def test_row76_compiled_parts_and_their_optimizer(tmp_path):
    def make(seed, compiled):
        torch.manual_seed(seed)
        first = sn.SparseLinear(64, 48, density=0.5, block_size=16)
        first = torch.compile(first, backend="eager") if compiled else first
        model = nn.Sequential(first, nn.ReLU(), nn.Linear(48, 10))
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.randn(4, 64)).sum().backward()
        optimizer.step()
        return model, optimizer

    for saved, loaded in ((True, False), (False, True), (True, True)):
        source, target = make(0, saved), make(1, loaded)
        sn.save(tmp_path / "a.safetensors", *source)
        assert not [name for name in checkpoint.describe(tmp_path / "a.safetensors").tensors if "_orig_mod" in name]
        sn.load(tmp_path / "a.safetensors", *target)
        assert [v for _, v in state_of(target[0])[0]] == [v for _, v in state_of(source[0])[0]]
        assert state_of(*target)[1] == state_of(*source)[1]


def test_row76_growth_is_the_same_under_wrappers():
    """Seeds of random growth come from the layer's name."""
    patterns = []
    for wrap in (lambda m: m, *WRAPPERS.values(), lambda m: nn.DataParallel(torch.compile(m, backend="eager"))):
        model = make_model()
        sparsifier = sn.Sparsifier(wrap(model), None, sn.SET(0.5), every=1, seed=3)
        inner = sparsifier.layers["0"]
        assert set(sparsifier.layers) == {"0", "1"}
        assert sparsifier.step().grown
        patterns.append(inner.pattern)
    parts = nn.Sequential(*(torch.compile(layer, backend="eager") for layer in make_model()))
    sparsifier = sn.Sparsifier(parts, None, sn.SET(0.5), every=1, seed=3)
    sparsifier.step()
    patterns.append(sparsifier.layers["0"].pattern)
    assert all(pattern == patterns[0] for pattern in patterns)


@pytest.mark.parametrize("length", [0x0280, 0x0480])
def test_row49_a_header_length_that_looks_like_a_pickle_is_none(tmp_path, length):
    """The first bytes of a small safetensors file are its header's length, and may be those of a pickle."""
    path, model = tmp_path / "a.safetensors", nn.Linear(2, 2)
    for padding in range(length):
        sn.save(path, model, extra="x" * padding)
        if int.from_bytes(path.read_bytes()[:8], "little") >= length:
            break
    assert path.read_bytes()[:1] == b"\x80"
    assert sn.load(path, nn.Linear(2, 2)).extra == "x" * padding


# --- strict=False ---


def test_row76_strict_false_reports_and_loads_what_is_there(tmp_path):
    path = tmp_path / "a.safetensors"
    source = nn.ModuleDict({"body": make_model(), "old": nn.Linear(3, 3)})
    sn.save(path, source, step=5)
    target = nn.ModuleDict({"body": make_model(1, 0.2), "new": nn.Linear(3, 3)})
    kept = target["new"].weight.detach().clone()
    before = state_of(target)
    with pytest.raises(ValueError, match=r"missing in the file \['new.bias', 'new.weight'\], not in the model \['old"):
        sn.load(path, target)
    assert state_of(target) == before
    found = sn.load(path, target, strict=False)
    assert found.missing_keys == ("new.bias", "new.weight") and found.unexpected_keys == ("old.bias", "old.weight")
    assert found.step == 5 and torch.equal(target["new"].weight, kept)
    assert state_of(target["body"]) == state_of(source["body"])
    found = sn.load(path, source)
    assert found.missing_keys == found.unexpected_keys == ()
    wrong = nn.ModuleDict({"body": make_model(1, 0.2), "old": nn.Linear(3, 4)})
    before = state_of(wrong)
    with pytest.raises(ValueError, match=r"must hold old.weight of shape \[4, 3\], got \[3, 3\]"):
        sn.load(path, wrong, strict=False)
    assert state_of(wrong) == before


def test_row76_a_dense_file_says_what_to_do(tmp_path):
    dense = nn.Sequential(nn.Linear(64, 48))
    sn.save(tmp_path / "a.safetensors", dense)
    sparse = sn.sparsify_(dense, 0.5, 16).model
    before = state_of(sparse)
    with pytest.raises(ValueError, match="'0' is dense there: load before sparsify_"):
        sn.load(tmp_path / "a.safetensors", sparse)
    with pytest.raises(
        ValueError, match="layer '0': SparseLinear: .* weight of a dense layer; load it before sparsify_"
    ):
        sn.load(tmp_path / "a.safetensors", sparse, strict=False)
    assert state_of(sparse) == before


# --- what fails late ---


class Stubborn(nn.Module):
    """Its extra state cannot be loaded."""

    def __init__(self):
        super().__init__()
        self.body = make_model()

    def get_extra_state(self):
        return {"n": 1}

    def set_extra_state(self, state):
        if self.refuses:
            raise KeyError("no")


def test_row76_a_load_that_fails_late_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    sn.save(path, *make_run(0, 0.5), step=1)
    for number, part in ((1, "optimizer"), (2, "sparsifier"), (3, "scheduler")):
        run = make_run(1, 0.2)
        original, left = type(run[number]).load_state_dict, [True]

        def fail(self, state, original=original, left=left):
            original(self, state)
            if left and left.pop():
                raise RuntimeError("late")

        before, model = state_of(*run), run[0]
        monkeypatch.setattr(type(run[number]), "load_state_dict", fail)
        if part == "optimizer":  # of a kind that nothing is known of
            monkeypatch.setattr("sparsenet.checkpoint.saving.is_elementwise", lambda optimizer: False)
        with pytest.raises(RuntimeError, match="late"):
            sn.load(path, *run)
        assert state_of(*run) == before, part
        sn.load(path, *run)
        assert state_of(model) == state_of(make_run(0, 0.5)[0])


def test_row76_a_model_whose_own_code_refuses_is_put_back(tmp_path):
    source, target = Stubborn(), Stubborn()
    sn.save(tmp_path / "a.safetensors", source)
    target.body = make_model(1, 0.2)
    before, target.refuses = state_of(target), True
    with pytest.raises(KeyError, match="no"):
        try:
            sn.load(tmp_path / "a.safetensors", target)
        finally:
            target.refuses = False
    assert state_of(target) == before


# --- meta ---


def test_row77_a_model_on_meta_is_loaded_from_a_file(tmp_path):
    path, x = tmp_path / "a.safetensors", torch.randn(3, 64)
    source = make_model()
    optimizer = torch.optim.AdamW(source.parameters(), lr=1e-2)
    source(x).sum().backward()
    optimizer.step()
    sn.save(path, source, optimizer)
    with torch.device("meta"):
        model = sn.SparseMLP([64, 48, 10], density=0.2, block_size=16)
        mixed = nn.Sequential(sn.SparseLinear(64, 48, block_size=16))
    with pytest.raises(ValueError, match="before its optimizer is made when the model is on meta"):
        sn.load(path, model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    assert model[0].values.is_meta
    with pytest.raises(ValueError, match="save: 0.values must hold data, got a meta tensor"):
        sn.save(tmp_path / "b.safetensors", model)
    assert not (tmp_path / "b.safetensors").exists()
    sn.load(path, model)
    assert torch.equal(model(x), source(x))
    fresh = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sn.load(path, model, fresh)
    assert state_of(model, fresh) == state_of(source, optimizer)
    half = sn.SparseMLP([64, 48, 10], density=0.2, block_size=16, dtype=torch.bfloat16, device="meta")
    sn.load(path, half)
    assert half[0].values.dtype == half[1].bias.dtype == torch.bfloat16
    torch.testing.assert_close(half(x.bfloat16()).float(), source(x), rtol=0.05, atol=0.05)
    mixed.append(nn.Linear(48, 10))
    with pytest.raises(ValueError, match="model must be on meta as a whole or not at all, got 0.values there"):
        sn.load(path, mixed, strict=False)
