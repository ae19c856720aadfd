"""Soft labels: the student's class logits follow the teacher's on the same rows."""

from torch import Tensor

from .. import _check
from ..ops.logits import divergences

ACTIVATIONS = ("softmax", "sigmoid")
CLASS_REDUCTIONS = ("mean", "sum")


def logit_loss(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None = None,
    *,
    temperature: float = 2.0,
    activation: str = "softmax",
    class_reduction: str = "mean",
) -> Tensor:
    r"""Weighted Kullback-Leibler divergence of class distributions.

    .. math:: L = \frac{1}{N} \sum_n \omega_n T^2 \frac{1}{K} \sum_k \mathrm{KL}\bigl(
              p^t_{nk} \,\|\, p^s_{nk}\bigr), \qquad p = \mathrm{activation}(z / T)

    The soft-label loss of Tang et al. 2022 with the released normalisers. A softmax head has one
    distribution over ``K`` classes (background included), a sigmoid head ``K`` Bernoulli ones.

    Args:
        student: Logits ``(N, K)``.
        teacher: Logits ``(N, K)`` of the same rows; no gradient.
        weights: ``(N,)``, usually the robust weight of each row's box; no gradient.
        temperature: ``T > 0``.
        activation: ``"softmax"`` or ``"sigmoid"``.
        class_reduction: ``"mean"`` over classes (released) or ``"sum"``.

    Returns:
        A scalar in at least float32; a zero that still back-propagates where ``N = 0``.

    Example:
        >>> import torch
        >>> from global_kd.functional import logit_loss
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> logit_loss(logits, logits).item()
        0.0
    """
    for name, x in (("student", student), ("teacher", teacher)):
        _check.tensor(name, x, 2, "(N, K)")
        _check.floating(name, x)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student: expected the teacher's rows and classes {tuple(teacher.shape)}, "
            f"but got {tuple(student.shape)}"
        )
    _check.positive("temperature", temperature)
    _check.one_of("activation", activation, ACTIVATIONS)
    _check.one_of("class_reduction", class_reduction, CLASS_REDUCTIONS)
    _check.same_device(student=student, teacher=teacher, weights=weights)
    rows = divergences(student, teacher, temperature, activation)
    if class_reduction == "mean":
        rows = rows / max(1, student.shape[1])
    if weights is not None:
        _check.tensor("weights", weights, 1, "(N,)")
        _check.length("weights", weights, student.shape[0])
        rows = rows * weights.detach().to(rows.dtype)
    return temperature**2 * rows.sum() / max(1, student.shape[0])
