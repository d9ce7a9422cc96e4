"""Colours, axes and files of every picture. matplotlib is imported only when something is drawn.

The colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsenet.files import replace_file

__all__ = ["COLOURS", "GREY", "load_pyplot", "new_axes", "save_figure"]

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7F7F7F", "#000000")
GREY = COLOURS[6]  # of what is shown for comparison
_DOTS_PER_INCH = 130
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def load_pyplot() -> Any:
    """``matplotlib.pyplot`` in this style, drawing without a display.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; says how to install it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ModuleNotFoundError("plots: drawing needs matplotlib: pip install 'sparsenet[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(_STYLE)
    return pyplot


def new_axes(width: float = 6.4, height: float = 4.0, **options: Any) -> tuple[Any, Any]:
    """A figure of ``width`` x ``height`` inches and its axes; ``options`` are those of ``pyplot.subplots``."""
    return load_pyplot().subplots(figsize=(width, height), **options)


def save_figure(figure: Any, path: Path) -> Path:
    """Writes a PNG, whole or not at all, makes its folder if need be, closes the figure, and returns ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda part: figure.savefig(part, format="png", dpi=_DOTS_PER_INCH))
    load_pyplot().close(figure)
    return path
