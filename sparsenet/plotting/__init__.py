"""The one style of all pictures. matplotlib is imported only when something is drawn."""

from sparsenet.plotting.style import COLOURS, GREY, load_pyplot, new_axes, save_figure

__all__ = ["COLOURS", "GREY", "load_pyplot", "new_axes", "save_figure"]
