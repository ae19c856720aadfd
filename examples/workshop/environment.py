"""Where the numbers of a results file were made."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import torchvision


def environment() -> dict[str, Any]:
    """The commit and the versions; no names of hosts, users or folders."""
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True
    )
    return {
        "commit": commit.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
    }
