"""A dense head's towers, cut in two after some of their convolutions."""

import copy
from typing import Any

from torch import nn


def cut(tower: nn.Module, after: int, predictors: int = 0) -> tuple[nn.Sequential, nn.Sequential]:
    """A tower up to the norm of its n-th block of convolutions, and from that activation on.

    Args:
        tower: Runs its children one after the other.
        after: Which block: 1 is the first.
        predictors: How many of its last blocks put out predictions, and count as no convolution.

    Raises:
        ValueError: It has fewer.
    """
    blocks = _blocks(tower)
    most = len(blocks) - predictors
    if not 1 <= after <= most:
        raise ValueError(
            f"after: expected 1 to {most}, the convolutions of a branch of the head before its "
            f"prediction, but got {after}; 0 takes the maps"
        )
    first = [leaf for block in blocks[:after] for leaf in block]
    rest = [leaf for block in blocks[after:] for leaf in block]
    while not (isinstance(first[-1], nn.Conv2d) or "Norm" in type(first[-1]).__name__):
        rest.insert(0, first.pop())  # the activation
    return nn.Sequential(*first), nn.Sequential(*rest)


def with_tower(head: Any, name: str, tower: nn.Module) -> Any:
    """A head that runs another tower; all else, parameters too, is the head's own."""
    twin = copy.copy(head)
    twin._modules = dict(head._modules)
    setattr(twin, name, tower)
    return twin


def _blocks(tower: nn.Module) -> list[list[nn.Module]]:
    """Children that are made of several modules, or a convolution and what follows it."""
    blocks: list[list[nn.Module]] = []
    for child in _children(tower):
        if _children(child):
            blocks.append(_leaves(child))
        elif isinstance(child, nn.Conv2d) or not blocks:
            blocks.append([child])
        else:
            blocks[-1].append(child)
    return blocks


def _leaves(module: nn.Module) -> list[nn.Module]:
    children = _children(module)
    return [x for child in children for x in _leaves(child)] if children else [module]


def _children(module: nn.Module) -> list[nn.Module]:
    # Unlike module.children(), also one that stands twice: an activation may be shared.
    return [child for child in module._modules.values() if child is not None]
