"""What a Grower saves of itself, and how it goes on from there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sparsenet.architecture.growth.controller import Flow
from sparsenet.architecture.growth.fading import Fade
from sparsenet.architecture.growth.holding import Limits
from sparsenet.architecture.growth.ledger import Cost
from sparsenet.architecture.growth.pace import Pace

__all__ = ["resume", "state_of"]


def state_of(grower: Any) -> dict:
    """Everything that decides what happens next, as plain values and tensors.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.architecture.growth.saving import state_of
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> state_of(sn.Grower(model, torch.optim.SGD(model.parameters()), "1MiB"))["steps"]
        0
    """
    return {
        "steps": grower.steps,
        "seed": grower.rules.seed,
        "done": grower.done,
        "start": list(grower._start.parts),
        "now": list(grower._now.parts),
        "flow": {"progress": grower._flow.progress, "credit": dict(grower._flow.credit)},
        "fades": grower._fades.state_dict(),
        "scores": grower._scores.state_dict(),
        "losses": grower._losses.state_dict(),
        "still": grower._still,
        "account": grower._account.state_dict(),
        "most_rows": grower._watch.most_rows,
        "insertions": [dict(each) for each in grower.insertions],
        "limits": grower._limits.state_dict(),
        "times": None if grower.times is None else grower.times.state_dict(),
    }


def resume(grower: Any, state: Mapping) -> None:
    """Takes over all of :func:`state_of`. Raises ValueError where it is something else; then nothing was changed.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.architecture.growth.saving import resume, state_of
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> grower = sn.Grower(model, torch.optim.SGD(model.parameters()), "1MiB")
        >>> resume(grower, {**state_of(grower), "steps": 7})
        >>> grower.steps
        7
    """
    for key in ("steps", "seed"):
        if not isinstance(state.get(key), int):
            raise ValueError(f"Grower: state must have an integer {key!r}, got {state.get(key)!r}")
    try:
        start, now = Cost(*map(float, state["start"])), Cost(*map(float, state["now"]))
        flow = Flow(float(state["flow"]["progress"]), dict(state["flow"]["credit"]))
        for fields in state["fades"]["fades"]:
            Fade(**fields)
        insertions = [dict(each) for each in state["insertions"]]
        pace, cap = Pace(**state["limits"]["pace"]), float(state["limits"]["cap"])
        later = dict(state["limits"]["later"])
        Limits(**{"budget": 1, **later})  # are they limits?
        still, done, most_rows = int(state["still"]), bool(state["done"]), int(state["most_rows"])
        fades, scores, times = (state[key] for key in ("fades", "scores", "times"))
        grower._account.load_state_dict(state["account"])
        grower._losses.load_state_dict(state["losses"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"Grower: state must be what state_dict gives, got {error!r}") from None
    grower.rules = grower._decider.rules = replace(grower.rules, seed=state["seed"])
    grower.steps, grower.done, grower._still = state["steps"], done, still
    grower._start, grower._now = start, now
    grower._flow.progress, grower._flow.credit = flow.progress, flow.credit
    grower._fades.load_state_dict(fades)
    grower._scores.load_state_dict(scores)
    grower.insertions[:] = insertions
    for name, most in later.items():
        setattr(grower, name, most)
    grower._limits.pace, grower._limits.cap = pace, cap
    grower._watch.most_rows, grower._watch.seconds = most_rows, []
    if grower.times is not None and times is not None:
        grower.times.load_state_dict(times)
