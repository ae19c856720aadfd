"""Files the examples write and read: complete or absent, and only plain tensors believed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch


def cache_folder() -> Path:
    """Where data and teachers are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "global_kd"


def require_disk(folder: Path, needed: int, purpose: str) -> None:
    """End the program unless `folder` (made here) has `needed` bytes left for `purpose`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"Cannot make the folder {folder}: {error.strerror}.") from None
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(
            f"Too little disk: {purpose} needs {needed / 1e6:.0f} MB in {folder}, "
            f"which has {free / 1e6:.0f} MB left."
        )


def save(content: Any, path: Path) -> None:
    """`torch.save` that never leaves half a file under the name `path`."""
    fresh = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, fresh)
        os.replace(fresh, path)
    except (OSError, RuntimeError) as error:
        fresh.unlink(missing_ok=True)
        raise SystemExit(f"Cannot write {path}: {first_line(error)}.") from None


def load(path: Path) -> Any:
    """What `save` wrote, tensors and plain values only; None if it is missing or damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file can make the reader raise anything
        return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without its full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
