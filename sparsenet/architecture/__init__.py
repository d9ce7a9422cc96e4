"""Learning the architecture: gates and depth folding by backpropagation, density search, an embedding of networks.

Modules are imported when they are first named: ``sparsenet.architecture.gates`` costs nothing that is not used.
"""

from importlib import import_module

_MODULES = (
    "embedding",
    "embedding_search",
    "estimators",
    "folding",
    "gates",
    "growth",
    "reproduce_density",
    "reproduce_embedding",
    "reproduce_gates",
    "search",
    "search_space",
)

__all__ = list(_MODULES)


def __getattr__(name: str):
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
