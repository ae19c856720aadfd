"""Robust weights: how far two spaces agree on an instance, or how sure the teacher is of it."""

import torch
from torch import Tensor

from . import _check
from .ops import projection, relation
from .ops.cosine import cosines

AGREEMENTS = ("cosine", "projection")


@torch.no_grad()
def robust_weights(
    student: Tensor,
    teacher: Tensor,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    prototype_labels: Tensor,
    labels: Tensor,
    *,
    agreement: str = "cosine",
) -> Tensor:
    r"""Weight in [0, 1] of each instance, from its nearest prototype in either space.

    .. math:: \omega_n = \mathrm{clamp}\bigl(1 - |\max_k \cos(f^s_n, g^s_k)
              - \max_k \cos(f^t_n, g^t_k)|,\ 0,\ 1\bigr)

    with ``k`` over the prototypes of the instance's own class (Tang et al. 2022, Eq. 8; the
    released code leaves the value unclamped and may turn it negative). The two maxima may be
    attained at different prototypes.

    ``agreement="projection"`` compares what is left of the paper's own figure, which projects an
    instance onto the prototypes and measures the discrepancy there (third-hand: the paper's body
    could not be read). With ``alpha`` the coefficients of the unit row on the ``K`` unit
    prototypes ``G`` of its class, ``(G G^T + 0.01 I)^{-1} G f``,

    .. math:: \omega_n = 1 - \mathrm{clamp}\bigl(\|\alpha^s_n - \alpha^t_n\| / \sqrt K,\ 0,\ 1\bigr)

    Args:
        student: Pooled student features ``(..., R, Cs)``; the leading dimension, if any, is the
            level.
        teacher: Pooled teacher features ``(..., R, Ct)`` of the same instances.
        student_prototypes: ``(..., P, Cs)``, the prototypes as the student sees them.
        teacher_prototypes: ``(..., P, Ct)``, row for row the same instances.
        prototype_labels: Class of each prototype, int64 ``(..., P)``; -1 marks an empty slot.
        labels: Class of each instance, int64 ``(R,)`` or ``(..., R)``.
        agreement: ``"cosine"`` (released) or ``"projection"``.

    Returns:
        ``(..., R)`` in at least float32, without gradient. A class without prototypes has weight 1.

    Example:
        >>> import torch
        >>> from global_kd.functional import robust_weights
        >>> prototypes = torch.eye(2)
        >>> seen = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> w = robust_weights(
        ...     seen,
        ...     torch.eye(2),
        ...     prototypes,
        ...     prototypes,
        ...     prototype_labels=torch.tensor([0, 1]),
        ...     labels=torch.tensor([0, 1]),
        ... )
        >>> [round(v, 4) for v in w.tolist()]  # 1 - (1 - cos 45 deg) for the second
        [1.0, 0.7071]
    """
    _check.one_of("agreement", agreement, AGREEMENTS)
    _check.paired_rows(student, teacher)
    _check.paired_prototypes(student, teacher, student_prototypes, teacher_prototypes)
    _check.integer("prototype_labels", prototype_labels)
    _check.integer("labels", labels)
    _check.shape("prototype_labels", prototype_labels, student_prototypes.shape[:-1])
    _check.shape("labels", labels, student.shape[:-1] if labels.dim() > 1 else student.shape[-2:-1])
    _check.same_device(student=student, prototype_labels=prototype_labels, labels=labels)
    own = relation.own_class(prototype_labels, labels)
    if agreement == "projection":
        a_s = projection.coefficients(student, student_prototypes, prototype_labels)
        a_t = projection.coefficients(teacher, teacher_prototypes, prototype_labels)
        return projection.agreement(a_s, a_t.to(a_s.dtype), own)
    return relation.agreement(
        cosines(student, student_prototypes), cosines(teacher, teacher_prototypes), own
    )


@torch.no_grad()
def confidence_weights(logits: Tensor, labels: Tensor, *, activation: str = "softmax") -> Tensor:
    r"""Weight in [0, 1] of each row: the teacher's probability of the class that it is labelled.

    .. math:: c_n = p^t_{n, y_n}, \qquad p = \mathrm{activation}(z)

    Not of the paper: where annotations are wrong, this tells it and the agreement of feature spaces
    (:func:`robust_weights`) does not (docs/label_errors.md).

    Args:
        logits: The teacher's class logits ``(N, K)``, the background included if it is counted.
        labels: Column of each row's class, int64 ``(N,)``.
        activation: ``"softmax"`` or ``"sigmoid"``, what the head uses.

    Returns:
        ``(N,)`` in at least float32, without gradient. A label that is no column has weight 1.

    Example:
        >>> import torch
        >>> from global_kd.functional import confidence_weights
        >>> confidence_weights(torch.tensor([[0.0, 0.0], [9.0, -9.0]]), torch.tensor([1, 0]))
        tensor([0.5000, 1.0000])
    """
    _check.tensor("logits", logits, 2, "(N, K)")
    _check.floating("logits", logits)
    _check.integer("labels", labels)
    _check.shape("labels", labels, logits.shape[:1])
    _check.one_of("activation", activation, ("softmax", "sigmoid"))
    _check.same_device(logits=logits, labels=labels)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    p = z.softmax(dim=1) if activation == "softmax" else z.sigmoid()
    known = (labels >= 0) & (labels < z.shape[1])
    column = torch.where(known, labels, 0)
    return torch.where(known, p.gather(1, column[:, None])[:, 0], 1.0)
