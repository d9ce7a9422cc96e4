"""The table of schedules: what is known of each kind, and how one is made of its state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from sparsenet.schedules.curves import Constant, Cosine, Cubic, Exponential, Linear, Polynomial, Schedule
from sparsenet.schedules.phases import Complement, OneShot, Periodic, Piecewise

__all__ = ["SCHEDULES", "last_step", "schedule_from_state"]

SCHEDULES: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        Constant,
        Linear,
        Cosine,
        Cubic,
        Polynomial,
        Exponential,
        Piecewise,
        OneShot,
        Periodic,
        Complement,
    )
}


def last_step(schedule: object) -> int | None:
    """The step from which on a schedule stays the same; None where none is known, as for a function.

    >>> last_step(Linear(0.5, 0.1, steps=100, begin=20)), last_step(Constant(0.1)), last_step(lambda step: 0.1)
    (120, 0, None)
    """
    if isinstance(schedule, Constant):
        return 0
    if isinstance(schedule, (Linear, Cosine, Cubic, Polynomial, Exponential)):
        return schedule.begin + schedule.steps
    if isinstance(schedule, OneShot):
        return schedule.at
    if isinstance(schedule, Complement):
        return last_step(schedule.schedule)
    if isinstance(schedule, Piecewise):
        last = last_step(schedule.pieces[-1])
        return None if last is None else (schedule.boundaries[-1] if schedule.boundaries else 0) + last
    if isinstance(schedule, Periodic):
        last = last_step(schedule.after)
        return None if last is None or schedule.end is None else max(schedule.end, last)
    return None


def schedule_from_state(state: Mapping) -> Schedule:
    """The schedule whose ``state_dict()`` gave ``state``: an equal one.

    Raises TypeError where ``state`` is no mapping, ValueError where its kind is not known or its arguments are not
    exactly those of the kind; what the arguments themselves must be, the schedule says.

    >>> schedule = Piecewise((10,), (0.5, Linear(0.5, 0.1, steps=40)))
    >>> schedule_from_state(schedule.state_dict()) == schedule
    True
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"schedule_from_state: state must be what state_dict gives, got {state!r}")
    kind = state.get("kind")
    if not isinstance(kind, str) or kind not in SCHEDULES:
        raise ValueError(f"schedule_from_state: kind must be one of {', '.join(SCHEDULES)}, got {kind!r}")
    arguments = {name: value for name, value in state.items() if name != "kind"}
    wanted = [f.name for f in fields(SCHEDULES[kind])]
    if arguments.keys() != set(wanted):
        got = ", ".join(map(str, arguments)) or "none"
        raise ValueError(f"schedule_from_state: the arguments of {kind} must be {', '.join(wanted)}, got {got}")
    return SCHEDULES[kind](**{name: _made(value) for name, value in arguments.items()})


def _made(value: object) -> object:
    """An argument; a schedule where it is the state of one."""
    if isinstance(value, (list, tuple)):
        return tuple(_made(entry) for entry in value)
    return schedule_from_state(value) if isinstance(value, Mapping) else value
