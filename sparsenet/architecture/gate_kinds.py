"""Kinds of gates: how a learnt parameter becomes a gate, what it costs, and when it is closed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["GATES", "HardConcreteGate", "SlimmingGate", "StraightThrough", "StraightThroughGate", "TriStateGate"]


class StraightThrough(torch.autograd.Function):
    """1 where the parameter is at least one half, else 0; the gradient passes as if it were the identity."""

    @staticmethod
    def forward(ctx, parameter):
        """[n] -> [n] of zeros and ones."""
        return (parameter >= 0.5).to(parameter.dtype)

    @staticmethod
    def backward(ctx, grad):
        """The gradient as it came."""
        return grad


class TriStateGate:
    """The paper's gate: a parameter in [0, 1], thresholded at one half, with a penalty that makes it binary."""

    def initial(self, start: Tensor) -> Tensor:
        """The parameter for gates meant to start at ``start`` in [0, 1]."""
        return start.clone()

    def value(self, parameter: Tensor, training: bool) -> Tensor:
        """What the unit's output is multiplied by, [n], differentiable in the parameter."""
        return StraightThrough.apply(parameter)

    def closed(self, parameter: Tensor) -> Tensor:
        """Bool [n]: which units are off (outside of training, where a gate may be random)."""
        return parameter < 0.5

    def cost(self, parameter: Tensor) -> Tensor:
        """The number of units, as the penalty counts it; differentiable."""
        return parameter.sum()

    def indecision(self, parameter: Tensor) -> Tensor:
        """What lambda_1 multiplies; differentiable."""
        return (parameter * (1 - parameter)).sum()

    def clip_(self, parameter: Tensor) -> None:
        """Brings the parameter back into its range after an optimizer step."""
        parameter.clamp_(0.0, 1.0)

    def keep_one_(self, parameter: Tensor) -> None:
        """Holds the strongest gate half open: a layer without units would pass nothing on and learn nothing more."""
        half = self.initial(parameter.new_full((1,), 0.5))
        parameter.scatter_reduce_(0, parameter.argmax().view(1), half, "amax")

    def close_(self, parameter: Tensor, units: Tensor) -> None:
        """Switches ``units`` (bool [n]) off."""
        parameter[units] = 0.0


class StraightThroughGate(TriStateGate):
    """A thresholded parameter without the pull towards 0 and 1: BinMask (2023)."""

    def cost(self, parameter: Tensor) -> Tensor:
        """The number of open gates, its gradient passed straight through."""
        return StraightThrough.apply(parameter).sum()

    def indecision(self, parameter: Tensor) -> Tensor:
        """Nothing."""
        return parameter.new_zeros(())


class HardConcreteGate(TriStateGate):
    """L0 regularisation (Louizos, Welling & Kingma, 2018): gates are random in training, with exact zeros and ones.

    The parameter is log alpha; ``z = clip(sigmoid((logit(u) + log alpha) / beta) (zeta - gamma) + gamma, 0, 1)``.
    """

    beta, gamma, zeta = 2 / 3, -0.1, 1.1
    low, high = math.log(0.01), math.log(100.0)

    def initial(self, start: Tensor) -> Tensor:
        """Log alpha whose gate outside of training is ``start``."""
        share = (start.clamp(0.01, 0.99) - self.gamma) / (self.zeta - self.gamma)
        return share.logit().clamp(self.low, self.high)

    def value(self, parameter: Tensor, training: bool) -> Tensor:
        """A sample in training, else its clipped mean."""
        if training:
            noise = torch.empty_like(parameter).uniform_(1e-6, 1 - 1e-6)
            share = torch.sigmoid((noise.log() - (1 - noise).log() + parameter) / self.beta)
        else:
            share = torch.sigmoid(parameter)
        return (share * (self.zeta - self.gamma) + self.gamma).clamp(0.0, 1.0)

    def closed(self, parameter: Tensor) -> Tensor:
        """Where the gate outside of training is zero."""
        return self.value(parameter.detach(), training=False) == 0

    def cost(self, parameter: Tensor) -> Tensor:
        """Expected number of gates that are not zero."""
        return torch.sigmoid(parameter - self.beta * math.log(-self.gamma / self.zeta)).sum()

    def indecision(self, parameter: Tensor) -> Tensor:
        """Nothing."""
        return parameter.new_zeros(())

    def clip_(self, parameter: Tensor) -> None:
        """Log alpha in [log 0.01, log 100]."""
        parameter.clamp_(self.low, self.high)

    def close_(self, parameter: Tensor, units: Tensor) -> None:
        """The least log alpha."""
        parameter[units] = self.low


class SlimmingGate(TriStateGate):
    """A scaling factor with an L1 penalty: Network Slimming (Liu et al., 2017). Close the smallest, then compact."""

    def value(self, parameter: Tensor, training: bool) -> Tensor:
        """The factor itself."""
        return parameter

    def closed(self, parameter: Tensor) -> Tensor:
        """Factors of exactly zero; ``gates.close_gates_`` makes them."""
        return parameter == 0

    def cost(self, parameter: Tensor) -> Tensor:
        """Sum of absolute values."""
        return parameter.abs().sum()

    def indecision(self, parameter: Tensor) -> Tensor:
        """Nothing."""
        return parameter.new_zeros(())

    def clip_(self, parameter: Tensor) -> None:
        """No range."""

    def keep_one_(self, parameter: Tensor) -> None:
        """Nothing: a factor that the data needs is not zero."""


GATES: dict[str, TriStateGate] = {
    "tri_state": TriStateGate(),
    "straight_through": StraightThroughGate(),
    "hard_concrete": HardConcreteGate(),
    "slimming": SlimmingGate(),
}
