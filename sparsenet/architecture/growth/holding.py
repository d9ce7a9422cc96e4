"""The limits that the Grower holds: bytes, parameters, milliseconds, and what the process may still take."""

from __future__ import annotations

import math
from collections.abc import Callable

from sparsenet import distributed
from sparsenet.architecture.growth.account import Account
from sparsenet.architecture.growth.ledger import Cost
from sparsenet.architecture.growth.pace import Pace
from sparsenet.limits import MemoryBudget, format_bytes, process_limit, release_heap
from sparsenet.schedules import as_integer, as_number

__all__ = ["Limits"]

KEPT_FREE = 0.1  # of what a limit of the process leaves: others allocate too
Amount = str | int | MemoryBudget | Callable[[int], float]


class Limits:
    """What a step may cost. With several ranks the smallest limit and the largest cost count, on all of them.

    Attributes:
        later: the limits that were set in mid-training, by name, for a resumed training; no functions of the step.

    Example:
        >>> from sparsenet.architecture.growth.holding import Limits
        >>> limits = Limits("1MiB")
        >>> limits.cap = 1000.0   # an allocation failed meanwhile
        >>> limits.budget(0), limits.at(0).bytes
        (1048576.0, 1000.0)
    """

    def __init__(self, budget: Amount, parameters: int | None = None, step_ms: float | None = None):
        self.pace = Pace()
        self.cap = math.inf  # bytes that were too many
        self.later: dict[str, float] = {}
        self.parameters, self.step_ms = parameters, step_ms
        self.set_budget(budget, 0)

    def set_budget(self, amount: Amount, step: int) -> None:
        """Bytes from now on, fixed or by the step. Raises ValueError where they are no number of at least 1."""
        before = getattr(self, "_schedule", None), getattr(self, "fixed", None)
        self.fixed = None if callable(amount) else MemoryBudget(amount).bytes
        self._schedule = amount if callable(amount) else None
        try:
            self.budget(step)
        except ValueError:
            self._schedule, self.fixed = before
            raise
        self.cap = math.inf

    def budget(self, step: int) -> float:
        """Bytes that were asked for at ``step``. Raises ValueError where a schedule gives no number of at least 1."""
        if self._schedule is None:
            return float(self.fixed)
        bytes_now = float(self._schedule(step))
        if not math.isfinite(bytes_now) or bytes_now < 1:
            raise ValueError(f"Grower: budget must be at least 1 byte, got {bytes_now} at step {step}")
        return bytes_now

    @property
    def parameters(self) -> float:
        """Most elements of all parameters; infinite: any number."""
        return self._parameters

    @parameters.setter
    def parameters(self, most: float | None) -> None:
        none = most is None or most == math.inf
        self._parameters = math.inf if none else as_integer("Grower", "parameters", most, at_least=1)

    @property
    def step_ms(self) -> float:
        """Most milliseconds of a step; infinite: any number."""
        return self._step_ms

    @step_ms.setter
    def step_ms(self, most: float | None) -> None:
        most = math.inf if most is None else most
        if most != math.inf and as_number("Grower", "step_ms", most) <= 0:
            raise ValueError(f"Grower: step_ms must be above 0, got {most}")
        self._step_ms = float(most)

    def at(self, *steps: int) -> Cost:
        """What a step may cost at all of ``steps``."""
        asked = min(self.cap, *(self.budget(step) for step in steps)), self.parameters, self.step_ms
        return Cost(*(-most for most in distributed.highest([-most for most in asked])))

    def until(self, step: int, every: int, now: Cost, account: Account) -> Cost:
        """What a step may cost until the next decision: as asked, as the process allows, and as was too slow before."""
        asked = self.at(step, step + every)
        free = self.free(account)
        process = now.bytes + (1 - KEPT_FREE) * free if free > 0 else now.bytes
        most = min(asked.bytes, process, self.pace.most_bytes(asked.milliseconds))
        return Cost(most, asked.parameters, asked.milliseconds)

    def broken(self, step: int, now: Cost, milliseconds: float | None, account: Account | None) -> str:
        """The limit that ``now`` is above, in words; empty if none.

        ``milliseconds``: of the last steps, the largest of all ranks; None: not asked. ``account``: to ask what the
        process may take; None: not asked.
        """
        asked = self.at(step)
        if now.bytes > asked.bytes:
            return f"the budget is {format_bytes(asked.bytes)}"
        if now.parameters > asked.parameters:
            return f"parameters are limited to {round(asked.parameters)}"
        if account is not None and (why := self.too_little(account)):
            return why
        if milliseconds is not None and self.pace.too_slow(milliseconds, asked.milliseconds):
            return f"a step takes {milliseconds:.3g} ms of {asked.milliseconds:.3g}"
        return ""

    def too_little(self, account: Account) -> str:
        """The limit of the process that leaves less than a step needs for a while, in words; empty if none."""
        if self.free(account) >= 0:
            return ""
        release_heap()  # what the process holds, and does not use, counts as used
        if self.free(account) >= 0:
            return ""
        limit = process_limit()
        return f"{limit.why} leaves {format_bytes(limit.bytes_left)}"

    def to_shrink_to(self, why: str, step: int, now: Cost, milliseconds: float, account: Account) -> Cost:
        """Bytes and parameters that the network is to have after a limit was found broken."""
        asked = self.at(step)
        budget = min(asked.bytes, self.pace.most_bytes(asked.milliseconds))
        free = self.free(account)
        if free < 0:
            budget = min(budget, now.bytes + (1 + KEPT_FREE) * free)
        if why.startswith("a step takes"):
            budget = min(budget, self.pace.shrunk(now.bytes, milliseconds, asked.milliseconds))
        return Cost(budget, asked.parameters, math.inf)

    def free(self, account: Account) -> float:
        """Bytes that the process may take beyond what a step needs for a while; the smallest of all ranks."""
        return -distributed.highest([float(account.needed - process_limit().bytes_left)])[0]

    def state_dict(self) -> dict:
        """What has been set since the start, and learnt of limits since they were set."""
        return {"pace": self.pace.state_dict(), "cap": self.cap, "later": dict(self.later)}
