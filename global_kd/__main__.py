"""``python -m global_kd``: what is installed here, for bug reports."""

import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from ._version import __version__
from .ops.dispatch import backend

FRAMEWORKS = ("torchvision", "detectron2", "ultralytics", "transformers", "mmdet", "lightning")
COMFORTS = ("triton", "tqdm", "safetensors")


def versions() -> dict[str, str]:
    """Names and versions, in the order in which a maintainer asks for them."""
    found = {
        "global_kd": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
    }
    for name in ("numpy", *COMFORTS, *FRAMEWORKS):
        found[name] = _version(name)
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        found["cuda"] = str(torch.version.cuda)
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "processor"
        found[f"ops on {device}"] = f"{backend(torch.zeros(1, device=device))} ({name})"
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-" if find_spec(name) is None else "found, version unknown"


def main() -> None:
    """Print them as a table."""
    rows = versions()
    width = max(map(len, rows))
    print("\n".join(f"{name:{width}}  {value}" for name, value in rows.items()))


if __name__ == "__main__":
    main()
