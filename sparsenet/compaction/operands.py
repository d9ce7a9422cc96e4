"""Operands where rules look for them: whatever a call gives by keyword, by NumPy's names as well, gets its position.

``torch.add(a, other=b)``, ``a.add(b)`` and ``a + b`` are the same to a rule: a first and a second argument. Only the
operands move; settings such as ``dim`` and ``alpha`` stay keywords where they were given so. And whoever reads a tensor
after it was changed in place reads what the change returned.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import fx, nn

__all__ = ["METHODS", "place_operands"]

METHODS = {  # method -> the function that does the same
    **{name: getattr(torch, name) for name in ("relu", "sigmoid", "tanh", "neg", "abs", "square", "exp", "clamp")},
    **{"relu_": torch.relu, "add": torch.add, "add_": torch.add, "sub": torch.sub, "sub_": torch.sub},
    **{"mul": torch.mul, "mul_": torch.mul, "div": torch.div, "div_": torch.div},
    **{"contiguous": torch.clone, "clone": torch.clone, "flatten": torch.flatten, "mean": torch.mean},
    **{"view": torch.reshape, "reshape": torch.reshape},
}
_BINARY = (torch.add, torch.sub, torch.mul, torch.div)
_SAME = {  # functions under other names
    **{torch.subtract: torch.sub, torch.multiply: torch.mul, torch.divide: torch.div, torch.true_divide: torch.div},
    **{torch.concat: torch.cat, torch.concatenate: torch.cat},
}
_OPERANDS = {  # function -> names of its operands by position; of any other it is its input
    **dict.fromkeys(_BINARY, ("input", "other")),
    torch.cat: ("tensors",),
    torch.reshape: ("input", "shape"),
}
_NUMPY = {"a": "input", "x": "input", "x1": "input", "x2": "other", "axis": "dim", "keepdims": "keepdim"}


_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


def place_operands(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
    """Gives every call of a function or method of ``graph`` its operands by position, under torch's own names.

    Args:
        graph: is changed. modules: that it calls, by name.

    Example:
        >>> import torch
        >>> from sparsenet.compaction.operands import place_operands
        >>> graph = torch.fx.Graph()
        >>> a, b = graph.placeholder("a"), graph.placeholder("b")
        >>> node = graph.call_function(torch.concat, kwargs={"tensors": [a, b], "axis": 1})
        >>> place_operands(graph, {})
        >>> node.target is torch.cat, node.args, node.kwargs
        (True, ([a, b],), {'dim': 1})
    """
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        changed = node.all_input_nodes[:1] if _works_in_place(node, modules) else ()
        for source in changed:
            for user in [user for user in source.users if order[user] > order[node]]:
                user.replace_input_with(source, node)
        if node.op not in ("call_function", "call_method"):
            continue
        if node.op == "call_function":
            node.target = _SAME.get(node.target, node.target)
        function = METHODS.get(node.target) if node.op == "call_method" else node.target
        of_torch = node.op == "call_method" or getattr(torch, getattr(function, "__name__", ""), None) is function
        given = {_NUMPY.get(name, name) if of_torch else name: value for name, value in node.kwargs.items()}
        if "size" in given and function is torch.reshape:  # as view names it
            given["shape"] = given.pop("size")
        placed = list(node.args)
        for name in _OPERANDS.get(function, ("input",))[len(placed) :]:
            if name not in given:
                break
            placed.append(given.pop(name))
        node.args, node.kwargs = tuple(placed), given


def _works_in_place(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a call changes its first operand and returns it."""
    if node.op == "call_module":
        return getattr(modules.get(node.target), "inplace", False) is True
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    return node.op == "call_function" and (node.target in _IN_PLACE or node.kwargs.get("inplace", False) is True)
