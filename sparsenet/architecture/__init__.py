"""Learning the architecture: gates and depth folding by backpropagation, density search, an embedding of networks.

Modules are imported when they are first named: ``sparsenet.architecture.gates`` costs nothing that is not used.
"""

from importlib import import_module

__all__ = ["compactor", "embedding", "folding", "gates", "search"]


def __getattr__(name: str):
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
