"""Policies, with numbers worked by hand."""

from dataclasses import dataclass

import pytest
import torch

import sparsenet as sn
from sparsenet.policies import POLICIES, Policy, block_squared_norms


class View:
    """A layer as a policy sees it, with fixed answers."""

    name = "hidden"

    def __init__(self, values):
        self.values = values

    def random(self, places):
        return places.float() / 10

    def random_places(self, count):
        return torch.arange(count)

    def gradient_squared_norms(self, places):
        return places.float() * 2


VALUES = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, -2.0]]])


def test_magnitude_is_the_squared_norm_of_a_block():
    assert block_squared_norms(VALUES).tolist() == pytest.approx([25.0, 4.0, 4.0])
    assert block_squared_norms(VALUES.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("policy", [sn.SET(), sn.RigL(), sn.GMP(), sn.Static()])
def test_the_smallest_blocks_leave(policy):
    assert policy.drop_scores(View(VALUES)).tolist() == pytest.approx([25.0, 4.0, 4.0])


def test_set_grows_at_random_and_rigl_by_gradient():
    places = torch.tensor([1, 4])
    assert sn.SET().grow_scores(View(VALUES), places).tolist() == pytest.approx([0.1, 0.4])
    assert sn.RigL().grow_scores(View(VALUES), places).tolist() == [2.0, 8.0]
    assert sn.RigL.needs_gradient and not sn.SET.needs_gradient
    assert (
        sn.SET().grow_places(View(VALUES), 3).tolist() == [0, 1, 2] and sn.RigL().grow_places(View(VALUES), 3) is None
    )


@pytest.mark.parametrize("policy", [sn.GMP(), sn.Static()])
def test_policies_that_grow_nothing_say_so(policy):
    with pytest.raises(ValueError, match=r"density must not increase: this policy grows nothing \(layer hidden\)"):
        policy.grow_scores(View(VALUES), torch.tensor([0]))


def test_drop_fraction_may_be_a_schedule():
    policy = sn.RigL(sn.Linear(0.4, 0.0, 100))
    assert policy.drop_fraction_at(50) == pytest.approx(0.2)
    assert sn.SET().drop_fraction_at(7) == 0.3
    assert sn.Static().drop_fraction_at(7) == 0.0


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_a_drop_fraction_outside_0_1_is_refused(value):
    with pytest.raises(ValueError, match=r"SET: drop_fraction must lie in \[0, 1\], got"):
        sn.SET(value)
    with pytest.raises(ValueError, match=r"at step 3"):
        sn.SET(lambda step: value).drop_fraction_at(3)
    with pytest.raises(ValueError):
        sn.SET(float("nan"))


def test_policies_are_found_by_name():
    assert {name: cls.__name__ for name, cls in POLICIES.items()} == {
        "static": "Static",
        "random": "Random",
        "set": "SET",
        "rigl": "RigL",
        "snfs": "SNFS",
        "mest": "MEST",
        "topkast": "TopKAST",
        "gmp": "GMP",
        "movement": "Movement",
        "granet": "GraNet",
        "acdc": "ACDC",
        "snip": "SNIP",
        "grasp": "GraSP",
        "synflow": "SynFlow",
        "taylor": "Taylor",
        "obd": "OBD",
        "fisher": "Fisher",
        "woodfisher": "WoodFisher",
        "cascade": "Cascade",
    }


@pytest.mark.parametrize(
    ("name", "exchanges", "follows_density", "grows", "scores_places", "largest_share"),
    [
        ("static", False, False, False, False, 0.0),
        ("set", True, False, True, False, 0.3),
        ("random", True, False, True, False, 0.3),
        ("rigl", True, False, True, True, 0.3),
        ("snfs", True, False, True, True, 0.3),
        ("mest", True, False, True, False, 0.3),
        ("topkast", True, False, True, False, 0.3),
        ("gmp", False, True, False, False, 0.05),
        ("movement", False, True, False, False, 0.05),
        ("granet", True, True, True, True, 0.3),
        ("acdc", False, True, True, True, 0.5),
        ("obd", True, False, True, True, 0.3),
        ("woodfisher", True, False, True, True, 0.3),
        ("cascade", True, False, True, True, 0.3),
    ],
)
def test_what_trainer_and_planner_ask(name, exchanges, follows_density, grows, scores_places, largest_share):
    policy = POLICIES[name]()
    assert (policy.exchanges, policy.follows_density, policy.grows()) == (exchanges, follows_density, grows)
    assert policy.scores_places() == scores_places
    assert policy.largest_share(0.3) == largest_share


def test_a_policy_is_a_class_and_a_line(monkeypatch):
    """Trainer and planner take a policy that they have never heard of by its attributes."""

    class Largest(Policy):
        """Drops the largest blocks, grows the first places."""

        def drop_scores(self, layer):
            return -block_squared_norms(layer.values)

        def grow_scores(self, layer, places):
            return -places.float()

    @dataclass(frozen=True)
    class Shrinking(Policy):
        """Only the density schedule moves it."""

        drop_fraction: float = 0.0
        exchanges, follows_density = False, True

        @classmethod
        def largest_share(cls, drop_fraction):
            return 0.5

    monkeypatch.setitem(POLICIES, "largest", Largest)
    monkeypatch.setitem(POLICIES, "shrinking", Shrinking)
    sizes, options = [64, 256, 10], {"density": 0.3, "block_size": 16, "batch_size": 32, "threads": 1}
    plans = {name: sn.plan(sizes, None, policy=name, **options) for name in POLICIES}
    assert plans["largest"].moments.keys() == plans["set"].moments.keys()
    assert (
        plans["largest"].moments["rewire of layer 0"] >= plans["set"].moments["rewire of layer 0"]
    )  # it scores places
    assert plans["static"].moments["optimizer step"] == plans["shrinking"].moments["optimizer step"]
    assert "rewire of layer 0" in plans["shrinking"].moments and "rewire of layer 0" not in plans["static"].moments
    config = sn.TrainConfig(epochs=2, batch_size=32, rewire_every=2, progress=False, threads=1)
    x, y = torch.rand(128, 64), torch.arange(128) % 10
    for name, rewired, kept in (("largest", True, True), ("shrinking", True, False), ("static", False, True)):
        object.__setattr__(config, "policy", name)  # its choices are those of when the module was loaded
        trainer = sn.Trainer(plans["set"], config)
        blocks = sum(layer.pattern.num_blocks for layer in trainer.model)
        assert (trainer.fit((x, y)).rewires > 0) == rewired
        assert (sum(layer.pattern.num_blocks for layer in trainer.model) == blocks) == kept
