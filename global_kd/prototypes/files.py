"""Files of named tensors with plain metadata; reading one never runs code from it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    *,
    kind: str,
    version: int,
) -> None:
    """Save tensors and metadata (what JSON can hold), complete or not at all.

    Args:
        path: ``.safetensors`` for that format, its metadata in the header; else ``torch.save``.
        tensors: By name, on any device.
        metadata: By name.
        kind: What the file is, to be told from others.
        version: Number of the layout; :func:`read` refuses higher ones than it knows.

    Raises:
        ImportError: The suffix asks for safetensors, which is not installed.
    """
    path = Path(path)
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    header = {"kind": kind, "format": version, **metadata}
    packed = None
    if path.suffix == ".safetensors":
        strings = {name: json.dumps(x) for name, x in header.items()}
        packed = _safetensors().save(tensors, metadata=strings)
    # Beside its goal: a rename within one folder cannot stop half way.
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(fresh, "wb") as file:
            if packed is None:
                torch.save({"metadata": header, **tensors}, file)
            else:
                file.write(packed)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def read(
    path: str | os.PathLike[str], *, kind: str, version: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the metadata that :func:`write` saved.

    Raises:
        OSError: No such file, or it may not be read.
        ValueError: A file of another kind, of a later layout, or damaged.
        ImportError: It needs safetensors, which is not installed.
    """
    path, load = Path(path), _load
    if path.suffix == ".safetensors":
        _safetensors()
        load = _load_safetensors
    try:
        tensors, header = load(path)
    except OSError:
        raise
    except Exception as error:  # the readers raise anything on a file that is not theirs
        message = f"{path}: expected a {kind}, but this file cannot be read as one"
        raise ValueError(message) from error
    if header.get("kind") != kind:
        raise ValueError(
            f"{path}: expected a {kind}, but got {header.get('kind', 'something else')}"
        )
    found = header.get("format")
    if not isinstance(found, int) or found > version:
        raise ValueError(
            f"{path}: expected format {version} or an earlier one, but got {found}, written by "
            f"global_kd {header.get('version')}; this library is too old for it"
        )
    return tensors, {k: x for k, x in header.items() if k not in ("kind", "format")}


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    header = dict(content.pop("metadata", {}))
    return {name: x for name, x in content.items() if isinstance(x, Tensor)}, header


def _load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = {name: json.loads(x) for name, x in (file.metadata() or {}).items()}
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "path: '.safetensors' files need the package safetensors: pip install safetensors; "
            "with another suffix, such as '.pt', torch alone writes and reads the file"
        ) from error
    module: ModuleType = safetensors.torch
    return module
