"""``sparsenet compact`` and ``resize_to``: the smaller file loads again and computes the same; what is refused."""

import re
import sys

import pytest
import torch
from random_networks import random_network
from torch import nn

import sparsenet as sn
from sparsenet import cli
from sparsenet.checkpoint.saving import describe
from sparsenet.compaction.criteria import Magnitude, lowest


@pytest.fixture
def saved(tmp_path):
    """A network as ``sparsenet train`` leaves it: digits' sizes, eight units of the first layer without readers."""
    torch.manual_seed(0)
    model = sn.SparseMLP([64, 96, 48, 10], density=0.8, block_size=8)
    with torch.no_grad():
        model[1].values[model[1].pattern.col_indices.long() == 3] = 0
    extra = {"sizes": [64, 96, 48, 10], "mean": torch.tensor([4.9]), "std": torch.tensor([6.0])}
    sn.save(tmp_path / "model.safetensors", model, step=7, extra=extra)
    return tmp_path / "model.safetensors", model


def compact(*arguments):
    return cli.main(["compact", *map(str, arguments)])


def test_dead_units_leave_and_the_file_computes_the_same(saved, capsys):
    path, whole = saved
    assert compact(path.parent) == 0  # the folder of a run
    printed = capsys.readouterr().out
    out = path.with_name("model-compact.safetensors")
    contents = describe(out)
    assert contents.extra["sizes"] == [64, 88, 48, 10] and contents.step == 7
    model = sn.SparseMLP(contents.extra["sizes"], block_size=8)
    sn.load(out, model)
    x = torch.randn(5, 64)
    torch.testing.assert_close(model(x), whole(x))
    assert "96 -> 88" in printed and "8 unread; whole blocks" in printed and "largest change" in printed
    assert out.stat().st_size < path.stat().st_size
    assert compact(out, "--out", path.with_name("again.safetensors")) == 0


@pytest.mark.parametrize("criterion", ["magnitude", "rarely-active", "taylor"])
def test_criteria_and_accuracy(saved, capsys, criterion):
    pytest.importorskip("sklearn")
    path, _ = saved
    assert compact(path, "--data", "digits", "--criterion", criterion, "--share", "0.5") == 0
    printed = capsys.readouterr().out
    assert re.search(r"test accuracy +\d+\.\d\d% -> \d+\.\d\d% \(digits\)", printed)
    if criterion != "rarely-active":
        assert describe(path.with_name("model-compact.safetensors")).extra["sizes"] == [64, 48, 24, 10]


def test_the_runs_own_data_are_found(saved, capsys):
    pytest.importorskip("sklearn")
    path, _ = saved
    path.with_name("config.json").write_text('{"data": "digits"}')
    assert compact(path) == 0 and "(digits)" in capsys.readouterr().out
    path.with_name("config.json").write_text('{"data": "cifar100"}')  # not on this machine: no accuracy, no error
    assert compact(path) == 0 and "test accuracy" not in capsys.readouterr().out


MODELS = """
import torch, sparsenet as sn
def build():
    gate = sn.TriStateReLU(6, width_start=1.0)
    layers = [torch.nn.Conv2d(1, 6, 3), torch.nn.BatchNorm2d(6), gate, torch.nn.Flatten()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(216, 10))
nothing = 3
"""


def test_any_model_that_a_function_builds(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "built_here.py").write_text(MODELS)
    try:
        sys.path.insert(0, str(tmp_path))
        import built_here

        model = built_here.build()
        with torch.no_grad():
            model[2].width_gate[[0, 4]] = 0
        sn.save("conv.safetensors", model)
        assert compact("conv.safetensors", "--model", "built_here:build", "--data", "digits") == 0
        again = built_here.build()
        sn.resize_to(again, "conv-compact.safetensors")
        sn.load("conv-compact.safetensors", again)
        x = torch.randn(3, 1, 8, 8)
        torch.testing.assert_close(again.eval()(x), model.eval()(x))
        more = ("conv-compact.safetensors", "--model", "built_here:build", "--data", "digits", "--out", "b.safetensors")
        assert compact(*more) == 0
        capsys.readouterr()
        for builder in ("built_here:nothing", "built_here", "built_here:absent"):
            assert compact("conv.safetensors", "--model", builder) == 2
            assert "--model must be MODULE:CALLABLE that returns a torch module" in capsys.readouterr().err
        assert compact("conv.safetensors", "--model", "built_here:build") == 2
        assert "--data must name a data set, for a network that does not begin with" in capsys.readouterr().err
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("built_here", None)


def test_what_is_refused(saved, capsys, tmp_path):
    path, _ = saved
    cases = [
        ((path, "--out", path), "--out must be another file than the one that is read"),
        ((path, "--criterion", "taylor"), "--data must name a data set for the criterion taylor, got none"),
        ((path, "--criterion", "magnitude", "--share", "2"), "share must lie in [0, 1], got 2.0"),
        ((tmp_path / "absent.safetensors",), "absent.safetensors does not exist"),
        ((path, "--data", "cifar100"), "cifar100"),
    ]
    sn.save(tmp_path / "other.safetensors", nn.Sequential(nn.Linear(3, 2)))
    cases.append(
        ((tmp_path / "other.safetensors",), "must hold a network of sparsenet train, or --model must build it")
    )
    for arguments, message in cases:
        assert compact(*arguments) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["dense", "block_sparse", "mixed", "cnn"])
@pytest.mark.parametrize("seed", range(4))
def test_resize_to_then_load_gives_the_compacted_network(family, seed, tmp_path):
    model, x = random_network(100 + seed, family)
    fresh, _ = random_network(100 + seed, family)
    parameters = [id(p) for p in fresh.parameters()]
    sn.compact(model)
    sn.save(tmp_path / "small.safetensors", model)
    sn.resize_to(fresh, tmp_path / "small.safetensors")
    sn.load(tmp_path / "small.safetensors", fresh)
    assert [id(p) for p in fresh.parameters()] == parameters
    for training in (False, True):
        torch.testing.assert_close(fresh.train(training)(x), model.train(training)(x), rtol=0, atol=0)
    fresh(x).sum().backward()


def test_resize_to_refuses_another_model_and_changes_nothing(tmp_path):
    sn.save(tmp_path / "a.safetensors", nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)))
    model = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match=r"a.safetensors must hold 1.weight of 4 sizes, got none"):
        sn.resize_to(model, tmp_path / "a.safetensors")
    assert model[0].out_features == 4 and model[0].weight.shape == (4, 3)
    with pytest.raises(ValueError, match=r"must hold the layer '0' in blocks of 8"):
        sn.resize_to(nn.Sequential(sn.SparseLinear(3, 2, block_size=8, density=1.0)), tmp_path / "a.safetensors")


# --- groups of neighbours -------------------------------------------------------------------------------------------


def test_lowest_by_groups_by_hand():
    scores = torch.tensor([5.0, 0.0, 1.0, 1.0, 9.0, 0.0, 3.0])  # pairs: 5, 2, 9, and 3 alone
    free = torch.ones(7, dtype=torch.bool)
    assert lowest(scores, 0.5, free, 2).nonzero().flatten().tolist() == [2, 3, 6]
    free[3] = False  # its pair stays
    assert lowest(scores, 0.5, free, 2).nonzero().flatten().tolist() == [0, 1, 6]
    with pytest.raises(ValueError, match="group must be an integer >= 1, got 0"):
        Magnitude(0.5, 0)(_view())


def _view():
    view = type("View", (), {"removable": torch.ones(2, dtype=torch.bool)})()
    view.incoming = view.outgoing = lambda: torch.ones(2)
    return view
