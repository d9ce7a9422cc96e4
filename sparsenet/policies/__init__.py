"""Which blocks go and which come: one short file per family of policies, and the table of their names."""

from sparsenet.policies.cascade import Cascade
from sparsenet.policies.curvature import OBD, Fisher, Taylor, WoodFisher
from sparsenet.policies.gradual import GMP
from sparsenet.policies.policy import LayerView, Policy, block_squared_norms
from sparsenet.policies.rewiring import SET, RigL, Static

__all__ = [
    "GMP",
    "OBD",
    "POLICIES",
    "SET",
    "Cascade",
    "Fisher",
    "LayerView",
    "Policy",
    "RigL",
    "Static",
    "Taylor",
    "WoodFisher",
    "block_squared_norms",
]

POLICIES: dict[str, type[Policy]] = {
    "static": Static,
    "set": SET,
    "rigl": RigL,
    "gmp": GMP,
    "taylor": Taylor,
    "obd": OBD,
    "fisher": Fisher,
    "woodfisher": WoodFisher,
    "cascade": Cascade,
}
