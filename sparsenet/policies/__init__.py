"""Which blocks go and which come: one short file per family of policies, and the table of their names."""

from sparsenet.policies.at_start import SNIP, GraSP, SynFlow
from sparsenet.policies.cascade import Cascade
from sparsenet.policies.curvature import OBD, Fisher, Taylor, WoodFisher
from sparsenet.policies.gradual import ACDC, GMP, GraNet, Movement
from sparsenet.policies.latent import TopKAST
from sparsenet.policies.policy import Combination, LayerView, Policy, block_squared_norms
from sparsenet.policies.rewiring import MEST, SET, SNFS, Random, RigL, Static
from sparsenet.policies.spreading import sensitivity

__all__ = [
    "ACDC",
    "GMP",
    "MEST",
    "OBD",
    "POLICIES",
    "SET",
    "SNFS",
    "SNIP",
    "Cascade",
    "Combination",
    "Fisher",
    "GraNet",
    "GraSP",
    "LayerView",
    "Movement",
    "Policy",
    "Random",
    "RigL",
    "Static",
    "SynFlow",
    "Taylor",
    "TopKAST",
    "WoodFisher",
    "block_squared_norms",
    "sensitivity",
]

POLICIES: dict[str, type[Policy]] = {
    "static": Static,
    "random": Random,
    "set": SET,
    "rigl": RigL,
    "snfs": SNFS,
    "mest": MEST,
    "topkast": TopKAST,
    "gmp": GMP,
    "movement": Movement,
    "granet": GraNet,
    "acdc": ACDC,
    "snip": SNIP,
    "grasp": GraSP,
    "synflow": SynFlow,
    "taylor": Taylor,
    "obd": OBD,
    "fisher": Fisher,
    "woodfisher": WoodFisher,
    "cascade": Cascade,
}
