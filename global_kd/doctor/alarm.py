"""Terms that blow up while training runs: told once, and nothing waits for it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

_FAR = 100.0  # detection losses
_EVERY = 16  # steps between two looks where looking is not free


class Alarm:
    """Looks at the terms of a step and warns, once, of one that is not finite or far too large.

    On a processor at once. From an accelerator the numbers are copied beside its work, and looked
    at in a later step, when they have arrived.
    """

    def __init__(self) -> None:
        self._told = False
        self._steps = 0
        self._names: list[str] = []
        self._values: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def __reduce__(self) -> tuple[type[Alarm], tuple[()]]:
        """Copies and pickles begin anew: an event of a device cannot be copied."""
        return Alarm, ()

    @torch._compile._disable_dynamo
    def hear(self, terms: Mapping[str, Tensor], detection: Tensor | None) -> None:
        """The terms of a step, and the detector's own loss where it is known."""
        if self._told or not terms or _capturing():
            return
        self._look()
        step, self._steps = self._steps, self._steps + 1
        device = next(iter(terms.values())).device
        if self._values is not None or (device.type != "cpu" and step % _EVERY):
            return
        numbers = [x.detach().float().reshape(()) for x in terms.values()]
        if detection is not None:
            numbers.append(detection.to(device, torch.float32))
        values = torch.stack(numbers)
        self._names = list(terms)
        if device.type == "cuda":
            beside = torch.empty(values.shape, pin_memory=True, device="cpu", dtype=values.dtype)
            self._values = beside.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._values = values
        if device.type == "cpu":
            self._look()

    def _look(self) -> None:
        if self._values is None:
            return
        if self._arrived is not None and not self._arrived.query():
            return
        if self._values.device.type not in ("cpu", "meta") and self._steps % _EVERY:
            return  # of a device without events: by then it has long been computed
        values, self._values, self._arrived = self._values, None, None
        if values.device.type == "meta":
            return
        *numbers, last = values.tolist()
        known = len(numbers) == len(self._names)
        if not known:
            numbers.append(last)
        for name, number in zip(self._names, numbers, strict=True):
            if reason := _reason(name, number, last if known else None):
                self._told = True
                warnings.warn(f"Distiller: {reason}", stacklevel=5)
                return


def _reason(name: str, number: float, detection: float | None) -> str | None:
    if not math.isfinite(number):
        if detection is not None and not math.isfinite(detection):
            return (
                f"{name} is {number}, and so is the detector's own loss ({detection}): the student "
                "has diverged; lower the learning rate, and look for NaN in the images"
            )
        return (
            f"{name} is {number}: look for NaN in the images, the weights or the teacher's maps "
            "with kd.check(images, targets)"
        )
    if detection is not None and 0 < _FAR * abs(detection) < abs(number):
        return (
            f"{name} is {number:.3g}, {abs(number / detection):.0f} times the detector's own loss, "
            "and will drown it; see that the teacher has its trained weights, and lower the "
            "term's weight, or let kd.calibrate(images, targets) set it"
        )
    return None


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
