"""What tells one trained detector from another."""

import hashlib

import torch
from torch import Tensor, nn


def fingerprint(model: nn.Module) -> str:
    """What tells one trained detector from another: 16 hexadecimal digits.

    SHA-256 over names, dtypes, shapes and bytes of all tensors in the ``state_dict``: the same on
    every device and in every process, compiled or not; another number type is another detector. For
    Faster R-CNN with a ResNet-50 (44 million parameters) 0.1 to 0.2 s on one core of a CPU.
    """
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        if isinstance(x, Tensor):
            name = name.replace("_orig_mod.", "")  # of submodules that are compiled
            digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
            flat = x.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
