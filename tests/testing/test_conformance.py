"""Every policy with every schedule, distribution, optimizer and mask in pairs, and what the checker reports.

The everyday part takes some of the combinations, so that every policy is there with and without element masks; all of
them run under ``slow``.
"""

import itertools

import pytest
import torch

import sparsenet as sn
from sparsenet import sparsifier
from sparsenet.optimizer_state import LayerMove
from sparsenet.policies import POLICIES
from sparsenet.testing import PROPERTIES, check_policy, conformance_table
from sparsenet.testing import __main__ as command
from sparsenet.testing.combinations import FACTORS, check_combination, combinations, is_allowed, pairwise

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = {"steps": 9, "every": 3}
ALL = combinations()


def name(combination: dict[str, str]) -> str:
    return "-".join(combination.values())


def everyday(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The first with each policy, with and without masks, and the first with any value that these lack."""
    seen, found = set(), []
    for row in rows:
        kind = row["policy"], row["elements"] == "blocks"
        if kind not in seen:
            seen |= {kind, *row.items()}
            found.append(row)
    for row in rows:
        if set(row.items()) - seen:
            seen |= set(row.items())
            found.append(row)
    return found


EVERYDAY = everyday(ALL)


@pytest.mark.parametrize("combination", EVERYDAY, ids=name)
def test_some_combinations(combination):
    check_combination(combination)


@pytest.mark.slow
@pytest.mark.parametrize("combination", [row for row in ALL if row not in EVERYDAY], ids=name)
def test_the_other_combinations(combination):
    check_combination(combination)


# --- what the combinations are ---


def test_every_pair_that_is_allowed_is_in_a_combination_and_no_other():
    items = [(factor, value) for factor, values in FACTORS.items() for value in values]
    wanted = {(a, b) for a, b in itertools.combinations(items, 2) if a[0] != b[0] and is_allowed(a, b)}
    covered = {pair for row in ALL for pair in itertools.combinations(row.items(), 2)}
    assert covered == wanted
    assert set(FACTORS["policy"]) > set(POLICIES)
    assert len({name(row) for row in ALL}) == len(ALL)


def test_the_everyday_combinations_have_every_value():
    assert {item for row in EVERYDAY for item in row.items()} == {
        (f, v) for f, values in FACTORS.items() for v in values
    }
    assert {(row["policy"], row["elements"] == "blocks") for row in EVERYDAY} == {
        (policy, masked) for policy in FACTORS["policy"] for masked in (True, False)
    }


def test_pairwise_by_hand():
    """Two factors have no smaller cover than all pairs; a forbidden pair is in none."""
    assert pairwise({"a": "01", "b": "01"}, lambda one, other: True) == [
        {"a": "0", "b": "0"},
        {"a": "0", "b": "1"},
        {"a": "1", "b": "0"},
        {"a": "1", "b": "1"},
    ]
    found = pairwise({"a": "01", "b": "01"}, lambda one, other: (one[1], other[1]) != ("0", "1"))
    assert {"a": "0", "b": "1"} not in found and len(found) == 3


# --- what the report says ---


def test_a_report_counts_by_hand():
    """24 + 24 + 24 + (24 - 5) + (24 - 8) + (24 - 11) + 8 steps; (6 + 6 + 2) rewires of 3 layers."""
    report = check_policy(sn.SET(0.25), model=lambda: sn.SparseMLP([16, 16, 16, 16], 0.75, 4))
    assert (report.policy, report.steps, report.rewires) == ("SET", 128, 42)
    assert report.dropped == report.grown == 14 * 3 * 3 and report.skipped == 0  # a quarter of 12 blocks
    assert set(report.properties) == set(PROPERTIES) - {"masks"}
    assert "masks" in check_policy(sn.SET, elements="2:4", **SHORT).properties


def test_a_model_data_and_an_optimizer_of_ones_own_and_torchs_generator_is_left_alone():
    model = torch.nn.Sequential(sn.SparseLinear(20, 24, density=0.5, block_size=4), torch.nn.Dropout(0.5))
    before, state = model[0].pattern, torch.get_rng_state()
    data = [(torch.ones(6, 20) * i, torch.zeros(6, 24)) for i in range(1, 3)]
    report = check_policy(sn.RigL(), model=model, data=data, optimizer=lambda p: torch.optim.Adagrad(p, 0.1), **SHORT)
    assert report.grown == report.dropped > 0
    assert model[0].pattern is before and torch.equal(torch.get_rng_state(), state)


def test_layers_that_are_skipped_are_counted_with_the_reason():
    """Without outputs that differ there is no gradient where there is no block."""
    zeros = [(torch.zeros(4, 20), torch.zeros(4, 24)), (torch.ones(4, 20), torch.zeros(4, 24))]
    model = torch.nn.Sequential(sn.SparseLinear(20, 24, density=0.5, block_size=4))
    report = check_policy(sn.RigL, model=model, data=zeros, **SHORT)
    assert 0 < report.skipped < report.rewires
    assert report.reasons == ("the gradient of every inactive place was zero",)


def test_frozen_layers_stay_and_are_not_counted():
    model = sn.SparseMLP([40, 40, 40, 10], 0.5, 4)
    model[1].values.requires_grad_(False)
    report = check_policy(sn.RigL, model=model, **SHORT)
    assert report.rewires == 2 * (3 + 3 + 2) and report.dropped == report.grown > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 5, "every": 2}, "steps must be at least three times every (2), got 5"),
        ({"every": 0}, "check_policy: every must be an integer >= 1, got 0"),
    ],
)
def test_bad_numbers_are_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        check_policy(sn.SET, **arguments)
    assert message in str(error.value)


def test_something_else_than_a_policy_is_refused():
    with pytest.raises(TypeError, match="check_policy: make_policy must be or make a sparsenet Policy, got 'set'"):
        check_policy(lambda: "set")


# --- the table ---


class Filling(LayerMove):
    """A move that forgets that what has grown starts at zero."""

    def __init__(self, layer, *arguments, **options):
        super().__init__(layer, *arguments, **options)
        layer.values.detach()[self.carried < 0] = 1e-3


def test_the_table_counts_by_policy_and_says_what_failed(monkeypatch):
    rows = [row for policy in ("static", "set") for row in ALL if row["policy"] == policy][:13:4]
    text = conformance_table(rows)
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    assert [line.split("|")[1].strip() for line in lines] == ["`static`", "`set`"]
    assert "✗" not in text and sum(int(line.split("|")[2].split()[1]) for line in lines) == 4
    monkeypatch.setattr(sparsifier, "LayerMove", Filling)
    text = conformance_table([row for row in ALL if (row["policy"], row["elements"]) == ("set", "blocks")][:1])
    assert "✗" in text and "values of grown units must be zero" in text


def test_the_command_writes_the_page(tmp_path, monkeypatch, capsys):
    rows = [row for row in ALL if row["policy"] == "set"][:1]
    monkeypatch.setattr(command, "combinations", lambda: rows)
    monkeypatch.setattr("sys.argv", ["python -m sparsenet.testing", "--policies", str(tmp_path / "page.md")])
    command.main()
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert text.startswith("# Results: conformance") and "In 1 combinations" in text and "| `set` | ✓ 1 |" in text
    assert capsys.readouterr().out == f"1 of 1: {', '.join(rows[0].values())}: holds\n"


def test_the_command_without_a_file_checks_the_operations(monkeypatch, capsys):
    monkeypatch.setattr(command, "self_test", lambda: 7)
    monkeypatch.setattr("sys.argv", ["python -m sparsenet.testing"])
    command.main()
    isa = sn.build_info()["isa"]
    assert capsys.readouterr().out == f"sparsenet self test: 7 cases right with {isa}\n"
