"""``sparsenet reproduce policies`` on made data: the arms keep their promises, a run goes on, the tables are made."""

import json

import pytest
from made_images import write_idx

from sparsenet import cli
from sparsenet.policies import POLICIES
from sparsenet.reproduce import policies, policies_cost
from sparsenet.reproduce.growth_cells import Growth
from sparsenet.reproduce.policies_tables import tables


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Fashion-MNIST of 10 x 10 pixels."""
    folder = tmp_path_factory.mktemp("data")
    write_idx(folder / "fashion-mnist")
    return folder


def test_every_policy_is_an_arm():
    made = set()
    for recipe in policies.ARMS["policies"].values():
        for make in (recipe.policy, recipe.at_start):
            if make is not None:
                given = [(None, None)] if make is recipe.at_start else 0.3
                try:
                    made.add(type(make(given)).__name__)
                except TypeError:  # SynFlow's arm takes an image of the first batch
                    made.add("SynFlow")
    assert {kind.__name__ for kind in POLICIES.values()} - {"Static", "SNIP", "GraSP"} <= made


@pytest.mark.parametrize(
    ("part", "arm"),
    [
        ("policies", "GMP, global"),
        ("policies", "SNIP at the start, then RigL"),
        ("sparser", "AC/DC"),
        ("elements", "elements, GraNet"),
        ("elements", "2:4, elements by RigL"),
        ("elements", "their blocks, RigL"),
    ],
)
def test_an_arm_ends_with_the_weights_it_should_have(part, arm, data_dir, tmp_path):
    recipe = policies.ARMS[part][arm]
    task = Growth(tmp_path, str(data_dir), scale=0.02).images("fashion-mnist")
    model = policies.build(recipe, task, 0)
    row = policies.train(recipe, task, 0, epochs=1)
    places = sum(layer.pattern.shape[0] * layer.pattern.shape[1] for layer in model)
    expected = recipe.stored * (0.5 if recipe.elements == "2:4" else recipe.elements or 1)
    assert abs(row["weights"] / places - expected) < 0.15 * expected + 0.002 and 0 <= row["score"] <= 100


def test_a_run_goes_on_and_makes_its_tables(data_dir, tmp_path, capsys, monkeypatch):
    for part, arms in policies.ARMS.items():
        first = dict(list(arms.items())[:3])
        monkeypatch.setitem(policies.ARMS, part, first)
    command = ["reproduce", "policies", "--data-dir", str(data_dir), "--out", str(tmp_path), "--scale", "0.02"]
    assert cli.main([*command, "--parts", "policies,elements,candidates"]) == 0
    said = capsys.readouterr().out
    assert "| SET |" in said or "| random |" in said
    assert "### Elements inside stored blocks" in said and "over static" in said
    rows = json.loads((tmp_path / "policies.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == list(policies.ARMS["policies"])
    (tmp_path / "policies.json").unlink()
    monkeypatch.setattr(policies, "train", None)  # kept trainings are not trained again
    assert cli.main([*command, "--parts", "policies"]) == 0


def test_costs_of_a_small_network(tmp_path, monkeypatch):
    monkeypatch.setattr(policies_cost, "ROUNDS", 3)
    monkeypatch.setattr(policies_cost, "NETWORKS", dict(list(policies_cost.NETWORKS.items())[:1]))
    found = policies_cost.costs(Growth(tmp_path, scale=0.02))
    assert [row["policy"] for row in found["rows"]] == list(policies_cost.POLICIES)
    assert all(row["ratio"] > 0 and row["peak_bytes"] > 0 for row in found["rows"])
    text = tables({"cost": {**found, "wall_seconds": 1.0, "cpu_seconds": 1.0}})
    assert "### What a rewire costs" in text and "| SET |" in text and "+0.0%" in text
