"""The benchmark code: right ratios, right contenders, files and pictures. No test depends on how fast anything is."""

import itertools
import json
import time

import pytest
import torch

import sparsenet as sn
from sparsenet import cli, reference
from sparsenet.benchmark import cases, goals, linear, machine, operations, results, timing
from sparsenet.benchmark.cases import Case
from sparsenet.benchmark.goals import Goal, eff_goal
from sparsenet.benchmark.rivals import RIVALS, Operands
from sparsenet.benchmark.timing import Contender, Quartiles, Race, Timings
from sparsenet.benchmark.trial import Row, Trial

TINY = Case((96, 64), batch=20, density=0.3, block_size=16)
QUICK = ["bench", "--sizes", "96x64", "--batch", "20", "--block", "16", "--seconds", "0.001", "--threads", "1"]


def sparsenet(*arguments):
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread, short samples, little rotation."""
    torch.set_num_threads(1)
    monkeypatch.setattr(timing, "_SAMPLE_SECONDS", 1e-6)
    monkeypatch.setattr(timing, "last_level_cache_bytes", lambda: 1 << 16)
    known = machine.Ceilings({"float32": 100.0, "bfloat16": 200.0}, 10.0)
    monkeypatch.setattr(machine, "ceilings", lambda: known)


# --- the measuring core ---


def test_quartiles_and_ratios_by_hand():
    timings = Timings({"ours": [1.0, 2.0, 4.0, 1.0, 2.0], "dense": [10.0, 10.0, 10.0, 30.0, 2.0]})
    assert timings.rounds == 5
    assert timings.time("ours") == Quartiles(2.0, 1.0, 2.0)
    assert timings.ratio("dense", "ours") == Quartiles(5.0, 2.5, 10.0), "of 10, 5, 2.5, 30 and 1, each round's own"
    assert Quartiles(2.0, 1.0, 3.0).scaled(10) == Quartiles(20.0, 10.0, 30.0)


def test_a_race_calls_everyone_in_every_round_and_moves_the_order_on():
    called = []
    contenders = {name: Contender(lambda name=name: (called.append(name), time.sleep(1e-4))) for name in "abc"}
    race = Race(contenders, seconds=1e-9)
    assert race.subject == "a" and race.rounds == 5 and set(race.calls.values()) == {1}
    called.clear()
    timings = race.run()
    rounds = [called[i : i + 3] for i in range(0, len(called), 3)]
    assert rounds == [["c", "b", "a"], ["b", "c", "a"]] * 2 + [["c", "b", "a"]]
    assert timings.rounds == 5 and all(min(timings.seconds[name]) > 1e-4 for name in "abc")


def test_short_calls_are_repeated_and_long_races_have_more_rounds(monkeypatch):
    monkeypatch.setattr(timing, "_SAMPLE_SECONDS", 2e-3)
    counts = {"quick": 0, "slow": 0}

    def call(name, seconds):
        counts[name] += 1
        time.sleep(seconds)

    race = Race({"quick": Contender(lambda: call("quick", 2e-4)), "slow": Contender(lambda: call("slow", 5e-3))}, 0.1)
    assert race.calls["slow"] == 1 and 2 <= race.calls["quick"] <= 10
    assert 5 <= race.rounds <= 20
    counts.update(quick=0, slow=0)
    timings = race.run()
    assert counts == {"quick": race.rounds * race.calls["quick"], "slow": race.rounds}
    assert timings.time("quick").median < 2e-3, "per call, not per sample"
    assert race.timings([1.0]).seconds["quick"] == [1.0 / race.calls["quick"]]


def test_what_is_done_before_a_sample_is_not_timed():
    order = []
    slow_before = Contender(lambda: order.append("call"), before=lambda: (order.append("before"), time.sleep(2e-3)))
    timings = Race({"a": Contender(lambda: None), "b": slow_before}, 1e-9).run()
    assert timings.time("b").upper < 1e-3
    assert order[:2] == ["before", "call"]


def test_rotation_visits_every_set_and_passes_the_cache():
    seen = []
    call = timing.rotated([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(7):
        call()
    assert seen == [0, 1, 2, 0, 1, 2, 0]
    assert timing.rotations(1 << 12) == 32 and timing.rotations(1 << 20) == 1 and timing.rotations(1) == 64


def test_torchs_threads_are_what_they_were():
    seen = []
    trial = Trial("op", "phase", {}, {"sparsenet": Contender(lambda: seen.append(torch.get_num_threads()))},
                  lambda timings: {}, threads=2)  # fmt: skip
    trial.run(1e-9)
    assert set(seen) == {2} and torch.get_num_threads() == 1


def test_the_ceilings_are_measured():
    found = machine._ceilings.__wrapped__(1, sn.build_info()["isa"], 0.02)
    assert 0.1 < found.copy_gbytes < 2000
    assert found.fma_gflops is None or 0.5 < found.fma_gflops["float32"] < 1000
    assert machine.Ceilings({"float32": 100.0}, 10.0).roofline_seconds("float32", 1e9, 1e9) == 0.1, "traffic decides"
    assert machine.Ceilings({"float32": 100.0}, 10.0).roofline_seconds("float32", 1e11, 1e9) == 1.0
    assert machine.Ceilings(None, 10.0).roofline_seconds("float32", 1e9, 1e9) is None


def test_a_machine_without_a_compiler_has_no_roofline(monkeypatch, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'no such target' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.warns(UserWarning, match="bench: no roofline, .* failed: no such target"):
        assert machine._fma_gflops(1, "portable", 0.01) is None


def test_the_machine_is_described_without_its_name():
    import socket

    text = json.dumps(machine.describe())
    assert socket.gethostname() not in text and str(sn.__file__) not in text
    assert sn.build_info()["isa"] in text and torch.__version__ in text


# --- patterns and goals ---


@pytest.mark.parametrize("kind", [kind for kind in cases.PATTERNS if kind not in ("rigl", "lone_row")])
@pytest.mark.parametrize("density", [0.05, 0.1, 0.5, 1.0])
def test_patterns_have_the_density_asked_for(kind, density):
    pattern = cases.make_pattern(kind, (640, 480), density, 16)
    if kind == "empty_rows":
        density = min(2 * density, 1.0) / 2
    least = 1 / 40 if kind == "full_row" else 0.0
    assert pattern.density == pytest.approx(max(density, least), abs=0.01)


def test_patterns_are_what_they_are_called():
    def rows(kind):
        return cases.make_pattern(kind, (640, 480), 0.1, 16).to_mask().sum(1)

    power = rows("power_law").sort(descending=True).values
    assert power[0] > 8 * power[20] > 0 and (rows("power_law") != power).any()
    assert (rows("empty_rows")[1::2] == 0).all() and (rows("empty_rows")[::2] == 6).all()
    assert rows("full_row")[20] == 30 and rows("full_row").sum() == 120
    assert rows("lone_row").tolist() == [0] * 20 + [30] + [0] * 19


def test_a_pattern_of_a_real_run(monkeypatch):
    monkeypatch.setattr(cases, "_RIGL_STEPS", 20)
    monkeypatch.setattr(cases.data, "load", lambda name: sn.data.datasets._digits())
    shape, density = (128, 160), 0.2
    learned = cases.PATTERNS["rigl"](shape, density, 16)
    assert learned.shape == shape and learned.density == pytest.approx(density, abs=0.01)
    assert learned == cases.PATTERNS["rigl"](shape, density, 16), "the same every time"
    monkeypatch.setattr(cases, "_RIGL_STEPS", 1)
    assert learned != cases.PATTERNS["rigl"](shape, density, 16), "it was rewired"


@pytest.mark.parametrize(
    ("phase", "case", "isa", "expected"),
    [
        ("forward", Case(), "avx512", 1.15 / (1 + 45 / 409.6)),
        ("forward", Case(block_size=16), "avx512", 0.92 * 1.15 / (1 + 45 / 409.6)),
        ("forward", Case((4096, 1024)), "avx512bf16", None),  # 0.4 GFLOP
        ("grad_input", Case((8192, 2048)), "avx512", 1.15 / (1 + 45 / 204.8)),
        ("grad_weight", Case(), "avx512", 1.10),
        ("grad_weight", Case(block_size=16), "avx2", 0.9 * 1.05),
        ("grad_weight", Case((8192, 8192), density=0.02), "avx512", None),
        ("forward", Case(dtype="bfloat16"), "avx512bf16", 0.90),
        ("forward", Case(dtype="bfloat16"), "avx512", None),
        ("step", Case(), "avx512", None),
        ("forward", Case(), "portable", None),
    ],
)  # fmt: skip
def test_goals_of_eff(phase, case, isa, expected):
    found = eff_goal(phase, case, case.density, isa)
    assert found is None if expected is None else found.value == pytest.approx(expected) and found.metric == "eff"


def test_other_goals():
    assert eff_goal("forward", Case(batch=8), 0.1, "avx512") == Goal("copy_share", 0.80)
    assert eff_goal("forward", Case(batch=16), 0.1, "avx512") == Goal("copy_share", 0.65)
    assert goals.norms_goal(Case()).value == 0.35 and goals.norms_goal(Case(batch=513)).value == 1.1
    assert Goal("x", 2.0).met(2.0) and not Goal("x", 2.0).met(1.9) and str(Goal("x", 2.0)) == ">= 2"
    assert Goal("x", 2.0, at_most=True).met(1.9) and not Goal("x", 2.0, at_most=True).met(2.1)


# --- contenders compute what they are said to ---


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("phase", linear.PHASES)
def test_rivals_compute_the_phase(name, phase):
    operands = Operands(TINY, copies=1)
    try:
        result = RIVALS[name](phase, TINY, operands).call()
    except linear.Unavailable as reason:
        assert str(reason)
        assert name in ("sparselab", "torch_bsr", "dense_onednn")
        return
    got = list(result) if isinstance(result, (list, tuple)) else [result]
    x, grad = operands.x[0], operands.grad[0]
    weight = torch.randn(TINY.shape, generator=torch.Generator().manual_seed(2))
    mask = TINY.block_pattern().to_mask().repeat_interleave(16, 0).repeat_interleave(16, 1).float()
    if name == "masked_dense":
        weight = weight * mask
    full = {"forward": [x @ weight.T], "grad_input": [grad @ weight], "grad_weight": [grad.T @ x]}
    if name == "masked_dense":
        full["grad_weight"] = [full["grad_weight"][0] * mask]
    full["step"] = full["grad_input"] + full["grad_weight"]
    if name == "dense_onednn" and phase == "step":
        full["step"] = full["forward"] + full["step"]
    if name in ("dense", "dense_onednn", "masked_dense"):
        for a, b in zip(got, full[phase], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    elif name == "torch_bsr":
        wanted = {"forward": (20, 96), "grad_input": (20, 64)}[phase]
        assert got[0].shape == wanted and got[0].count_nonzero() > 0
    elif name == "equal_parameter_dense":
        sizes = {"forward": 96, "grad_input": 64}
        share = TINY.block_pattern().density ** 0.5
        assert phase not in sizes or got[0].shape == (20, round(sizes[phase] * share))


def test_bsr_is_the_product_of_its_blocks():
    operands = Operands(TINY, copies=1)
    generator = torch.Generator().manual_seed(1)  # as Operands draws: x, grad, then the values
    x, grad = torch.randn(20, 64, generator=generator), torch.randn(20, 96, generator=generator)
    pattern = TINY.block_pattern()
    values = torch.randn(pattern.num_blocks, 16, 16, generator=generator)
    y = RIVALS["torch_bsr"]("forward", TINY, operands).call()
    torch.testing.assert_close(y, reference.block_sparse_linear(x, values, pattern), rtol=1e-4, atol=1e-4)
    assert grad.equal(operands.grad[0])


@pytest.mark.parametrize("phase", linear.PHASES)
def test_our_contender_is_the_operation(phase):
    trial = linear.trial(phase, TINY)
    result = trial.contenders["sparsenet"].call()
    got = list(result) if isinstance(result, (list, tuple)) else [result]
    pattern = TINY.block_pattern()
    shapes = {"forward": [(20, 96)], "grad_input": [(20, 64)], "grad_weight": [(pattern.num_blocks, 16, 16)]}
    shapes["step"] = shapes["grad_input"] + shapes["grad_weight"]
    assert [tuple(t.shape) for t in got] == shapes[phase]


def test_metrics_by_hand():
    trial = linear.trial("forward", Case((96, 64), batch=20, density=0.5, block_size=16), ())
    pattern = trial.case["density"]
    times = Timings({"sparsenet": [1e-6, 1e-6, 1e-6], "dense": [1e-6, 4e-6, 3e-6]})
    metrics = trial.derive(times)
    assert metrics["eff"] == pytest.approx(3 * pattern)
    assert metrics["active_gflops"] == pytest.approx(2 * 20 * 12 * 16 * 16 / 1e3)
    traffic = 4 * (12 * 256 + 20 * 64 + 20 * 96)
    assert metrics["roofline_share"] == pytest.approx(max(2 * 20 * 12 * 256 / 100, traffic / 10) * 1e-9 / 1e-6)


def test_small_batches_race_a_plain_copy():
    trial = linear.trial("forward", Case((96, 64), batch=4, density=0.5, block_size=16))
    assert "copy" in trial.contenders and trial.goal == Goal("copy_share", 0.80)
    row = trial.run(1e-9)
    assert row.metrics["copy_share"] > 0 and row.met in (True, False)


@pytest.mark.parametrize(
    ("phases", "make"),
    [
        (operations.NORMS_PHASES, operations.norms_trial),
        (operations.PATTERN_PHASES, operations.pattern_trial),
        (operations.COMPACT_PHASES, operations.compact_trial),
    ],
)
def test_other_operations_run(phases, make):
    for phase in phases:
        row = make(phase, TINY).run(1e-9)
        assert row.phase == phase and row.times["sparsenet"].median > 0 and row.metrics
        json.dumps(row.to_dict())


def test_norms_are_timed_against_their_own_result():
    trial = operations.norms_trial("norms", TINY)
    ours, theirs = (trial.contenders[name].call() for name in ("sparsenet", "dense_then_norms"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    dense = trial.contenders["dense"].call()
    assert dense.shape == TINY.shape


def test_unknown_phases_and_rivals():
    with pytest.raises(ValueError, match="bench: phase must be one of forward, .*, got 'sideways'"):
        linear.trial("sideways", TINY)
    with pytest.raises(ValueError, match="bench: rival must be one of dense, .*, got 'magic'"):
        linear.trial("forward", TINY, ("magic",))


# --- results ---


def row(density=0.1, ours=1.0, dense=4.0, goal=None, **changes):
    case = Case((96, 64), density=density, block_size=16).fields()
    times = {"sparsenet": Quartiles(ours, ours, ours), "dense": Quartiles(dense, dense, dense)}
    speedup = Quartiles(dense / ours, dense / ours, dense / ours)
    fields = dict(
        op="block_sparse_linear", phase="forward", case=case, times=times, reference="dense",
        speedups={"sparsenet": speedup}, metrics={"eff": density * dense / ours}, goal=goal, rounds=5,
        date="2026-01-01T00:00Z",
    )  # fmt: skip
    return Row(**(fields | changes))


def test_files_keep_everything(tmp_path):
    path = tmp_path / "new" / "a.json"
    written = results.Results.of([row(goal=Goal("eff", 0.3)), row(0.2, left_out={"sparselab": "not installed"})])
    written.write(path)
    again = results.read(path)
    assert again == written
    fields = json.loads(path.read_text())
    assert fields["format"] == 1 and fields["rows"][0]["met"] is True and fields["rows"][1]["met"] is None
    assert fields["machine"]["isa"] == sn.build_info()["isa"]


def test_newer_rows_replace_older_ones_of_the_same_machine():
    older = results.Results.of([row(0.1), row(0.2)])
    newer = results.Results.of([row(0.2, ours=2.0), row(0.3)])
    merged = newer.merged_into(older)
    assert [(r.case["density"], r.times["sparsenet"].median) for r in merged.rows] == [
        (0.1, 1.0),
        (0.2, 2.0),
        (0.3, 1.0),
    ]
    elsewhere = results.Results({**older.machine, "cpu": "another"}, older.ceilings, older.rows)
    assert newer.merged_into(elsewhere) is newer


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "rows": [{}]}', "nonsense"])
def test_other_files_are_refused(tmp_path, capsys, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    assert sparsenet("bench", "--compare", path, path) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"bench: {path} must be a file that sparsenet bench wrote" in err


def test_newer_files_are_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match=r"a.json must have format 1 or older, got 99"):
        results.read(tmp_path / "a.json")


def test_crossover_by_hand():
    assert results.crossover([(0.1, 4.0), (0.4, 1.0), (0.9, 0.5)]) == pytest.approx(0.4)
    assert results.crossover([(0.25, 2.0), (1.0, 0.5)]) == pytest.approx(0.5), "on a straight line of logarithms"
    assert results.crossover([(0.1, 4.0), (1.0, 1.1)]) is None
    shown = results.crossovers([row(0.1), row(1.0, ours=3.0)])
    assert list(shown.values()) == ["none: 1.33x at 100%"]
    assert list(results.crossovers([row(0.1)]).values()) == ["above 10%"]
    assert list(results.crossovers([row(0.1, ours=5.0)]).values()) == ["below 10.0%"]
    assert list(results.crossovers([row(0.25, ours=2.0), row(1.0, ours=8.0)]).values()) == ["50%"]


def test_the_table_shows_goals_and_rivals():
    rival = {"speedups": {"sparsenet": Quartiles(4, 3, 5), "torch_bsr": Quartiles(0.5, 0.5, 0.5)}}
    times = {name: Quartiles(1, 1, 1) for name in ("sparsenet", "dense", "torch_bsr")}
    text = results.table([row(goal=Goal("eff", 0.3)), row(0.2, goal=Goal("eff", 9.0), times=times, **rival)])
    head, first, second = text.splitlines()
    assert "torch_bsr" in head and first.split()[-1] == "-" and second.split()[-1] == "0.50"
    assert ">= 0.3" in first and "met" in first and "missed" in second


# --- the command ---


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    path = tmp_path / "out.json"
    assert sparsenet(*QUICK, "--density", "0.1,0.3", "--dtype", "float32", "bfloat16", "--json", path) == 0
    out, _ = capsys.readouterr()
    assert "crossover density" in out and f"written: {path}" in out
    found = results.read(path)
    assert {r.phase for r in found.rows} == set(linear.PHASES)
    assert {r.case["dtype"] for r in found.rows} == {"float32", "bfloat16"}
    assert {round(r.case["density"], 1) for r in found.rows} >= {0.1, 0.3, 1.0}
    for r in found.rows:
        assert (r.case["out"], r.case["in"], r.case["batch"], r.case["threads"]) == (96, 64, 20, 1)
        assert r.speedups["sparsenet"].median > 0 and r.metrics["eff"] > 0


def test_the_other_operations_from_the_command_line(tmp_path, capsys):
    ops = ["block_gradient_squared_norms,block_pattern", "compact_blocks"]
    assert sparsenet(*QUICK, "--op", *ops, "--json", tmp_path / "a.json") == 0
    assert {r.op for r in results.read(tmp_path / "a.json").rows} == {*ops[0].split(","), ops[1]}
    assert "crossover" not in capsys.readouterr().out


def test_results_go_to_runs_by_default(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sparsenet(*QUICK, "--phase", "forward", "--no-crossover") == 0
    (path,) = (tmp_path / "runs").iterdir()
    assert path.name in capsys.readouterr().out and len(results.read(path).rows) == 1


def test_the_plot_is_drawn(tmp_path):
    path = tmp_path / "a.json"
    options = ["--phase", "forward,step", "--density", "0.1,0.5", "--no-crossover", "--plot"]
    assert sparsenet(*QUICK, *options, "--json", path) == 0
    picture = (tmp_path / "a.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 10_000
    measured = {name for r in results.read(path).rows for name in r.times}
    assert {"masked_dense", "equal_parameter_dense", "torch_bsr"} <= measured


def test_two_files_are_compared(tmp_path, capsys):
    for name, rows in (("a", [row(0.1), row(0.2)]), ("b", [row(0.1, ours=0.5), row(0.3)])):
        results.Results.of(rows).write(tmp_path / f"{name}.json")
    assert sparsenet("bench", "--compare", tmp_path / "a.json", tmp_path / "b.json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].split()[-2:] == ["0.500", "2.000"]
    results.Results.of([row(0.7)]).write(tmp_path / "b.json")
    assert sparsenet("bench", "--compare", tmp_path / "a.json", tmp_path / "b.json") == 2
    assert "bench: the compared files must have a row in common, got none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "64"], "sizes must be OUTxIN such as 2048x2048, got '64'"),
        (["--sizes", "0x64"], "bench: sizes must be at least 1, got 0x64"),
        (["--op", "dance"], "op must be one of block_sparse_linear, "),
        (["--dtype", "int8"], "bench: dtype must be one of float32, bfloat16, float16, float64, got 'int8'"),
        (["--batch", "0"], "bench: batch must be at least 1, got 0"),
        (["--density", "0.1,2"], "bench: density must lie in (0, 1], got 2.0"),
        (["--pattern", "paisley"], "bench: pattern must be one of uniform, "),
        (["--block", "5"], "BlockPattern: block_size must be one of"),
        (["--phase", "sideways"], "bench: phase must be one of forward, "),
        (["--rivals", "magic"], "bench: rival must be one of dense, "),
        (["--seconds", "0"], "bench: threads and seconds must be positive, got --seconds 0.0"),
        (["--threads", "-1"], "bench: threads and seconds must be positive, got --threads -1"),
        (["--compare", "/no/such", "/no/such"], "No such file"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert sparsenet("bench", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert list(tmp_path.iterdir()) == []


def test_interrupted_measurements_are_kept(tmp_path, monkeypatch, capsys):
    runs = itertools.count()
    original = Trial.run

    def run(self, *arguments, **keywords):
        if next(runs) == 2:
            raise KeyboardInterrupt
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(Trial, "run", run)
    assert sparsenet(*QUICK, "--no-crossover", "--json", tmp_path / "a.json") == 0
    assert "interrupted" in capsys.readouterr().out and len(results.read(tmp_path / "a.json").rows) == 2
