"""Witnesses: no float64 in the hot path, no wait for the device, one graph for all sizes."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

WIDE = (torch.float64, torch.complex128)


class NoFloat64(TorchDispatchMode):
    """Fails as soon as an operation hands out a float64 tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_flatten(out)[0]:
            if isinstance(leaf, torch.Tensor) and leaf.dtype in WIDE:
                raise AssertionError(f"{func} made a {leaf.dtype} tensor of {tuple(leaf.shape)}")
        return out


class NoHostSync(TorchDispatchMode):
    """Fails on operations that would make the host wait for an accelerator, seen on any device.

    Reading a value, sizes that depend on values, literals that are copied to the device, and
    copies between devices.
    """

    READS = ("_local_scalar_dense", "equal", "is_nonzero")
    SIZES = ("nonzero", "masked_select", "bincount", "unique", "repeat_interleave.Tensor")
    COPIES = ("lift_fresh",)  # torch.tensor([...]), x.new_tensor([...])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        if name.split(".")[0] in self.READS + self.SIZES + self.COPIES or name in self.SIZES:
            raise AssertionError(f"{func} makes the host wait for the device")
        places = args[1] if name.startswith("index") and len(args) > 1 else ()
        if isinstance(places, (list, tuple)) and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in places
        ):
            raise AssertionError(f"{func} with a mask makes the host wait for the device")
        return func(*args, **(kwargs or {}))


class Graphs:
    """A torch.compile backend that runs the graph as it is and counts how many it was given."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs):
        self.count += 1
        return graph.forward


def gradient(loss, *inputs):
    """Gradients of a scalar; a missing one is an error, so "it back-propagates" is checked too."""
    return torch.autograd.grad(loss, inputs)
