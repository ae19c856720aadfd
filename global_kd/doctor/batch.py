"""Does the batch fit the loss and the detectors: boxes, labels, classes, pixels?"""

from collections.abc import Iterable

from torch import Tensor

from ..detectors import Detections, Detector, Pixels, Seen
from ..losses.base import DistillLoss
from ..targets import Targets
from .boxes import doubts

ENOUGH = 3  # boxes from which on a batch can tell one reading from another
_BRIGHT, _DARK = 4.0, 0.02  # RGB in [0, 1], augmentation aside, lies well between
_MANY, _TIMES = 200, 10  # classes; a batch's labels that reach up to a tenth of those are suspect


def pixel_problems(images: object, pixels: Pixels | None) -> Iterable[str]:
    """Images in [0, 1] taken for bytes, or the other way round.

    Args:
        images: The student's network input.
        pixels: Its format; ``None``: unknown, the usual one is assumed.
    """
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.numel():
        return
    form, known = pixels or Pixels(), pixels is not None
    rgb, end = form.convert(images, Pixels()), form.scale
    lowest, highest = float(rgb.min()), float(rgb.max())
    if highest > _BRIGHT:
        yield (
            f"the images reach {highest * end:.4g} where this network's format ends at {end:g}: "
            "these look like bytes; divide them by 255"
            + ("" if known else ", or, if both networks are made for them, say so: ")
            + ("" if known else "student_pixels=teacher_pixels=Pixels(scale=255)")
        )
    elif known and end > 1 and lowest > -_DARK and highest < _DARK:
        yield (
            f"the images end at {highest * end:.3g} where this network takes 0 to {end:g}: these "
            f"look like numbers in [0, 1]; multiply them by {end:g}"
        )


def class_problems(labels: Tensor, keeper: DistillLoss | None, detector: Detector) -> Iterable[str]:
    """The loss's number of classes beside the detector's and the labels seen."""
    classes = None if keeper is None else keeper.generator.num_classes
    if classes is None:
        return
    if detector.num_classes not in (None, classes):
        yield (
            f"the student was made for {detector.num_classes} classes, but the loss for "
            f"{classes}; pass num_classes={detector.num_classes}"
        )
    highest = int(labels.max())
    few = len(labels) < ENOUGH
    if not few and detector.num_classes is None and classes > max(_MANY, _TIMES * (highest + 1)):
        yield (
            f"num_classes={classes}, but the labels of this batch go up to {highest} only; pass "
            "the number of classes of the data, the highest label + 1"
        )


def box_problems(
    truth: Targets,
    seen: Seen,
    keeper: DistillLoss | None,
    detector: Detector,
    found: list[Detections] | None,
    scale: float,
    fits: bool,
) -> Iterable[str]:
    """Boxes and labels in themselves, and beside what the teacher finds."""
    if len(truth) == 0:
        yield "the batch has no boxes: check another one"
        return
    boxes, labels = truth.boxes.float(), truth.labels
    height, width = seen.look.view.size
    yield from class_problems(labels, keeper, detector)
    first = detector.first_label
    if labels.min() < first:
        yield (
            f"label {int(labels.min())} is the background in this framework: classes start at "
            f"{first}; add {first} to the labels"
        )
    if boxes.max() <= 2 and max(height, width) >= 32:
        yield (
            f"no box coordinate is above {float(boxes.max()):.3g} on a canvas of {width} x "
            f"{height}: these look normalised; multiply by the width and height in pixels"
        )
        return
    over = (boxes[:, 2:] > 1.05 * boxes.new_tensor([width, height])).any(dim=1)
    if over.any():
        yield (
            f"{int(over.sum())} of {len(truth)} boxes reach beyond the canvas of {width} x "
            f"{height} pixels: these look like pixels of the original image; scale them as the "
            "image was resized"
        )
    if found is not None and len(truth) >= ENOUGH:
        yield from doubts(truth, found, scale, (height, width), fits=fits)
