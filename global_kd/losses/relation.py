"""Global knowledge: how every instance relates to the prototypes."""

import torch
from torch import Tensor

from .. import _check
from ..ops.relation import relate
from ..robust import AGREEMENTS


def relation_loss(
    student: Tensor,
    teacher: Tensor,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    weights: Tensor | None = None,
    *,
    pairs: Tensor | None = None,
    beta: float = 1.0,
    agreement: str = "cosine",
    prototype_labels: Tensor | None = None,
) -> Tensor:
    r"""Difference of the instance-to-prototype cosines in the two spaces.

    .. math:: L = \frac{1}{|P|} \sum_{(n, p) \in P} \mathrm{smoothL1}_\beta\bigl(
              \omega_n \cos(f^s_n, g^s_p),\ \omega_n \cos(f^t_n, g^t_p)\bigr)

    the global loss of Tang et al. 2022, Eq. 6, in its released form. Only ``student`` gets a
    gradient: its features are taken *before* the adapter, in the space the student prototypes
    live in.

    With ``agreement="projection"`` the coefficients of an instance on the prototypes of each class
    stand in place of its cosines, as the paper has it, see
    :func:`global_kd.functional.robust_weights`.

    Args:
        student: Pooled student features ``(..., R, Cs)``; the leading dimension, if any, is the
            level, and the result is the mean over levels.
        teacher: ``(..., R, Ct)``.
        student_prototypes: ``(..., P, Cs)``.
        teacher_prototypes: ``(..., P, Ct)``, row for row the same instances.
        weights: Robust weights ``(..., R)``.
        pairs: Bool, broadcastable to ``(..., R, P)``: which pairs count; all by default.
        beta: Difference at which the square turns linear, > 0.
        agreement: ``"cosine"`` (released) or ``"projection"``.
        prototype_labels: Class of each prototype, int64 ``(..., P)``, -1 an empty slot, for
            ``"projection"``: each class is a basis of its own. ``None``: all are one basis.

    Returns:
        A scalar in at least float32; a zero that still back-propagates where no pair counts.

    Example:
        >>> import torch
        >>> from global_kd.functional import relation_loss
        >>> prototypes = torch.eye(2)
        >>> s, t = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> relation_loss(s, t, prototypes, prototypes).item()  # cosines (1, 0) against (0, 1)
        0.5
    """
    _check.paired_rows(student, teacher)
    _check.paired_prototypes(student, teacher, student_prototypes, teacher_prototypes)
    _check.positive("beta", beta)
    _check.one_of("agreement", agreement, AGREEMENTS)
    if prototype_labels is not None:
        _check.integer("prototype_labels", prototype_labels)
        _check.shape("prototype_labels", prototype_labels, student_prototypes.shape[:-1])
    if weights is not None:
        _check.tensor("weights", weights, None, "(..., R)")
        _check.shape("weights", weights, student.shape[:-1])
    whole = (*student.shape[:-1], student_prototypes.shape[-2])
    if pairs is not None:
        _check.tensor("pairs", pairs, None, "(..., R, P) of bool")
        if pairs.dtype != torch.bool:
            raise TypeError(f"pairs: expected a bool tensor, but got {pairs.dtype}")
        fits = zip(reversed(pairs.shape), reversed(whole), strict=False)
        if pairs.dim() > len(whole) or any(size not in (1, full) for size, full in fits):
            raise ValueError(
                f"pairs: expected a shape broadcastable to {whole}, but got {tuple(pairs.shape)}"
            )
    _check.same_device(
        student=student, weights=weights, pairs=pairs, prototype_labels=prototype_labels
    )
    loss, _ = relate(
        student,
        teacher,
        student_prototypes,
        teacher_prototypes,
        pairs=pairs,
        beta=beta,
        weights=weights,
        labels=prototype_labels,
        project=agreement == "projection",
    )
    return loss
