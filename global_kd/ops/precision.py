"""The dtype in which sums are taken."""

import torch
from torch import Tensor


def accumulate(x: Tensor) -> Tensor:
    """``x`` in at least float32, so that half-precision maps are reduced exactly enough.

    float64 stays float64, which keeps gradcheck meaningful.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))
