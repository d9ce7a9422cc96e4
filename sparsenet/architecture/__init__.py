"""Learning the architecture: gates and depth folding by backpropagation, density search, an embedding of networks.

Modules are imported when they are first named: ``sparsenet.architecture.gates`` costs nothing that is not used.
"""

from importlib import import_module

__all__ = ["compactor", "embedding", "folding", "gates", "growth", "search"]

# names that stood here before search and embedding were packages
_MOVED = {"embedding_search": "embedding.search", "estimators": "search.estimators", "search_space": "search.space"}


def __getattr__(name: str):
    if name in __all__ or name in _MOVED:
        return import_module(f"{__name__}.{_MOVED.get(name, name)}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
