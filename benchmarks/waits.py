"""Does a step make the host wait for the GPU? `python -m benchmarks waits`.

On a GPU: the ops run as Triton kernels; a step under `torch.cuda.set_sync_debug_mode("error")`, and
a step captured in a CUDA graph whose replay gives the same values. On a CPU nothing can wait; there
the operations that would make a GPU's host wait are counted: those of the definition, and those of
a whole `kd(images, targets)` of real detectors (`detector_waits.py`).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from global_kd import PAPER, RobustDistillLoss
from global_kd.ops.dispatch import backend, force

from .cases import TOLERANCES, with_gradient
from .detector_waits import detectors, places
from .measure import Work, difference, first_line
from .scene import QUICK, Size, make_scene
from .suite import described

# What reads a number from the device, or has an output whose shape depends on values.
WAITING = {
    "aten._local_scalar_dense",
    "aten.equal",
    "aten.is_nonzero",
    "aten.item",
    "aten.masked_select",
    "aten.nonzero",
    "aten.repeat_interleave.Tensor",
    "aten.unique_consecutive",
    "aten._unique2",
}


def makes_wait(func: Any, args: Any) -> bool:
    """Whether an operation, on a GPU, would hold up the host."""
    name = str(func)
    masked = str(func.overloadpacket) in ("aten.index", "aten.index_put") and any(
        isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in args[1] or ()
    )
    return masked or name in WAITING or name.removesuffix(".default") in WAITING


class Waits(TorchDispatchMode):
    """Counts the operations that make a host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if makes_wait(func, args):
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def run(
    *,
    quick: bool,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    compiled: bool = True,
) -> dict[str, Any]:
    size = replace(QUICK if quick else Size(), dtype=dtype)
    scene = make_scene(size, device)
    loss = RobustDistillLoss(scene.strides, **PAPER)
    inputs: dict[str, Any] = scene.inputs()
    work = with_gradient(lambda: list(loss(bank=scene.bank, **inputs).values()), scene.leaves())
    expected = [x.clone() for x in work()]
    checks = (
        {
            "form of the ops": lambda: backend(scene.student[0]),
            "synchronisations": lambda: synchronisations(work),
            "CUDA graph": lambda: graph(work, expected, device, TOLERANCES[dtype]),
        }
        if device.type == "cuda"
        else {"operations that wait, in the definition": lambda: operations(work)}
    )
    found = {}
    for name, check in checks.items():
        try:
            found[name] = check()
        except Exception as error:
            found[name] = first_line(error)
    passed = all(outcome in ("0", "captured", "triton") for outcome in found.values())
    if device.type == "cpu":
        found |= of_detectors(96 if quick else 256)
    return {"size": size.words(), "checks": found, "passed": passed}


def of_detectors(side: int) -> dict[str, str]:
    """Of one kd call each: how many waits, and where they come from."""
    if find_spec("torchvision") is None:
        return {}
    found = {}
    for name, work in detectors(side).items():
        seen = places(work, makes_wait)
        where = ", ".join(f"{n} in {place}" for place, n in sorted(seen.items()))
        found[f"waits in kd of {name}"] = f"{sum(seen.values())}: {where}" if seen else "0"
    return found


def synchronisations(work: Work) -> str:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "0"


def graph(work: Work, expected: Any, device: torch.device, tolerance: float) -> str:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = work()
    for x in results:
        x.detach().fill_(float("nan"))  # the replay has to write every value
    captured.replay()
    torch.cuda.synchronize(device)
    gap = difference(results, expected)
    return "captured" if gap <= tolerance else f"captured, but its values differ by {gap:.1e}"


def operations(work: Work) -> str:
    with force("definition"), Waits() as waits:
        work()
    return "0" if not waits.seen else ", ".join(f"{n} {name}" for name, n in waits.seen.items())


def table(results: Mapping[str, Any]) -> str:
    lines = [described(results["environment"]), results["size"], ""]
    return "\n".join(lines + [f"{name}: {outcome}" for name, outcome in results["checks"].items()])
