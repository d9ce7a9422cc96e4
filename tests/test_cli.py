import dataclasses
import importlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sparsenet as sn
from sparsenet import cli
from sparsenet.commands import doctor
from sparsenet.commands.config_flags import config_of
from sparsenet.training import comparison, job

SMALL = ["--data", "digits", "--hidden", "96", "80", "--density", "0.4", "--block-size", "16", "--batch-size", "32"]
QUICK = [*SMALL, "--epochs", "2", "--rewire-every", "10", "--dense-steps", "0", "--threads", "1"]


def sparsenet(*arguments):
    """Exit status of one command."""
    try:
        return cli.main(list(arguments))
    except SystemExit as end:
        return end.code


def assert_one_line(capsys, *parts):
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\n") and err.count("\n") == 1
    assert all(part in err for part in parts), err


# --- train ---


def test_train_writes_its_folder_and_reports(tmp_path, capsys):
    assert sparsenet("train", *QUICK, "--out", str(tmp_path)) == 0
    out, _ = capsys.readouterr()
    folder = tmp_path / "digits"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "model.safetensors", "summary.json",
        "learning.png", "density.png", "rewiring.png", "patterns.png", "memory.png",
    }  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    for key in (
        "test_accuracy", "parameters_active", "density", "predicted_peak_bytes", "measured_peak_bytes",
        "seconds_per_step", "dense_seconds_per_step", "seconds_total", "rewires",
    ):  # fmt: skip
        assert key in summary
    model = sn.SparseMLP(summary["sizes"], block_size=16)
    found = sn.load(folder / "model.safetensors", model)
    assert summary["test_accuracy"] > 0.5
    test = sn.data.load("digits")
    x = (test.test_x.flatten(1).float() - found.extra["mean"]) / found.extra["std"]
    right = (model(x).argmax(1) == test.test_y).float().mean().item()
    assert right == pytest.approx(summary["test_accuracy"], abs=1e-6), "the file is all that is needed"
    active = sum(layer.num_active + layer.bias.numel() for layer in model)
    assert summary["parameters_active"] == active < summary["parameters_dense"] == 64 * 96 + 96 * 80 + 80 * 10 + 186
    assert summary["density"] == pytest.approx(summary["rewires"] and 0.0 + summary["density"])
    for line in (
        "test accuracy",
        "layer 0",
        "peak memory",
        "predicted",
        "measured",
        "time per step",
        "rewires",
        "files",
    ):
        assert line in out
    assert len(job.report(summary).splitlines()) < 24, "one screen"
    assert sn.TrainConfig.from_dict(json.loads((folder / "config.json").read_text())).hidden == (96, 80)


def test_runs_are_numbered_and_named(tmp_path, capsys):
    quickest = [*QUICK, "--epochs", "1", "--no-plots", "--no-progress", "--validation", "0", "--out", str(tmp_path)]
    for _ in range(2):
        assert sparsenet("train", *quickest) == 0
    assert sparsenet("train", *quickest, "--name", "mine") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits", "digits-2", "mine"]
    assert "validation" not in job.report(json.loads((tmp_path / "mine" / "summary.json").read_text()))
    capsys.readouterr()
    assert sparsenet("train", *quickest, "--name", "mine") == 2
    assert_one_line(capsys, "train: name must be of a new run, got", "--resume")


def test_training_interrupted_by_ctrl_c_resumes(tmp_path, capsys):
    long = [*SMALL, "--epochs", "30", "--rewire-every", "10", "--threads", "1", "--log-every", "1", "--no-plots"]
    command = [sys.executable, "-m", "sparsenet", "train", *long, "--dense-steps", "0", "--out", str(tmp_path)]
    root = Path(sn.__file__).resolve().parent.parent
    child = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "digits" / "metrics.jsonl"
    for _ in range(3000):
        if child.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") > 20):
            break
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in err and "checkpoint kept; continue with: sparsenet train --resume" in err
    assert (tmp_path / "digits" / "checkpoint.safetensors").exists()

    assert sparsenet("train", "--resume", "latest", "--out", str(tmp_path), "--epochs", "3") == 2
    assert_one_line(capsys, "train: --resume takes the settings of the interrupted run, got --epochs as well")
    assert sparsenet("train", "--resume", "--out", str(tmp_path), "--no-plots", "--dense-steps", "0") == 0
    out, _ = capsys.readouterr()
    assert "resumed" in out and "steps of 30 epochs" in out
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == json.loads((metrics.parent / "summary.json").read_text())["steps"]
    assert not (tmp_path / "digits" / "checkpoint.safetensors").exists()


