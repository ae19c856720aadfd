"""Which form of an op runs: its definition, the one for processors, or the Triton twin."""

import contextlib
import threading
import warnings
from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

from .. import _check

BACKENDS = ("definition", "cpu", "triton")
_forced: list[tuple[int, str]] = []  # by which thread, and what
# GPUs on which the twins have been tried, with maps of which dtype.
_trusted: dict[tuple[torch.device, torch.dtype], bool] = {}


@contextlib.contextmanager
def force(backend: str) -> Iterator[None]:
    """Within this context every op runs in one form, wherever its tensors are.

    ``"definition"`` is plain torch, on any device and under any transform. ``"cpu"`` is the same in
    pieces, with a gradient written by hand. ``"triton"`` needs an
    accelerator, or ``TRITON_INTERPRET=1``.
    """
    _check.one_of("backend", backend, BACKENDS)
    entry = threading.get_ident(), backend
    _forced.append(entry)
    try:
        yield
    finally:
        _forced.remove(entry)


def backend(x: Tensor) -> str:
    """The form that runs for this tensor: what is forced, or the best one for its device.

    While ``torch.compile`` traces a program for the processor it is the definition, which the
    compiler fuses itself. On a GPU it is the Triton twin, after a small trial of the twins against
    their definitions, once per process, GPU and dtype, has gone well; if not, a warning says why.
    """
    form = _forced_here() if _forced else None
    if form is None:
        form = {"cpu": "cpu", "cuda": "triton"}.get(x.device.type, "definition")
        # The twins accumulate in float32: float64 is there to check them.
        if form == "triton" and (x.dtype == torch.float64 or not _twins_work(x.device, x.dtype)):
            form = "definition"
    if form == "cpu" and torch.compiler.is_compiling():
        return "definition"
    return form


def _forced_here() -> str | None:
    """What is forced in this thread: a trial in another one is none of its business."""
    if torch.compiler.is_compiling():  # which knows of no threads
        return _forced[-1][1]
    here = threading.get_ident()
    return next((form for thread, form in reversed(_forced) if thread == here), None)


def _twins_work(device: torch.device, dtype: torch.dtype) -> bool:
    key = device, dtype
    if key in _trusted:
        return _trusted[key]
    if not _good_moment():
        return False  # a later call will have the trial
    _trusted[key] = False  # the trial's own ops
    if find_spec("triton") is not None:
        try:
            from ._triton.trial import trial

            trial(device, dtype)
            _trusted[key] = True
        except torch.cuda.OutOfMemoryError:  # that says nothing about the twins
            del _trusted[key]
            return False
        except Exception as error:  # whatever it is, training goes on
            warnings.warn(
                f"global_kd: the Triton kernels do not work here with {dtype} "
                f"({type(error).__name__}: {error}); the definitions in plain torch take their "
                "place. Please report this",
                stacklevel=2,
            )
        except BaseException:  # interrupted: nor does that
            del _trusted[key]
            raise
    return _trusted[key]


def _good_moment() -> bool:
    """Whether plain ops and a backward can run now, as the trial needs them."""
    return not (
        torch.compiler.is_compiling()
        or torch.cuda.is_current_stream_capturing()
        or torch.is_inference_mode_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None  # vmap, grad and their kin
        or torch.utils._python_dispatch._get_current_dispatch_mode() is not None  # fake tensors
    )
