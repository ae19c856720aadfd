"""What a number was measured on."""

import os
import platform
import resource
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy
import torch


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """The machine, the versions and the commit; no names of hosts, users or folders.

    With a device also what accelerates it.
    """
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "niceness": os.nice(0) if hasattr(os, "nice") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        **({} if device is None else {"device": device.type, "gpu": gpu(device), **packages()}),
    }


def gpu(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    known = torch.cuda.get_device_properties(device)
    driver, clocks = nvidia_smi("driver_version", "clocks.max.sm,clocks.max.memory,power.limit")
    return {
        "name": known.name,
        "capability": f"{known.major}.{known.minor}",
        "memory_bytes": known.total_memory,
        "multiprocessors": known.multi_processor_count,
        "cuda": torch.version.cuda,
        "driver": driver,
        "max_clocks_and_power": clocks,
    }


def nvidia_smi(*questions: str) -> list[str | None]:
    answers: list[str | None] = []
    for question in questions:
        words = ["nvidia-smi", f"--query-gpu={question}", "--format=csv,noheader", "--id=0"]
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30)
            answers.append(done.stdout.strip())
        except (OSError, subprocess.SubprocessError):
            answers.append(None)
    return answers


def packages() -> dict[str, str | None]:
    """Versions of what some contestants need."""
    found: dict[str, str | None] = {}
    for name in ("triton", "torchvision"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str:
    """The commit that is measured, with `+changes` if the files differ from it."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "..", ":(exclude)results")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_memory() -> int:
    """The most bytes that this process ever held in memory.

    Linux hands `ru_maxrss` on to a started process, so a child of a large parent would report the
    parent's peak; `VmHWM` belongs to the process alone and is preferred where it exists.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
