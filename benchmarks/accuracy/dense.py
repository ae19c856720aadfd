"""Detectors with a dense head, on the pyramids of the Faster R-CNNs: most that people distil."""

from __future__ import annotations

import dataclasses

from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead

from workshop.small_detectors import Size, SmallPyramid


@dataclasses.dataclass(frozen=True)
class Dense:
    """torchvision's FCOS on the pyramid of a size, whose `head` it does not use.

    `convolutions` are those of each tower: at the stride of 4 torchvision's four take longer than
    everything before them.
    """

    size: Size
    convolutions: int = 2

    def detector(self, num_classes: int, side: int) -> FCOS:
        """For pictures of `side` px; as many candidates and detections as `small_faster_rcnn`."""
        # A level learns boxes whose largest distance from a cell is 4 to 8 times its stride.
        cells = AnchorGenerator(((4,), (8,), (16,)), ((1.0,),) * 3)
        body = SmallPyramid(self.size)
        return FCOS(
            body,
            num_classes,
            min_size=side,
            max_size=side,
            anchor_generator=cells,
            head=FCOSHead(body.out_channels, 1, num_classes, self.convolutions),
            score_thresh=0.05,
            topk_candidates=150,
            detections_per_img=30,
        )
