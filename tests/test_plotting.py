"""The one style of all pictures: axes of the size asked for, files that are PNGs, one clear line without matplotlib."""

import builtins
import struct

import pytest

from sparsenet.plotting import COLOURS, GREY, load_pyplot, new_axes, save_figure


def test_colours_differ_and_grey_is_one_of_them():
    assert len(set(COLOURS)) == len(COLOURS) and GREY in COLOURS


def test_axes_have_the_size_and_the_style():
    pyplot = load_pyplot()
    figure, axes = new_axes(5.0, 2.5, nrows=2)
    assert figure.get_size_inches().tolist() == [5.0, 2.5] and len(axes) == 2
    assert not axes[0].spines["top"].get_visible() and not axes[0].spines["right"].get_visible()
    assert pyplot.get_backend().lower() == "agg", "no display is needed"
    pyplot.close(figure)


def test_a_saved_figure_is_a_png_of_that_size_and_is_closed(tmp_path):
    figure, axes = new_axes(4.0, 3.0)
    axes.plot([1, 2, 3])
    path = save_figure(figure, tmp_path / "new" / "line.png")
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", data[16:24]) == (520, 390)  # 130 dots an inch
    assert not load_pyplot().fignum_exists(figure.number)
    assert list(path.parent.iterdir()) == [path]


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"drawing needs matplotlib: pip install 'sparsenet\[plot\]'"):
        load_pyplot()
