import builtins
import struct

import pytest

from sparsenet import plotting
from sparsenet.plotting import COLOURS, GREY, load_pyplot, new_axes, save_figure


def luminance(colour):
    """Relative luminance of ``#rrggbb`` (WCAG), in [0, 1]."""
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_colours_differ_and_show_on_white():
    assert len(set(COLOURS)) == len(COLOURS) == 8 and GREY in COLOURS
    assert all(1.05 / (luminance(colour) + 0.05) > 2 for colour in COLOURS), "contrast with white"


def test_axes_have_the_style_and_the_size():
    pytest.importorskip("matplotlib")
    figure, (left, right) = new_axes(6.0, 3.0, ncols=2)
    assert figure.get_size_inches().tolist() == [6.0, 3.0]
    for axes in (left, right):
        assert not axes.spines["top"].get_visible() and axes.spines["left"].get_visible()
    load_pyplot().close(figure)


def test_a_figure_is_written_whole_and_closed(tmp_path):
    pytest.importorskip("matplotlib")
    figure, axes = new_axes(2.0, 1.0)
    axes.plot([0, 1], [0, 1])
    path = tmp_path / "a" / "b" / "line.png"
    assert save_figure(figure, path) == path
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    assert struct.unpack(">II", content[16:24]) == (260, 130)
    assert list(path.parent.iterdir()) == [path], "nothing temporary is left"
    assert not load_pyplot().fignum_exists(figure.number)


def test_without_matplotlib(monkeypatch):
    def refuse(name, *arguments, **keywords):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *arguments, **keywords)

    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    for draw in (load_pyplot, new_axes):
        with pytest.raises(ModuleNotFoundError, match=r"drawing needs matplotlib: pip install 'sparsenet.plot.'"):
            draw()


def test_only_drawing_imports_matplotlib(run_child):
    run_child("""
        import sys
        import sparsenet.plotting, sparsenet.training.plots, sparsenet.compaction.plots, sparsenet.benchmark.plot
        import sparsenet.architecture.search.plots, sparsenet.reproduce.gate_plots
        assert "matplotlib" not in sys.modules
    """)


def test_public_names():
    assert set(plotting.__all__) == {"COLOURS", "GREY", "load_pyplot", "new_axes", "save_figure"}
