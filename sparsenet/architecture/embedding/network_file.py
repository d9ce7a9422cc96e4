"""The network that a search in the embedding chose, as a safetensors file whose header says how it is built."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sparsenet.architecture.embedding.codec import NetworkSpace, ScaledOutput, layered
from sparsenet.files import replace_file

__all__ = ["load_network", "save_network"]


def save_network(path: Path, module: nn.Module, space: NetworkSpace) -> None:
    """Writes a network that was handed over as safetensors, its form in the header, whole or not at all."""
    network = module.network if isinstance(module, ScaledOutput) else module
    linears = [layer for layer in network if isinstance(layer, nn.Linear)]
    form = {
        "sizes": [linears[0].in_features, *(linear.out_features for linear in linears)],
        "activation": space.activation,
        "bias": linears[0].bias is not None,
        "scale": getattr(module, "scale", 1.0),
        "shift": getattr(module, "shift", 0.0),
    }
    header = {"sparsenet_network": json.dumps(form)}
    replace_file(path, lambda part: save_file(network.state_dict(), str(part), metadata=header))


def load_network(path: str | Path) -> nn.Module:
    """The network that ``search --method embedding`` wrote, in the data's units: [batch, inputs] -> [batch, 1].

    Raises ValueError for another file.
    """
    try:
        with safe_open(str(path), "pt") as file:
            form = json.loads((file.metadata() or {})["sparsenet_network"])
        network = layered(form["sizes"], form["activation"], form["bias"])
        network.load_state_dict(load_file(str(path)))
        scaled = (form["scale"], form["shift"]) != (1.0, 0.0)
        return ScaledOutput(network, form["scale"], form["shift"]) if scaled else network
    except (KeyError, TypeError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        rule = f"{path} must be a network of sparsenet search --method embedding"
        raise ValueError(f"load_network: {rule}, got: {error}") from error