def test_nothing_to_resume(tmp_path, capsys):
    assert sparsenet("train", "--resume", "--out", str(tmp_path)) == 2
    assert_one_line(capsys, f"train: resume needs an interrupted run in {tmp_path}, found none")
    assert sparsenet("train", "--resume", str(tmp_path)) == 2
    assert_one_line(capsys, "train: resume must name a folder with checkpoint.safetensors, got")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--epochs", "0"], "TrainConfig: epochs must be at least 1, got 0"),
        (
            ["train", "--data", "digits", "--budget", "8MiB"],
            "MiB for the sparsest network that reaches every neuron (activations 12 MiB",
        ),
        (["train", "--budget", "much"], "MemoryBudget: amount must be a number with KiB"),
        (["train", "--data", "/no/such"], "or an existing path, got '/no/such'"),
        (["train", "--epochs", "two"], "argument --epochs: invalid int value: 'two' (see sparsenet train --help)"),
        (["train", "--policy", "magic"], "argument --policy: invalid choice: 'magic'"),
        (["train", "--speed", "3"], "unrecognized arguments: --speed 3"),
        (["plan", "--features", "0"], "plan: sizes must be integers of at least 1, got [0, 4096"),
        (["inspect", "/no/such"], "load: /no/such does not exist"),
        (["dance"], "argument command: invalid choice: 'dance'"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert sparsenet(*arguments) == 2
    assert_one_line(capsys, message)


def test_row84_a_training_that_diverges_is_one_line(tmp_path, capsys):
    run = ["train", *QUICK, "--no-plots", "--out", str(tmp_path), "--lr"]
    assert sparsenet(*run, "1e6") == 2
    out, err = capsys.readouterr()
    line = r"sparsenet: error: Trainer: the loss must be finite, got (nan|inf) at step \d+; try a lower lr or .*"
    assert "Traceback" not in out and re.fullmatch(line + "\n", err)
    assert sparsenet(*run, "1e6", "--patience", "1", "--log-every", "1000") == 2
    assert re.fullmatch(line + "\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "Trainer: device must be on this machine, got 'cuda'; torch finds no CUDA device that works"),
        ("nonsense", "TrainConfig: device must be cpu or cuda, got 'nonsense'"),
        ("cuda:x", "TrainConfig: device must be cpu or cuda, got 'cuda:x'"),
    ],
)
def test_row84_a_device_that_is_not_here_is_one_line(tmp_path, monkeypatch, capsys, device, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sparsenet("train", *QUICK, "--out", str(tmp_path / "runs"), "--device", device) == 2
    assert_one_line(capsys, message)
    assert not (tmp_path / "runs").exists()


LIMITED = """
    import resource, sys
    import torch
    from sparsenet import cli
    try:
        cli.main([*sys.argv[1:], "--help"])  # what the command needs is loaded
    except SystemExit:
        pass
    used = int(open("/proc/self/statm").read().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20),) * 2)
    sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and RLIMIT_AS")
@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--data", "digits", "--hidden", "30000", "30000", "--density", "1", "--budget", "99GiB"],
        ["bench", "--sizes", "30000x30000", "--density", "1", "--phase", "forward", "--no-crossover"],
    ],
)
def test_row84_memory_that_is_refused_is_one_line(run_child, arguments):
    done = run_child(LIMITED, *arguments, check=False)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"sparsenet: error: out of memory: .*; a smaller network, batch .* needs less\n", done.stderr)


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "reproduce"])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory: an allocation was refused; a smaller network"),
        (MemoryError("Unable to allocate 8 GiB"), "out of memory: Unable to allocate 8 GiB; a smaller network"),
        (
            RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4194304 bytes."),
            "out of memory: 4 MiB could not be had; a smaller network",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            "out of memory: CUDA out of memory.",
        ),
        (OSError(12, "Cannot allocate memory"), "Cannot allocate memory"),
        (ImportError("libx.so: failed to map segment from shared object"), "out of memory: libx.so: failed to map"),
        (RuntimeError("search: a worker failed; run again to resume."), "error: search: a worker failed; run again"),
        (RuntimeError("train: the loss must be finite, got nan"), "error: train: the loss must be finite, got nan"),
        (RuntimeError("sparsenet: no kernels for device cuda"), "error: sparsenet: no kernels for device cuda"),
    ],
)
def test_row84_every_command_ends_in_one_line(monkeypatch, capsys, name, error, message):
    def run(_):
        raise error

    monkeypatch.setattr(importlib.import_module(f"sparsenet.commands.{name}"), "run", run)
    assert sparsenet(name, *(["some.file"] if name in ("compact", "inspect") else [])) == 2
    assert_one_line(capsys, "sparsenet: error: ", message)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shape mismatch"), AssertionError("no"), KeyError("a"), ImportError("cannot import name 'x'")],
)
def test_row84_errors_of_the_program_keep_their_traceback(monkeypatch, error):
    def run(_):
        raise error

    monkeypatch.setattr(doctor, "run", run)
    with pytest.raises(type(error)):
        sparsenet("doctor")


def test_tracebacks_on_request(monkeypatch):
    monkeypatch.setenv("SPARSENET_TRACEBACK", "1")
    with pytest.raises(ValueError, match="epochs"):
        sparsenet("train", "--epochs", "0")


def test_a_flag_for_every_field(capsys):
    assert sparsenet("train", "--help") == 0
    out, _ = capsys.readouterr()
    for field in dataclasses.fields(sn.TrainConfig):
        assert "--" + field.name.replace("_", "-") in out
        assert field.metadata["help"].split()[0] in out
    options = cli._parser().parse_args(["train", "--hidden", "7", "8", "--no-plots", "--lr", "3", "--resume"])
    config, given = config_of(options)
    assert config == sn.TrainConfig(hidden=(7, 8), plots=False, lr=3.0, resume="latest")
    assert given == {"hidden", "plots", "lr", "resume"}


def test_version(capsys):
    assert sparsenet("--version") == 0
    assert capsys.readouterr().out == f"sparsenet {sn.__version__}\n"


# --- what is loaded ---


LOADED = """
    import sys
    from sparsenet import cli
    try:
        cli.main(sys.argv[1:])
    except SystemExit as end:
        assert end.code == 0
    print("loaded:", *sorted(name for name in sys.modules if name.startswith("sparsenet.")))
"""


@pytest.mark.parametrize(
    ("arguments", "loaded", "absent"),
    [
        (["--help"], [], ["commands.train", "reproduce", "benchmark", "architecture.search", "training.job"]),
        (["train", "--help"], ["commands.train", "training.job"], ["reproduce", "benchmark", "architecture.search"]),
        (["plan", "--help"], ["commands.plan"], ["training.job", "reproduce", "benchmark", "architecture.search"]),
        (["reproduce", "--help"], ["commands.reproduce"], ["reproduce", "benchmark", "architecture.search"]),
        (["reproduce", "embedding", "--help"], ["reproduce.embedding"], ["reproduce.gates", "benchmark"]),
        (["inspect", "--help"], ["commands.inspect"], ["training.job", "reproduce", "benchmark"]),
        (["compact", "--help"], ["commands.compact"], ["training.job", "reproduce", "benchmark"]),
    ],
)
def test_a_command_loads_its_own_module_only(run_child, arguments, loaded, absent):
    out = run_child(LOADED, *arguments).stdout
    found = set(out.splitlines()[-1].split()[1:])
    assert {f"sparsenet.{name}" for name in loaded} <= found
    assert not {f"sparsenet.{name}" for name in absent} & found


def test_help_lists_every_command(capsys):
    assert sparsenet("--help") == 0
    out, _ = capsys.readouterr()
    modules = {path.stem for path in Path(cli.__file__).with_name("commands").glob("*.py")}
    assert set(cli.COMMANDS) == modules - {"__init__", "parser", "config_flags", "embedding"}
    for name, text in cli.COMMANDS.items():
        assert re.search(rf"{name}\s+{text[:20]}", out)


def test_importing_sparsenet_loads_no_more_than_it_needs(run_child):
    """What takes time: the trainer's tqdm, the checkpoints' safetensors, downloads, pictures, the search."""
    code = """
        import sys, torch
        before = set(sys.modules)
        import sparsenet
        print(*sorted(set(sys.modules) - before))
    """
    found = set(run_child(code).stdout.split())
    assert "sparsenet.layers" in found
    for name in ("tqdm", "safetensors", "urllib.request", "matplotlib", "optuna", "scipy", "sparsenet.training"):
        assert name not in found, name


@pytest.mark.slow  # five processes that import torch
def test_importing_sparsenet_costs_little(run_child, tmp_path):
    """At most 0.1 s beyond torch, in CPU time, with bytecode: the best of four."""
    code = """
        import time, torch
        begin = time.process_time()
        import sparsenet
        print(time.process_time() - begin)
    """
    cache = {"PYTHONDONTWRITEBYTECODE": None, "PYTHONPYCACHEPREFIX": str(tmp_path / "bytecode")}
    run_child(code, **cache)  # compiles
    assert min(float(run_child(code, **cache).stdout) for _ in range(4)) < 0.1


def test_every_public_name_is_there(run_child):
    """Names that are loaded when they are first used are in ``dir`` and can be star-imported."""
    run_child("""
        import sparsenet
        assert set(sparsenet.__all__) <= set(dir(sparsenet))
        from sparsenet import *
        assert Trainer.__module__ == "sparsenet.training.trainer" and Compactor and fold_depth and load and data.load
        assert all(name in globals() for name in sparsenet.__all__)
        try:
            sparsenet.nothing
        except AttributeError as error:
            assert "has no attribute 'nothing'" in str(error)
        else:
            raise SystemExit(1)
    """)


# --- plan, inspect, doctor ---


def test_plan_prints_a_table_or_json(capsys):
    assert sparsenet("plan", "--hidden", "512", "--budget", "16MiB", "--features", "100", "--classes", "3") == 0
    out, _ = capsys.readouterr()
    assert "512 x 100" in out and "3 x 512" in out and "predicted peak" in out and "the same network dense" in out
    assert sparsenet("plan", "--hidden", "512", "--density", "0.25", "--json") == 0
    fields = json.loads(capsys.readouterr().out)
    assert fields["density"] == pytest.approx(0.25, abs=0.02)
    assert fields["predicted_peak_bytes"] == sum(fields["items"].values())


def test_inspect_shows_layers_and_sizes(tmp_path, capsys):
    model = sn.SparseMLP([64, 96, 10], density=0.5, block_size=16)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 64)).sum().backward()
    optimizer.step()
    sn.save(tmp_path / "model.safetensors", model, optimizer, step=12)
    for argument in (tmp_path, tmp_path / "model.safetensors"):
        assert sparsenet("inspect", str(argument)) == 0
        out, _ = capsys.readouterr()
        assert "step 12, model, optimizer" in out and "96 x 64" in out and "relu" in out
        assert f"{model[0].density:.2%}" in out
    sn.save(tmp_path / "layer.safetensors", model[0])
    assert sparsenet("inspect", str(tmp_path / "layer.safetensors")) == 0
    assert "96 x 64" in capsys.readouterr().out
    assert sparsenet("inspect", str(tmp_path.parent)) == 2
    assert_one_line(capsys, "must be a file, got a folder")


def test_doctor_says_what_is_here(run_child, tmp_path):
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "broken.npz").write_bytes(b"PK\x03\x04 no zip")
    code = "import sys; from sparsenet.cli import main; sys.exit(main(['doctor']))"
    out = run_child(code, SPARSENET_DATA=str(tmp_path)).stdout
    info = sn.build_info()
    assert f"{info['isa']} in use" in out and "_C" in out and info["torch"] in out
    assert "OpenMP            one runtime, shared with torch: " in out
    assert "scikit-learn's bundled digits" in out and "cifar100          not on this machine" in out
    assert "mnist             damaged: " in out


def test_several_openmp_runtimes_are_told(monkeypatch):
    maps = "r-xp /a/libgomp.so.1\nr--p /a/libgomp.so.1\nr-xp /b/libgomp-1234.so\n"
    monkeypatch.setattr(doctor.Path, "read_text", lambda path: maps)
    assert doctor._openmp() == "2 runtimes, which slow each other down: /a/libgomp.so.1, /b/libgomp-1234.so"


# --- the comparison with dense ---


def test_comparison_in_a_process_of_its_own():
    plan = sn.plan([64, 128, 10], "4MiB", batch_size=16)
    found = comparison.compare_in_child(plan, steps=3, threads=1)
    assert found.skipped == ""
    assert found.speedup == found.dense_seconds_per_step / found.sparse_seconds_per_step > 0
    assert 0 < found.dense_peak_bytes < 64 << 20


def test_comparison_that_cannot_be_made(monkeypatch):
    plan = sn.plan([64, 128, 10], "4MiB", batch_size=16)
    found = comparison.compare_in_child(plan, steps=3, threads=1, timeout_seconds=0.01)
    assert found.skipped == "it took more than 0 s" and found.speedup is None
    broken = dataclasses.replace(plan, activation="magic")
    assert "the comparison process failed: KeyError" in comparison.compare_in_child(broken, 1, 1).skipped
    monkeypatch.setattr(comparison, "available_bytes", lambda: 100 << 20)
    assert "100 MiB are free" in comparison.compare_in_child(plan, 3, 1).skipped
    summary = {"seconds_per_step": 0.01, "speedup_over_dense": None, "skipped": "no room"}
    assert job._time_per_step(summary) == "10.0 ms; not compared with dense: no room"
