"""Schedules: a number (density, drop fraction, gate strength) as a function of the step.

A schedule is a frozen dataclass called as ``schedule(step) -> float``. Every ramp goes from ``start`` to ``end``
over ``steps`` steps beginning at step ``begin``; before it stays at ``start``, after it at ``end``, both exactly.
With ``t = (step - begin) / steps`` clamped to [0, 1]::

    Linear       end + (start - end) (1 - t)
    Cosine       end + (start - end) (1 + cos(pi t)) / 2
    Cubic        end + (start - end) (1 - t)^3
    Polynomial   end + (start - end) (1 - t)^power
    Exponential  start (end / start)^t

and beside ``Constant`` there are those made of others::

    OneShot      before until step ``at``, after from then on
    Periodic     before until step ``begin``, after from step ``end`` on, alternating in between
    Piecewise    one schedule after another
    Complement   1 minus another

What a schedule gives depends on the step and on nothing that happened, so a resumed run needs only its step. To write
down which schedule it was, there is ``schedule.state_dict()``, and :func:`schedule_from_state`. A function serves as a
schedule as well; it has no state, and whoever saves one is told so.

Adding one: one frozen dataclass in ``curves.py`` or ``phases.py``, its name in ``SCHEDULES`` and its last step in
``last_step`` (``kinds.py``).
"""

from sparsenet.schedules.curves import (
    Constant,
    Cosine,
    Cubic,
    Exponential,
    Linear,
    Polynomial,
    Schedule,
    as_schedule,
)
from sparsenet.schedules.kinds import SCHEDULES, last_step, schedule_from_state
from sparsenet.schedules.numbers import as_integer, as_number, number_of, numbers_of
from sparsenet.schedules.phases import Complement, OneShot, Periodic, Piecewise

__all__ = [
    "SCHEDULES",
    "Complement",
    "Constant",
    "Cosine",
    "Cubic",
    "Exponential",
    "Linear",
    "OneShot",
    "Periodic",
    "Piecewise",
    "Polynomial",
    "Schedule",
    "as_integer",
    "as_number",
    "as_schedule",
    "last_step",
    "number_of",
    "numbers_of",
    "schedule_from_state",
]
