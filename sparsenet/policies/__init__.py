"""Which blocks go and which come: one short file per family of policies."""

from sparsenet.policies.policy import GMP, POLICIES, SET, LayerView, Policy, RigL, Static, block_squared_norms

__all__ = ["GMP", "POLICIES", "SET", "LayerView", "Policy", "RigL", "Static", "block_squared_norms"]
