"""Two small Faster R-CNNs for small pictures, from torchvision's own parts."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign


@dataclasses.dataclass(frozen=True)
class Size:
    """Channels of the stem and the three stages, blocks a stage, channels of FPN and box head."""

    widths: tuple[int, int, int, int]
    blocks: int
    pyramid: int = 64
    head: int = 64


SIZES = {
    "small-teacher": Size(widths=(24, 32, 64, 128), blocks=2, head=128),
    "small-student": Size(widths=(8, 8, 16, 32), blocks=1),
}


class SmallPyramid(nn.Module):
    """Images (B, 3, H, W) to {"0", "1", "2"}: maps (B, `out_channels`, ...) at strides 4, 8, 16."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        stem, *stages = size.widths
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(stem),
            nn.ReLU(inplace=True),
        )
        self.stages = nn.ModuleList(
            _stage(before, after, size.blocks)
            for before, after in zip((stem, *stages), stages, strict=False)
        )
        self.fpn = FeaturePyramidNetwork(list(stages), size.pyramid)
        self.out_channels = size.pyramid

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.stem(images)
        maps: OrderedDict[str, Tensor] = OrderedDict()
        for level, stage in enumerate(self.stages):
            x = stage(x)
            maps[str(level)] = x
        pyramid: dict[str, Tensor] = self.fpn(maps)
        return pyramid


def _stage(before: int, after: int, blocks: int) -> nn.Sequential:
    """`blocks` residual blocks, the first of which halves the map."""
    shortcut = nn.Sequential(
        nn.Conv2d(before, after, 1, stride=2, bias=False), nn.BatchNorm2d(after)
    )
    first = BasicBlock(before, after, stride=2, downsample=shortcut)
    return nn.Sequential(first, *(BasicBlock(after, after) for _ in range(blocks - 1)))


def small_faster_rcnn(size: Size, num_classes: int, side: int = 96) -> FasterRCNN:
    """A Faster R-CNN for objects of about 10 to 60 px in pictures of `side` px."""
    ratios = (1.0, 1.8)
    anchors = AnchorGenerator(((9, 13), (18, 25), (32, 40)), (ratios,) * 3)
    regions = MultiScaleRoIAlign(
        ["0", "1", "2"], output_size=6, sampling_ratio=1, canonical_scale=16, canonical_level=2
    )
    return FasterRCNN(
        SmallPyramid(size),
        min_size=side,
        max_size=side,
        rpn_anchor_generator=anchors,
        rpn_batch_size_per_image=48,
        rpn_pre_nms_top_n_train=150,
        rpn_post_nms_top_n_train=100,
        rpn_pre_nms_top_n_test=150,
        rpn_post_nms_top_n_test=100,
        box_roi_pool=regions,
        box_head=TwoMLPHead(size.pyramid * 6 * 6, size.head),
        box_predictor=FastRCNNPredictor(size.head, num_classes),
        box_batch_size_per_image=32,
        box_detections_per_img=30,
    )
