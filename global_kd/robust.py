"""Robust weights: how far the two feature spaces agree on an instance."""

import torch
from torch import Tensor

from . import _check
from .ops.cosine import cosines
from .ops.relation import agreement, own_class


@torch.no_grad()
def robust_weights(
    student: Tensor,
    teacher: Tensor,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    prototype_labels: Tensor,
    labels: Tensor,
) -> Tensor:
    r"""Weight in [0, 1] of each instance, from its nearest prototype in either space.

    .. math:: \omega_n = \mathrm{clamp}\bigl(1 - |\max_k \cos(f^s_n, g^s_k)
              - \max_k \cos(f^t_n, g^t_k)|,\ 0,\ 1\bigr)

    with ``k`` over the prototypes of the instance's own class (Tang et al. 2022, Eq. 8; the
    released code leaves the value unclamped and may turn it negative). The two maxima may be
    attained at different prototypes.

    Args:
        student: Pooled student features ``(..., R, Cs)``; the leading dimension, if any, is the
            level.
        teacher: Pooled teacher features ``(..., R, Ct)`` of the same instances.
        student_prototypes: ``(..., P, Cs)``, the prototypes as the student sees them.
        teacher_prototypes: ``(..., P, Ct)``, row for row the same instances.
        prototype_labels: Class of each prototype, int64 ``(..., P)``; -1 marks an empty slot.
        labels: Class of each instance, int64 ``(R,)`` or ``(..., R)``.

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
    _check.paired_rows(student, teacher)
    _check.paired_prototypes(student, teacher, student_prototypes, teacher_prototypes)
    _check.integer("prototype_labels", prototype_labels)
    _check.integer("labels", labels)
    _check.shape("prototype_labels", prototype_labels, student_prototypes.shape[:-1])
    _check.shape("labels", labels, student.shape[:-1] if labels.dim() > 1 else student.shape[-2:-1])
    _check.same_device(student=student, prototype_labels=prototype_labels, labels=labels)
    return agreement(
        cosines(student, student_prototypes),
        cosines(teacher, teacher_prototypes),
        own_class(prototype_labels, labels),
    )
