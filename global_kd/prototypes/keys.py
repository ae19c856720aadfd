"""Pseudo-random keys of instances, made from what an instance is.

A sample that keeps the smallest keys of a class is fair, and it is the same sample whatever the
order in which instances come, in however many batches, on however many ranks: nothing is drawn.
Integers wrap around at 64 bits, as they do in tensors; no step makes a device wait.
"""

import torch
from torch import Tensor

NEVER = 2**63 - 1  # the key of a row that must not be kept


def _signed(x: int) -> int:
    """The 64-bit pattern as the number that an int64 holds."""
    x &= 2**64 - 1
    return x - 2**64 if x >= 2**63 else x


def _mix(x: Tensor) -> Tensor:
    """Every bit of the result depends on every bit of int64 ``x`` (the finalizer of SplitMix64)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; ``>>`` alone would repeat the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def digest(rows: Tensor) -> Tensor:
    """int64 ``(R,)`` from the bits of float32 ``(R, N)``."""
    bits = rows.contiguous().view(torch.int32).long()
    place = torch.arange(1, bits.shape[1] + 1, device=rows.device)
    return _mix(((bits + place) * (2 * _mix(place) + 1)).sum(dim=1))


def keys_of(identity: Tensor, seed: int, turn: int) -> Tensor:
    """int64 ``(R,)`` in ``[0, NEVER)``, another order for every seed and turn."""
    salt = _signed(0x9E3779B97F4A7C15 * (2 * seed + 1) + 0xD1B54A32D192ED03 * (turn + 1))
    return (_mix(_mix(identity + salt) ^ salt) & NEVER).clamp(max=NEVER - 1)
