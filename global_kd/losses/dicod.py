"""DICOD: an image classifier teaches a detector (Guo et al., NeurIPS 2021)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import _check
from ..ops.crop_boxes import crop_boxes
from ..ops.logits import divergences
from ..ops.precision import accumulate
from ..step import Step
from .base import Common, DistillLoss, Levels
from .logits import ACTIVATIONS

if TYPE_CHECKING:
    from typing_extensions import Unpack

_POOL_PIXELS, _POOL_STEM = 4, 8


def _class_rows(
    student: Tensor, teacher: Tensor, columns: Tensor | None, temperature: float, activation: str
) -> Tensor:
    """``T^2 KL`` of each row; the student's other columns have probability 0 in the teacher."""
    if activation == "sigmoid":
        student = student if columns is None else student[:, columns]
        return (
            temperature**2
            * divergences(student, teacher, temperature, activation)
            / max(1, teacher.shape[1])
        )
    log_s = (accumulate(student) / temperature).log_softmax(dim=1)
    log_t = (accumulate(teacher.detach()) / temperature).to(log_s.dtype).log_softmax(dim=1)
    log_s = log_s if columns is None else log_s[:, columns]
    return temperature**2 * (log_t.exp() * (log_t - log_s)).sum(dim=1)


class DICOD(DistillLoss):
    r"""Learn from an image classifier that looks at the objects alone.

    "Distilling Image Classifiers in Object Detectors", NeurIPS 2021. The teacher is a classifier
    that was trained on crops of the ground truth; the maps of a detector are not used. On the
    rows that the student's loss trains as objects, ``K`` of them,

    .. math:: L_{classes} = \frac{T^2}{K} \sum_i \mathrm{KL}\bigl(p(g_i) \| q_i\bigr), \qquad
              L_{location} = \frac{1}{K} \sum_i \sum_\ell \operatorname{mean}
              \bigl|P_\ell F_\ell(\mathrm{crop}(b_i)) - P_\ell F_\ell(\mathrm{crop}(g_i))\bigr|

    with ``p`` the classifier's distribution on the crop of the ground truth, ``q`` the student's,
    ``b`` its box, ``g`` the ground truth, ``F`` the pixels themselves (pooled 4 x 4) and the
    classifier's first convolution (pooled 8 x 8). A sigmoid head has one divergence for each class,
    of which the mean is taken. The second term trains the boxes alone.

    It needs ground truth, the student's network input and, for ``classes``, the fact ``positives``.
    The boxes of ``location`` come from ``regions``, or else from a dense head's ``boxes`` and what
    is ``assigned``.

    The classifier is called once for each ``Targets.ids``: its logits are kept on the processor, so
    from the second epoch on ``classes`` costs nothing. They are those of the first view of an
    object, flipped and scaled as it was; they are not in ``state_dict``. Finding them, and finding
    the positives, makes the host wait for the device.

    Changed from the released code, of which only the equations were used: no image is copied for
    each box; divergences come from logits, without 1e-10 in a logarithm; boxes are not clipped,
    what lies beyond an image is its border. The flip of probabilities in the paper's binary
    divergence changes nothing and is left out.

    Args:
        classifier: Crops ``(N, C, size, size)`` in, logits ``(N, classes)`` out. It is frozen, put
            into eval mode at each step and moved to the images; it is in no module tree and no
            ``state_dict``.
        classes: Weight. Default 0.4.
        location: Weight. Default 0.15.
        temperature: ``T``.
        size: Pixels of a crop's side.
        columns: For each class of the classifier the student's column, ``range(1, 91)`` where
            column 0 is the background. ``None``: the same columns.
        activation: Of the student's class logits; ``None``: that of the detector.
        preprocess: From crops of the student's network input to the classifier's input, where the
            two are normalised differently.
        stem: What ``location`` looks at beside pixels; called on a preprocessed crop. ``"first"``:
            the classifier's first convolution. ``None``: pixels only.
        cache: Keep the logits of objects with ids.
        max_crops: Boxes in ``location`` at a step, evenly drawn; ``None``: all.
        **common: See :class:`global_kd.losses.DistillLoss`.
    """

    name = "dicod"
    needs = frozenset({"targets", "images"})

    def __init__(
        self,
        classifier: nn.Module,
        *,
        classes: float | None = None,
        location: float | None = None,
        temperature: float = 2.0,
        size: int = 112,
        columns: Sequence[int] | None = None,
        activation: str | None = None,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        stem: nn.Module | str | None = "first",
        cache: bool = True,
        max_crops: int | None = None,
        **common: Unpack[Common],
    ) -> None:
        if not isinstance(classifier, nn.Module):
            raise TypeError(f"classifier: expected a module, but got {type(classifier).__name__}")
        if isinstance(stem, str):
            _check.one_of("stem", stem, ("first",))
            stem = next((x for x in classifier.modules() if isinstance(x, nn.Conv2d)), None)
            if stem is None and location != 0:
                raise ValueError("stem: expected a classifier with a Conv2d; pass stem=None")
        if activation is not None:
            _check.one_of("activation", activation, ACTIVATIONS)
        _check.positive("temperature", temperature)
        _check.count("size", size)
        _check.count("max_crops", max_crops)
        for module in (classifier, stem):
            if module is not None:
                module.requires_grad_(False)
        # In a tuple, modules are no children.
        self._outside: tuple[nn.Module, nn.Module | None] = (classifier, stem)
        self.temperature, self.size, self.activation = temperature, size, activation
        self.columns = None if columns is None else tuple(columns)
        self.preprocess, self.cache, self.max_crops = preprocess, cache, max_crops
        self._kept: dict[int, Tensor] = {}
        if classes != 0:
            self.needs = self.needs | {"positives"}
        if location != 0:
            self.wishes = frozenset({"regions", "boxes", "assigned"})
        usual = {"one-stage": {"classes": 0.4, "location": 0.15}}
        super().__init__({"classes": classes, "location": location}, usual, **common)

    @property
    def adapts(self) -> bool:
        return False

    @property
    def classifier(self) -> nn.Module:
        """The teacher."""
        return self._outside[0]

    def make(self, levels: Levels) -> None:
        two_stage = (self._family or levels.family) == "two-stage"
        usual = levels.activation or ("softmax" if two_stage else "sigmoid")
        self._activation = self.activation or usual
        columns = None if self.columns is None else torch.tensor(self.columns)
        self.register_buffer("_columns", columns, persistent=False)

    def terms(self, step: Step) -> dict[str, Tensor]:
        assert step.images is not None
        for module in self._outside:
            if module is not None:
                module.to(step.images.device).eval()
        terms = {}
        if self.wants("classes"):
            terms["classes"] = self._class_term(step)
        # Asked for by name, the term must come; by default it comes where the boxes are known.
        if self.wants("location") and (
            self._has_boxes(step) or self._given["location"] is not None
        ):
            terms["location"] = self._location_term(step)
        return terms

    # Classes ------------------------------------------------------------------------------------

    def _class_term(self, step: Step) -> Tensor:
        positives, targets = step.positives, step.targets
        assert positives is not None and targets is not None
        student, box = positives.student, positives.logit_box
        if student is None:
            raise ValueError("positives: DICOD expected class logits of the student, but got None")
        if not len(student) or not len(targets):
            return accumulate(student[:0]).sum()
        teacher = self._judge(step)
        columns = self._buffers["_columns"]
        expected = student.shape[1] if columns is None else len(columns)
        if teacher.shape[1] != expected:
            raise ValueError(
                f"columns: expected the student's column of each of the classifier's "
                f"{teacher.shape[1]} classes, but got {expected}; pass columns=range(1, "
                f"{teacher.shape[1] + 1}) where column 0 is the background, "
                f"range({teacher.shape[1]}) where it is the last"
            )
        columns = None if columns is None else columns.to(student.device)
        rows = _class_rows(student, teacher[box], columns, self.temperature, self._activation)
        return _weighted_mean(rows, self.row_weights(step, box))

    @torch.no_grad()
    def _judge(self, step: Step) -> Tensor:
        """The classifier's logits of every target, ``(R, classes)``."""
        assert step.targets is not None
        targets = step.targets
        boxes, index = targets.boxes, targets.image_index
        if targets.ids is None or not self.cache:
            return self._classify(self._crops(step, boxes, index))
        ids = targets.ids.tolist()
        new = [row for row, key in enumerate(ids) if key not in self._kept]
        if new:
            rows = torch.tensor(new, device=boxes.device)
            logits = self._classify(self._crops(step, boxes[rows], index[rows])).float().cpu()
            self._kept.update(zip((ids[row] for row in new), logits, strict=True))
        return torch.stack([self._kept[key] for key in ids]).to(boxes.device)

    def _classify(self, crops: Tensor) -> Tensor:
        logits = self.classifier(crops)
        _check.tensor("classifier", logits, 2, "(N, classes)")
        return accumulate(logits)

    def _crops(self, step: Step, boxes: Tensor, image_index: Tensor) -> Tensor:
        assert step.images is not None
        crops = crop_boxes(step.images, boxes, image_index, (self.size, self.size))
        return self._ready(crops)

    def _ready(self, crops: Tensor) -> Tensor:
        """As the classifier wants them."""
        crops = crops if self.preprocess is None else self.preprocess(crops)
        return crops.to(next(self.classifier.parameters(), crops).dtype)

    # Location -----------------------------------------------------------------------------------

    def _location_term(self, step: Step) -> Tensor:
        assert step.targets is not None and step.images is not None
        boxes, box = self._predicted(step)
        if not len(boxes):
            return accumulate(boxes).sum()
        index, size = step.targets.image_index, (self.size, self.size)
        with torch.no_grad():
            truth = self._looks(crop_boxes(step.images, step.targets.boxes, index, size))
        found = self._looks(crop_boxes(step.images, boxes, index[box], size))
        rows = [
            (a - b[box]).abs().flatten(1).mean(dim=1) for a, b in zip(found, truth, strict=True)
        ]
        return _weighted_mean(torch.stack(rows).sum(dim=0), self.row_weights(step, box))

    def _looks(self, crops: Tensor) -> list[Tensor]:
        """What is compared: pixels, and what the stem makes of them, both pooled."""
        looks = [functional.avg_pool2d(crops, min(_POOL_PIXELS, self.size))]
        stem = self._outside[1]
        if stem is not None:
            seen = accumulate(stem(self._ready(crops)))
            looks.append(functional.avg_pool2d(seen, min(_POOL_STEM, *seen.shape[2:])))
        return looks

    @staticmethod
    def _has_boxes(step: Step) -> bool:
        dense = step.student_dense if step.dense is None else step.dense[0]
        if step.regions is not None and step.regions.student.boxes is not None:
            return True
        return dense is not None and dense.boxes is not None and step.assigned is not None

    def _predicted(self, step: Step) -> tuple[Tensor, Tensor]:
        """The student's boxes of its positives ``(K, 4)``, and the ground truth of each."""
        regions, dense = step.regions, step.student_dense if step.dense is None else step.dense[0]
        if regions is not None and regions.student.boxes is not None:
            boxes, box = regions.student.boxes_of(regions.proposals.labels), regions.box
        elif dense is not None and dense.boxes is not None and step.assigned is not None:
            boxes, box = dense.boxes.flatten(0, 1), step.assigned.flatten()
        else:
            raise ValueError(
                "regions: DICOD expected the boxes of the student's positives, in regions or in "
                "dense with assigned, but got neither; location=0 leaves its term out"
            )
        rows = (box >= 0).nonzero()[:, 0]
        if self.max_crops is not None and len(rows) > self.max_crops:
            places = torch.arange(self.max_crops, device=rows.device)
            rows = rows[places * len(rows) // self.max_crops]
        return boxes[rows], box[rows]


def _weighted_mean(rows: Tensor, weights: Tensor | None) -> Tensor:
    return (rows if weights is None else rows * weights.to(rows.dtype)).mean()
