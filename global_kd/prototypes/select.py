"""Which instances act as common basis vectors of both feature spaces: pure functions of rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _check
from ..ops.cosine import unit_rows

_DENSITY_CHUNK = 2**24  # similarities held at once, at most


def density_candidates(
    student: Tensor, teacher: Tensor, *, bandwidth: float = 0.1, quantile: float = 0.4
) -> Tensor:
    r"""Instances that lie in dense regions of both spaces: the candidates for prototypes.

    .. math:: \rho_i = \sum_j \exp\bigl(-((1 - \langle u_i, u_j \rangle) / b)^2\bigr)

    with ``u`` the unit rows. An instance stays if its density is above the ``quantile`` in *both*
    spaces (Tang et al. 2022, candidate selection; the released strict comparison). Where that
    leaves nobody (few, or equally dense instances), the ``ceil((1 - quantile) N)`` instances of
    largest summed density stay, the earlier one on a tie: every ``N >= 1`` has a candidate.

    Args:
        student: Rows ``(N, Cs)`` of one class on one level.
        teacher: Rows ``(N, Ct)`` of the same instances.
        bandwidth: ``b > 0``, in units of cosine distance.
        quantile: In ``[0, 1)``.

    Returns:
        int64 ``(Q,)``, ascending; ``1 <= Q <= N``, or empty where ``N = 0``. Time O(N^2 C),
        memory O(N) (in chunks).
    """
    _check.paired_rows(student, teacher)
    _check.tensor("student", student, 2, "(N, Cs)")
    _check.positive("bandwidth", bandwidth)
    if not 0 <= quantile < 1:
        raise ValueError(f"quantile: expected a number in [0, 1), but got {quantile!r}")
    count = student.shape[0]
    if count == 0:
        return torch.zeros(0, dtype=torch.int64, device=student.device)
    with torch.no_grad():
        densities = torch.stack([_density(x, bandwidth) for x in (student, teacher)])
        rank = min(int(quantile * count), count - 1)
        cut = densities.sort(dim=1).values[:, rank : rank + 1]
        kept = (densities > cut).all(dim=0).nonzero()[:, 0]
        if len(kept):
            return kept
        keep = count - int(quantile * count)
        order = densities.sum(dim=0).sort(descending=True, stable=True).indices
        return order[:keep].sort().values


def _density(rows: Tensor, bandwidth: float) -> Tensor:
    u = unit_rows(rows.to(_double(rows)))
    chunks = u.split(max(1, _DENSITY_CHUNK // u.shape[0]))
    return torch.cat([(-(((1 - c @ u.T) / bandwidth).square())).exp_().sum(dim=1) for c in chunks])


def _double(x: Tensor) -> torch.dtype:
    """float64 where the device has it: ties between picks must not depend on rounding."""
    return torch.float32 if x.device.type == "mps" else torch.float64


class Moments(NamedTuple):
    """Second moments of paired unit rows; they add over chunks, batches and ranks.

    ``student (Cs, Cs)`` = sum of u_s u_s^T, ``teacher (Ct, Ct)`` = sum of u_t u_t^T,
    ``cross (Cs, Ct)`` = sum of u_s u_t^T.
    """

    student: Tensor
    teacher: Tensor
    cross: Tensor

    @classmethod
    def of(cls, student: Tensor, teacher: Tensor) -> "Moments":
        """Moments of unit rows ``(N, Cs)`` and ``(N, Ct)``."""
        return cls(student.T @ student, teacher.T @ teacher, student.T @ teacher)


def select_prototypes(
    student: Tensor,
    teacher: Tensor,
    num_prototypes: int = 10,
    *,
    alpha: float = 10.0,
    candidates: Tensor | None = None,
    unique: bool = True,
) -> Tensor:
    r"""Greedy dual-space matching pursuit: the instances that best span all others in both spaces.

    Each pick ``k`` minimises, over the residuals ``R`` left by earlier picks (at first the unit
    rows of *all* instances) and with the jointly best coefficients ``w``,

    .. math:: \|R^s - w^s p_k^{sT}\|^2 + \|R^t - w^t p_k^{tT}\|^2 + \alpha \|w^s - w^t\|^2

    (Tang et al. 2022, Eq. 1 to 4). The pursuit runs on second moments in float64: the picks are
    those of the definition, at a cost of O(N C^2) once and O(Q C + C^2) per pick.

    Args:
        student: Rows ``(N, Cs)`` of one class on one level.
        teacher: Rows ``(N, Ct)`` of the same instances.
        num_prototypes: How many to pick, >= 1.
        alpha: Weight >= 0 of the agreement of both spaces' coefficients.
        candidates: int64 ``(Q,)``, the instances that may be picked; all by default.
        unique: Never pick an instance twice (the released code may).

    Returns:
        int64 indices into the rows, in the order picked: ``num_prototypes`` of them, or as many as
        there are candidates. Rows that are all zero in either space are no basis vectors and never
        picked. On a tie the lower index wins. Nothing is random.

    Example:
        >>> import torch
        >>> from global_kd.functional import select_prototypes
        >>> rows = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, -0.1]])
        >>> select_prototypes(rows, rows, num_prototypes=2)  # the middle of three, then the fourth
        tensor([0, 2])
    """
    _check.paired_rows(student, teacher)
    _check.tensor("student", student, 2, "(N, Cs)")
    _check.positive("num_prototypes", num_prototypes)
    _check.not_negative("alpha", alpha)
    with torch.no_grad():
        u_s = unit_rows(student.to(_double(student)))
        u_t = unit_rows(teacher.to(_double(teacher)))
        moments = Moments.of(u_s, u_t)
        if candidates is None:
            return pursue(u_s, u_t, moments, num_prototypes, alpha=alpha, unique=unique)
        _check.tensor("candidates", candidates, 1, "(Q,)")
        _check.integer("candidates", candidates)
        _check.same_device(student=student, candidates=candidates)
        outside = (candidates < 0) | (candidates >= student.shape[0])
        if outside.any():
            raise ValueError(
                f"candidates: expected indices in [0, {student.shape[0]}), but got "
                f"{int(candidates[outside][0])}"
            )
        candidates = candidates.unique()  # ascending, and named twice is named once
        u_s, u_t = u_s[candidates], u_t[candidates]
        picks = pursue(u_s, u_t, moments, num_prototypes, alpha=alpha, unique=unique)
        return candidates[picks]


def pursue(
    student: Tensor,
    teacher: Tensor,
    moments: Moments,
    num_prototypes: int,
    *,
    alpha: float,
    unique: bool = True,
) -> Tensor:
    """The pursuit itself, from unit candidate rows ``(Q, C)`` and the moments of all rows.

    With ``p = (1 + alpha) / (1 + 2 alpha)`` and ``q = alpha / (1 + 2 alpha)`` the coefficients on a
    pick ``(x_s, x_t)`` are ``w_s = p R_s x_s + q R_t x_t`` and ``w_t = q R_s x_s + p R_t x_t``.
    Every product of ``w`` and ``R`` that the next pick needs is a product of moments.
    """
    cov_s, cov_t, cross = (m.clone() for m in moments)
    p, q = (1 + alpha) / (1 + 2 * alpha), alpha / (1 + 2 * alpha)
    q_ss = ((student @ cov_s) * student).sum(dim=1)
    q_tt = ((teacher @ cov_t) * teacher).sum(dim=1)
    q_st = ((student @ cross) * teacher).sum(dim=1)
    # A row without length is no basis vector.
    barred = ~(student.any(dim=1) & teacher.any(dim=1))
    usable = int((~barred).sum())
    rounds = min(num_prototypes, usable) if unique else num_prototypes * (usable > 0)
    picks = torch.zeros(rounds, dtype=torch.int64, device=student.device)
    for i in range(rounds):
        # Tensors all the way: a device is never asked which candidate won.
        gain = (p * (q_ss + q_tt) + 2 * q * q_st).masked_fill(barred, -torch.inf)
        pick = gain.argmax(keepdim=True)
        picks[i : i + 1] = pick
        if unique:
            barred = barred.index_fill(0, pick, True)
        x_s, x_t = student[pick[0]], teacher[pick[0]]
        h_s, h_t, g_s, g_t = cov_s @ x_s, cov_t @ x_t, cross @ x_t, x_s @ cross
        # R_s^T w_s, R_t^T w_t, R_s^T w_t, R_t^T w_s
        ss, tt, st, ts = p * h_s + q * g_s, q * g_t + p * h_t, q * h_s + p * g_s, p * g_t + q * h_t
        a, b, c = x_s @ h_s, x_t @ h_t, x_s @ g_s
        w_ss = p * p * a + 2 * p * q * c + q * q * b
        w_tt = q * q * a + 2 * p * q * c + p * p * b
        w_st = p * q * (a + b) + (p * p + q * q) * c
        # With half of the last terms inside, each update is a sum of two outer products, in place.
        ss, tt, st = ss - 0.5 * w_ss * x_s, tt - 0.5 * w_tt * x_t, st - w_st * x_s
        k_s, k_ss, k_st = (student @ torch.stack([x_s, ss, st], dim=1)).unbind(dim=1)
        k_t, k_tt, k_ts = (teacher @ torch.stack([x_t, tt, ts], dim=1)).unbind(dim=1)
        q_ss -= 2 * k_ss * k_s
        q_tt -= 2 * k_tt * k_t
        q_st -= k_st * k_t + k_s * k_ts
        cov_s.addmm_(torch.stack([ss, x_s], dim=1), torch.stack([x_s, ss]), alpha=-1)
        cov_t.addmm_(torch.stack([tt, x_t], dim=1), torch.stack([x_t, tt]), alpha=-1)
        cross.addmm_(torch.stack([st, x_s], dim=1), torch.stack([x_t, ts]), alpha=-1)
    return picks
