"""The methods of `global_kd.losses` by the names that `--method` takes, alone or joined by +."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from global_kd import GlobalKnowledgeLoss, losses
from global_kd.losses import DistillLoss


def known_methods() -> dict[str, type[DistillLoss]]:
    """Each by its name; global knowledge, "gk", first."""
    found = [x for x in vars(losses).values() if isinstance(x, type) and issubclass(x, DistillLoss)]
    others = {loss.name: loss for loss in found if loss is not DistillLoss}
    return {"gk": GlobalKnowledgeLoss, **dict(sorted(others.items()))}


def read_method(text: str) -> str:
    """`text`, "frs" or "gk+pkd", as it is meant; ends the program where it names no method."""
    known, names = known_methods(), text.lower().split("+")
    for name in names:
        if name not in known:
            raise SystemExit(
                f"--method {text}: unknown method {name!r}; known are {', '.join(known)}, alone or "
                "joined by +."
            )
        wanted = [
            p.name
            for p in inspect.signature(known[name]).parameters.values()
            if p.default is p.empty and p.kind is not p.VAR_KEYWORD and name != "gk"
        ]
        if wanted:
            raise SystemExit(
                f"--method {text}: {name} needs a {wanted[0]}, which only Python can give it; "
                "docs/methods.md shows how."
            )
    if len(set(names)) < len(names):
        raise SystemExit(f"--method {text} names a method twice.")
    return "+".join(names)


def make_losses(
    method: str, num_classes: int, *, steps: int, seed: int, gk: Mapping[str, Any]
) -> list[DistillLoss]:
    """The losses of a method for a training of `steps` iterations; `gk` are options of "gk".

    All but global knowledge take their paper's weights.
    """
    known = known_methods()
    return [
        GlobalKnowledgeLoss(num_classes, total_steps=steps, seed=seed, **gk)
        if name == "gk"
        else known[name](total_steps=steps, seed=seed)  # type: ignore[call-arg]
        for name in method.split("+")
    ]
