import builtins
import json
import struct

import pytest
import torch

import sparsenet as sn
from sparsenet.training import plots
from sparsenet.training.progress import MetricsFile

NAMES = ("learning", "density", "rewiring", "patterns", "memory")
MIB = 1 << 20


def make_run(folder, sizes=(64, 128, 96, 10), rewires=5, epochs=2, train=40, dense=True):
    """The files of a run that never happened."""
    torch.manual_seed(0)
    model = sn.SparseMLP(sizes, density=0.3, block_size=16)
    with MetricsFile(folder) as file:
        for step in range(1, train + 1):
            file.write("train", step, loss=3.0 / step, accuracy=1 - 1 / (step + 1), density=0.3)
        for number in range(rewires):
            layers = {
                str(i): {"dropped": 9 - number, "grown": 9 - number, "num_blocks": 3, "density": 0.3}
                for i in range(len(model))
            }
            file.write("rewire", 6 * (number + 1), layers=layers)
        for epoch in range(epochs):
            file.write("epoch", (epoch + 1) * 20, epoch=epoch + 1, loss=0.5, accuracy=0.8)
    plan = sn.plan(sizes, None, density=0.3, block_size=16, batch_size=32)
    summary = {
        "test_accuracy": 0.87,
        "steps": 40,
        "density": 0.3,
        "layers": [
            {
                "name": str(i),
                "shape": [m.out_features, m.in_features],
                "density": m.density,
                "planned_density": m.density,
            }
            for i, m in enumerate(model)
        ],
        "budget_bytes": 8 * MIB,
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        "measured_peak_bytes": 3 * MIB,
        "dense_peak_bytes": 9 * MIB if dense else None,
        "dense_predicted_bytes": plan.dense_bytes,
        "memory": {
            "moment": plan.moment,
            "predicted_items": dict(plan.items),
            "measured_items": {"weights": MIB, "optimizer state": MIB},
            "predicted_phases": plan.phases,
            "measured_phases": {"forward": MIB, "backward": 3 * MIB},
        },
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    sn.save(folder / "model.safetensors", model)


def png_size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", content[16:24])


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"train": 0, "rewires": 0, "epochs": 0, "dense": False},
        {"train": 1, "rewires": 1, "sizes": (30, 40, 50, 60, 50, 40, 20, 10)},
    ],
)
def test_all_pictures_are_drawn(tmp_path, how):
    make_run(tmp_path, **how)
    paths = plots.draw_run(tmp_path)
    assert [path.stem for path in paths] == list(NAMES)
    for path in paths:
        width, height = png_size(path)
        assert 600 < width < 2500 and 300 < height < 2000
    assert len(list(tmp_path.iterdir())) == 3 + len(NAMES)


def test_running_mean():
    smoothed = plots._smoothed(plots.np.array([0.0, 3.0, 6.0, 3.0, 0.0]), width=3)
    assert smoothed.tolist() == [0.0, 3.0, 4.0, 3.0, 0.0]
    assert plots._smoothed(plots.np.array([])).tolist() == []


def test_matplotlib_is_imported_only_to_draw(run_child):
    run_child("""
        import sys, sparsenet, sparsenet.training.plots, sparsenet.cli
        assert "matplotlib" not in sys.modules
    """)


def test_drawing_without_matplotlib(tmp_path, monkeypatch):
    def refuse(name, *arguments, **keywords):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *arguments, **keywords)

    original = builtins.__import__
    make_run(tmp_path)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModuleNotFoundError, match=r"plots: drawing needs matplotlib: pip install 'sparsenet.plot.'"):
        plots.draw_run(tmp_path)


def test_folders_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"summary\.json"):
        plots.draw_run(tmp_path)
