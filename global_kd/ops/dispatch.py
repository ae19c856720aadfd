"""Which form of an op runs: its definition, the one for processors, or the Triton twin."""

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

from .. import _check

BACKENDS = ("definition", "cpu", "triton")
_BEST = {"cpu": "cpu", "cuda": "triton" if find_spec("triton") is not None else "definition"}
_forced: list[str] = []


@contextlib.contextmanager
def force(backend: str) -> Iterator[None]:
    """Within this context every op runs in one form, wherever its tensors are.

    ``"definition"`` is plain torch, on any device and under any transform. ``"cpu"`` is the same in
    chunks that stay in the cache, with a gradient written by hand. ``"triton"`` needs an
    accelerator, or ``TRITON_INTERPRET=1``.
    """
    _check.one_of("backend", backend, BACKENDS)
    _forced.append(backend)
    try:
        yield
    finally:
        _forced.pop()


def backend(x: Tensor) -> str:
    """The form that runs for this tensor: what is forced, or the best one for its device.

    While ``torch.compile`` traces a program for the processor it is the definition, which the
    compiler fuses itself.
    """
    form = _forced[-1] if _forced else _BEST.get(x.device.type, "definition")
    if form == "cpu" and torch.compiler.is_compiling():
        return "definition"
    return form
