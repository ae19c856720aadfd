"""Robust distilling module (RDM): global, local and soft-label knowledge under one weight."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from ..instances import assign_levels, pool_levels
from ..ops.imitation import imitation
from ..ops.relation import own_class, relate
from ..prototypes.bank import PrototypeBank
from ..pyramid import check_pyramids
from ..robust import AGREEMENTS, robust_weights
from ..targets import Targets
from .imitation import NORMALIZERS, standardized
from .logits import ACTIVATIONS, CLASS_REDUCTIONS, logit_loss

WEIGHTS = ("omega", "confidence")

PAPER: Mapping[str, Any] = MappingProxyType(
    {
        "foreground": 1.0,
        "background": 4.0,
        "relation": 25.0,  # 5 in the released code, which sums over five levels
        "logits": 1.0,
        "levels": "assigned",
        "standardize": False,
    }
)
"""The released weights: ``GlobalKnowledgeLoss(num_classes, **PAPER)``."""


WEIGHED = ("imitation", "relation", "logits")
"""What robust weights can weigh."""


@dataclass(frozen=True)
class RelationOptions:
    """How relations are taken, and the cosines that omega is made of.

    Attributes:
        own_class: Relate an instance to the prototypes of its own class only, instead of all.
        center: Take cosines (of relation and omega) around the mean prototype of each level and
            space, instead of around zero. Maps whose channels share a large mean have all their
            cosines near 1 otherwise.
        beta: Of the relation's smooth L1.
        agreement: How instances are described for omega and the relation: ``"cosine"``, by their
            cosines to prototypes (released), or ``"projection"``, by their coefficients on them
            (paper), see :func:`global_kd.functional.robust_weights`.
    """

    own_class: bool = False
    center: bool = False
    beta: float = 1.0
    agreement: str = "cosine"

    def __post_init__(self) -> None:
        _check.positive("beta", self.beta)
        _check.one_of("agreement", self.agreement, AGREEMENTS)


@dataclass(frozen=True)
class LabelOptions:
    """How soft labels are taken.

    Attributes:
        temperature: Divides the logits.
        activation: ``"softmax"`` or ``"sigmoid"``, what the class head uses; ``None``: what the
            student's is known to use, else ``"softmax"``.
        class_reduction: ``"mean"`` over classes (released) or ``"sum"``.
    """

    temperature: float = 2.0
    activation: str | None = None
    class_reduction: str = "mean"

    def __post_init__(self) -> None:
        _check.positive("temperature", self.temperature)
        _check.one_of("activation", self.activation or "softmax", ACTIVATIONS)
        _check.one_of("class_reduction", self.class_reduction, CLASS_REDUCTIONS)


class RobustDistillLoss(nn.Module):
    r"""The RDM of Tang et al. 2022: features and a bank in, named terms out. No state.

    .. math:: L = L_{fg} + L_{bg} + L_{relation} + L_{logits}

    Robust weights ``omega (L, R)`` say how far the two spaces agree on each box on each level
    (:func:`global_kd.functional.robust_weights`). Each term is switched by its weight (0 leaves it
    out), and ``robust`` names those that use omega (below, omega also stands for the weights of
    ``weights="confidence"``):

    - ``kd_foreground``, ``kd_background``: :func:`global_kd.functional.imitation_loss`, mean over
      levels;
    - ``kd_relation``: :func:`global_kd.functional.relation_loss`, mean over levels (the released
      code sums over five: its weight 5 is 25 here);
    - ``kd_logits``: :func:`global_kd.functional.logit_loss`.

    The default weights are those of docs/evidence.md (table ``q1-defaults``); the paper's are
    ``**global_kd.PAPER``.

    Args:
        strides: Pixels of the network input per cell of each level, finest first.
        foreground: Weight of the imitation inside boxes.
        background: Weight of the imitation outside boxes.
        relation: Weight of the relation term; off by default, since no study here shows that it
            helps (docs/evidence.md).
        logits: Weight of the soft labels.
        weights: ``"omega"`` (paper), or ``"confidence"``: the teacher's probability of the
            labelled class, given by the caller (:func:`global_kd.functional.confidence_weights`).
        robust: What omega weighs: some of ``"imitation"`` (its foreground), ``"relation"`` and
            ``"logits"`` (each row by the omega of its box on its level), or ``True``, all, or
            ``False``, nothing.
        normalizer: Of the foreground: ``"weights"`` (released) or ``"cells"``.
        levels: ``"assigned"``: a box is foreground on the level of its size only (released);
            ``"all"``: on every level.
        finest_scale: Box side in pixels of the network input up to whose double a box lies on the
            first level; ``None`` is 14 cells of it (56 pixels at stride 4).
        standardize: Divide squared errors by the variance of the teacher's map, per level and
            batch, so that weights mean the same for every teacher (the released code does not);
            of a teacher that hardly varies so that no term is above 10 per level.
        relation_options: How relations, and the cosines behind omega, are taken.
        label_options: How soft labels are taken.
    """

    def __init__(
        self,
        strides: Sequence[float],
        *,
        foreground: float = 2.0,
        background: float = 1.0,
        relation: float = 0.0,
        logits: float = 5.0,
        weights: str = "omega",
        robust: bool | Collection[str] = True,
        normalizer: str = "weights",
        levels: str = "assigned",
        finest_scale: float | None = None,
        standardize: bool = True,
        relation_options: RelationOptions = RelationOptions(),  # noqa: B008  # frozen
        label_options: LabelOptions = LabelOptions(),  # noqa: B008
    ) -> None:
        super().__init__()
        self.strides = tuple(float(s) for s in strides)
        if not self.strides or list(self.strides) != sorted(set(self.strides)):
            raise ValueError(f"strides: expected increasing numbers > 0, but got {list(strides)}")
        _check.positive("strides", self.strides[0])
        self.weights = {
            "foreground": foreground,
            "background": background,
            "relation": relation,
            "logits": logits,
        }
        for name, value in self.weights.items():
            _check.not_negative(name, value)
        if finest_scale is not None:
            _check.positive("finest_scale", finest_scale)
        for name, given, kind in (
            ("relation_options", relation_options, RelationOptions),
            ("label_options", label_options, LabelOptions),
        ):
            if not isinstance(given, kind):
                raise TypeError(f"{name}: expected {kind.__name__}(...), but got {given!r}")
        _check.one_of("normalizer", normalizer, NORMALIZERS)
        _check.one_of("levels", levels, ("assigned", "all"))
        _check.one_of("weights", weights, WEIGHTS)
        self.robust_by = weights
        self.weights = {name: float(value) for name, value in self.weights.items()}
        self.robust = _weighed(robust)
        self.label_options, self.relation_options = label_options, relation_options
        self.normalizer = normalizer
        self.levels = levels
        self.finest_scale = finest_scale
        self.standardize = standardize

    @property
    def foreground(self) -> float:
        """Weight of the imitation inside boxes."""
        return self.weights["foreground"]

    @property
    def background(self) -> float:
        """Weight of the imitation outside boxes."""
        return self.weights["background"]

    @property
    def relation(self) -> float:
        """Weight of the relation term."""
        return self.weights["relation"]

    @property
    def logits(self) -> float:
        """Weight of the soft labels."""
        return self.weights["logits"]

    @property
    def activation(self) -> str:
        """Of the class logits."""
        return self.label_options.activation or "softmax"

    @property
    def imitates(self) -> bool:
        """Whether a term needs adapted maps."""
        return self.foreground > 0 or self.background > 0

    @property
    def uses_prototypes(self) -> bool:
        """Whether any term needs the bank."""
        return self.relation > 0 or (self.robust_by == "omega" and self.weighs)

    @property
    def weighs(self) -> bool:
        """Whether any term weighs its instances."""
        return (
            ("relation" in self.robust and self.relation > 0)
            or ("imitation" in self.robust and self.foreground > 0)
            or ("logits" in self.robust and self.logits > 0)
        )

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        targets: Targets,
        bank: PrototypeBank,
        *,
        adapted: Sequence[Tensor] | None = None,
        student_logits: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        logit_box: Tensor | None = None,
        rows: tuple[Tensor, Tensor] | None = None,
        confidence: Tensor | None = None,
        weighted: bool = True,
        return_weights: bool = False,
    ) -> dict[str, Tensor] | tuple[dict[str, Tensor], Tensor]:
        """The weighted terms of one batch.

        Args:
            student: Unadapted maps ``(B, Cs, H, W)``, one per level; pooled for omega and relation.
            teacher: Maps ``(B, Ct, H, W)`` of the same levels.
            targets: The boxes.
            bank: The prototypes; an empty one gives omega = 1 and a relation of 0.
            adapted: The student's maps in the teacher's channels, for the imitation; ``student``
                itself by default.
            student_logits: ``(N, K)`` class logits; without them there is no ``kd_logits``.
            teacher_logits: ``(N, K)`` of the same rows.
            logit_box: int64 ``(N,)``, for each logit row the index of its box in ``targets``;
                without it soft labels are not weighted by omega.
            rows: Pooled rows ``(L, R, Cs)``, ``(L, R, Ct)`` of the boxes, if already at hand.
            confidence: With ``weights="confidence"`` the weight of each box, ``(R,)``.
            weighted: Multiply the terms by their weights.
            return_weights: Also return omega.

        Returns:
            ``{"kd_foreground", "kd_background", "kd_relation", "kd_logits"}`` without the terms of
            weight 0. With ``return_weights`` a pair of this and omega ``(L, R)``, which is 1 where
            no term asks for it.
        """
        check_pyramids(student, teacher, self.strides)
        teacher = [t.detach() for t in teacher]
        if (student_logits is None) != (teacher_logits is None):
            raise ValueError("student_logits, teacher_logits: expected both or neither")
        terms: dict[str, Tensor] = {}
        levels, boxes = len(self.strides), len(targets)
        omega = torch.ones(levels, boxes, device=student[0].device, dtype=torch.float32)
        given = None  # weights that do not come of prototypes
        if self.robust_by == "confidence" and self.weighs:
            if confidence is None:
                raise ValueError(
                    f"confidence: expected a weight ({boxes},) of each box, since "
                    'weights="confidence", but got None'
                )
            _check.shape("confidence", confidence, (boxes,))
            given = omega = confidence.detach().expand(levels, boxes)
        if self.uses_prototypes:
            if rows is None:
                with torch.set_grad_enabled(self.relation > 0 and torch.is_grad_enabled()):
                    student_rows = pool_levels(student, targets, self.strides)
                rows = student_rows, pool_levels(teacher, targets, self.strides)
            s, t, g_s, g_t, prototype_labels = self._prototypes(rows, bank)
            own = own_class(prototype_labels, targets.labels)
            # Omega comes out of the same cosines, with and without the term.
            relation, found = relate(
                s,
                t,
                g_s,
                g_t,
                pairs=own if self.relation_options.own_class else prototype_labels[:, None, :] >= 0,
                beta=self.relation_options.beta,
                own=own,
                weights=given if "relation" in self.robust else None,
                robust="relation" in self.robust and given is None,
                labels=prototype_labels,
                project=self.relation_options.agreement == "projection",
            )
            omega = found if given is None else given
        level = assign_levels(targets.boxes, self.strides, self.finest_scale)
        if self.imitates:
            foreground, background = self._imitation(
                student if adapted is None else adapted, teacher, targets, omega, level
            )
            if self.foreground:
                terms["foreground"] = foreground
            if self.background:
                terms["background"] = background
        if self.relation:
            terms["relation"] = relation
        if self.logits and student_logits is not None and teacher_logits is not None:
            weights = None
            if "logits" in self.robust and logit_box is not None:
                weights = omega.gather(0, level[None])[0][logit_box]
            terms["logits"] = logit_loss(
                student_logits,
                teacher_logits,
                weights,
                temperature=self.label_options.temperature,
                activation=self.activation,
                class_reduction=self.label_options.class_reduction,
            )
        named = {
            f"kd_{part}": self.weights[part] * value if weighted else value
            for part, value in terms.items()
        }
        return (named, omega) if return_weights else named

    def weigh(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        targets: Targets,
        bank: PrototypeBank,
    ) -> Tensor:
        """Robust weights ``(L, R)`` of the boxes, whatever the switches say; without gradient.

        Those of the prototypes; confidence is not known of maps.
        """
        check_pyramids(student, teacher, self.strides)
        with torch.no_grad():
            rows = (
                pool_levels(student, targets, self.strides),
                pool_levels(teacher, targets, self.strides),
            )
            given = *self._prototypes(rows, bank), targets.labels
            return robust_weights(*given, agreement=self.relation_options.agreement)

    def _prototypes(
        self, rows: tuple[Tensor, Tensor], bank: PrototypeBank
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Rows and prototypes of both spaces, centred if asked, and the prototypes' labels."""
        s, t = rows
        g_s, g_t, labels = bank.flat()
        if self.relation_options.center:
            filled = (labels >= 0)[..., None]
            count = filled.sum(dim=1, keepdim=True).clamp(min=1)
            middle_s = (g_s * filled).sum(dim=1, keepdim=True) / count
            middle_t = (g_t * filled).sum(dim=1, keepdim=True) / count
            s, g_s, t, g_t = s - middle_s, g_s - middle_s, t - middle_t, g_t - middle_t
        return s, t, g_s, g_t, labels

    def _imitation(
        self,
        adapted: Sequence[Tensor],
        teacher: Sequence[Tensor],
        targets: Targets,
        omega: Tensor,
        level: Tensor,
    ) -> tuple[Tensor, Tensor]:
        sums = []
        for i, (s, t, stride) in enumerate(zip(adapted, teacher, self.strides, strict=True)):
            if s.shape != t.shape:
                raise ValueError(
                    f"adapted[{i}]: expected the teacher's shape {tuple(t.shape)}, but got "
                    f"{tuple(s.shape)}; give the loss an adapter"
                )
            both = torch.stack(
                imitation(
                    s,
                    t,
                    targets.boxes,
                    targets.image_index,
                    stride,
                    omega[i] if "imitation" in self.robust else None,
                    self.normalizer,
                    present=level == i if self.levels == "assigned" else None,
                )
            )
            if self.standardize:
                both = standardized(both, t)
            sums.append(both)
        foreground, background = torch.stack(sums).mean(dim=0).unbind()
        return foreground, background

    def extra_repr(self) -> str:
        return (
            f"strides={self.strides}, foreground={self.foreground}, "
            f"background={self.background}, relation={self.relation}, logits={self.logits}"
        )


def _weighed(robust: bool | Collection[str]) -> frozenset[str]:
    if isinstance(robust, bool):
        return frozenset(WEIGHED if robust else ())
    if isinstance(robust, str) or not isinstance(robust, Collection):
        raise TypeError(f"robust: expected True, False or some of {WEIGHED}, but got {robust!r}")
    for name in robust:
        _check.one_of("robust", name, WEIGHED)
    return frozenset(robust)
