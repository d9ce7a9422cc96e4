"""The cases of bench/gpu_check.py in their time budget, and the file that is whole after every one of them."""

from __future__ import annotations

import cuda_emulated as emulated
import pytest


@pytest.fixture(autouse=True)
def bench_folder(monkeypatch):
    monkeypatch.syspath_prepend(str(emulated.ROOT / "bench"))


class Clock:
    """Moves on by what cases say they take."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def made(clock: Clock, name: str, kind: str, seconds: float, **result):
    from gpu_cases import Case

    def run() -> dict:
        clock.now += seconds
        if "error" in result:
            raise RuntimeError(result["error"])
        return {"passed": True, **result}

    return Case(name, kind, run)


def test_a_case_is_not_begun_when_its_kind_takes_longer_than_what_is_left(tmp_path):
    from gpu_cases import Journal, read, run_cases

    clock, out = Clock(), tmp_path / "report.json"
    cases = [made(clock, f"long {i}", "long", 4.0) for i in range(3)] + [made(clock, "short", "short", 1.0)]
    assert run_cases(Journal(out, "bench"), cases, 10.0, clock=clock)
    part = read(out)["parts"]["bench"]
    assert [(c["name"], c["seconds"]) for c in part["cases"]] == [("long 0", 4.0), ("long 1", 4.0), ("short", 1.0)]
    assert part["left_out"] == [{"name": "long 2", "reason": "no time left"}] and part["running"] is None


def test_a_failing_case_is_recorded_and_the_next_one_runs(tmp_path):
    from gpu_cases import Journal, failures, read, run_cases

    clock, out = Clock(), tmp_path / "report.json"
    cases = [made(clock, "bad", "a", 1.0, error="the launch failed"), made(clock, "good", "a", 1.0, figure=3)]
    assert run_cases(Journal(out, "correct"), cases, 10.0, clock=clock)
    part = read(out)["parts"]["correct"]
    assert failures(part) == ["bad: RuntimeError: the launch failed"]
    assert part["cases"][1] == {"name": "good", "kind": "a", "seconds": 1.0, "passed": True, "figure": 3}


def test_a_lost_device_ends_the_process_and_the_next_one_goes_on_behind_it(tmp_path):
    from gpu_cases import Journal, read, run_cases

    clock, out = Clock(), tmp_path / "report.json"
    fatal = [made(clock, f"fatal {i}", "a", 1.0, error="illegal address") for i in range(3)]
    cases = [made(clock, "first", "a", 1.0), *fatal, made(clock, "last", "b", 1.0)]
    for _ in range(2):
        assert not run_cases(Journal(out, "correct"), cases, 10.0, lambda: False, clock)
    assert run_cases(Journal(out, "correct"), cases, 10.0, lambda: False, clock)
    part = read(out)["parts"]["correct"]
    assert [c["name"] for c in part["cases"]] == ["first", "fatal 0", "fatal 1", "last"]
    assert [c.get("fatal", False) for c in part["cases"]] == [False, True, True, False]
    assert part["left_out"] == [{"name": "fatal 2", "reason": "others of its kind cost their process"}]


def test_the_file_is_whole_while_a_case_runs_and_names_it(tmp_path):
    from gpu_cases import Case, Journal, read, run_cases

    out, seen = tmp_path / "report.json", []
    cases = [Case(name, "a", lambda: seen.append(read(out)["parts"]["bench"]) or {}) for name in ("one", "two")]
    run_cases(Journal(out, "bench"), cases, 10.0)
    assert [part["running"]["name"] for part in seen] == ["one", "two"]
    assert [[c["name"] for c in part["cases"]] for part in seen] == [[], ["one"]]
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    journal = Journal(out, "bench")
    journal.begin(Case("three", "a", dict))
    Journal(out, "bench").bury("its process ended: exit status -11", 2.0)
    last = read(out)["parts"]["bench"]["cases"][-1]
    assert last == {
        **{"name": "three", "kind": "a", "seconds": 2.0, "passed": False, "fatal": True},
        "error": "its process ended: exit status -11",
    }
