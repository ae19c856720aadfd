"""The yardstick: prototype pursuit as the released code of the paper computes it.

Our own expression of that formulation, as the definition reads: the residuals of all instances are
kept as rows, and on every pick the residuals that each candidate would leave are formed, squared
and summed. Time and memory are O(Q N C) a pick. The released code runs it in float16 on a GPU; here
it takes the type and the device of its input.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def pursuit(
    student: Tensor,
    teacher: Tensor,
    num_prototypes: int,
    *,
    candidates: Tensor,
    alpha: float = 10.0,
    unique: bool = False,
) -> Tensor:
    """Picks among `candidates` (Q,), in order; rows are student (N, Cs) and teacher (N, Ct).

    `unique=False` is what was released; `unique=True` bars a row once it is picked.
    """
    residual_s, residual_t = normalize(student, dim=1), normalize(teacher, dim=1)
    atoms_s, atoms_t = residual_s[candidates], residual_t[candidates]
    barred = torch.zeros(len(candidates), dtype=torch.bool, device=student.device)
    picks = []
    for _ in range(num_prototypes):
        a, b = atoms_s @ residual_s.T, atoms_t @ residual_t.T  # (Q, N)
        shared = alpha * (a + b)
        w_s, w_t = (shared + a) / (1 + 2 * alpha), (shared + b) / (1 + 2 * alpha)
        left_s = residual_s[None] - w_s[:, :, None] * atoms_s[:, None, :]  # (Q, N, Cs)
        error = left_s.square().sum(dim=(1, 2))
        del left_s
        left_t = residual_t[None] - w_t[:, :, None] * atoms_t[:, None, :]  # (Q, N, Ct)
        error += left_t.square().sum(dim=(1, 2))
        del left_t
        error += alpha * (w_s - w_t).square().sum(dim=1)
        pick = int(error.masked_fill(barred, torch.inf).argmin())
        picks.append(pick)
        barred[pick] = unique
        residual_s = residual_s - torch.outer(w_s[pick], atoms_s[pick])
        residual_t = residual_t - torch.outer(w_t[pick], atoms_t[pick])
    return candidates[torch.tensor(picks, device=candidates.device)]


def density_candidates(
    student: Tensor, teacher: Tensor, *, bandwidth: float = 0.1, quantile: float = 0.4
) -> Tensor:
    """Rows whose density is strictly above the quantile in both spaces, as released."""
    keep = torch.ones(len(student), dtype=torch.bool, device=student.device)
    for rows in (student, teacher):
        unit = normalize(rows, dim=1)
        density = (-(((1 - unit @ unit.T) / bandwidth) ** 2)).exp().sum(dim=1)
        keep &= density > density.sort().values[int(quantile * len(rows))]
    return keep.nonzero()[:, 0]
