"""Tiny torchvision detectors: real heads, samplers and transforms on a backbone of three convs."""

from collections import OrderedDict

import torch
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.ssd import SSD
from torchvision.ops import MultiScaleRoIAlign

NUM_CLASSES = 4
KINDS = ("faster_rcnn", "retinanet", "fcos", "ssd")


class Backbone(nn.Module):
    """Strides 4, 8 and 16, without batch norm: train and eval mode compute the same."""

    def __init__(self, channels):
        super().__init__()
        self.out_channels = channels
        self.stem = nn.Conv2d(3, channels, 4, stride=4)
        self.down = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1) for _ in range(2)
        )

    def forward(self, x):
        x = self.stem(x)
        levels = OrderedDict([("0", x)])
        for i, down in enumerate(self.down):
            x = down(x.relu())
            levels[str(i + 1)] = x
        return levels


def detector(kind, channels=8, num_classes=NUM_CLASSES, **options):
    if kind == "fcos":  # its head normalises groups of 32 channels
        channels = 32 * -(-channels // 8)
    backbone = Backbone(channels)
    if kind == "ssd":  # one fixed (width, height) for all images
        backbone.out_channels = [channels] * 3
        boxes = DefaultBoxGenerator([[2]] * 3, steps=[4, 8, 16], scales=[0.15, 0.3, 0.5, 0.7])
        return SSD(backbone, boxes, (96, 64), num_classes, **options)
    options = {"min_size": 64, "max_size": 96} | options
    sizes = ((8,), (16,), (32,))
    ratios = ((1.0,),) * 3
    if kind == "faster_rcnn":
        return FasterRCNN(
            backbone,
            rpn_anchor_generator=AnchorGenerator(sizes, ratios),
            box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], 3, 1),
            box_head=TwoMLPHead(channels * 9, 16),
            box_predictor=FastRCNNPredictor(16, num_classes),
            box_batch_size_per_image=16,
            rpn_batch_size_per_image=16,
            **options,
        )
    cls = {"retinanet": RetinaNet, "fcos": FCOS}[kind]
    return cls(backbone, num_classes, anchor_generator=AnchorGenerator(sizes, ratios), **options)


def scenes(sizes=((50, 80), (64, 64), (90, 40)), seed=0):
    """Images of unlike sizes, all resized inside the model; the last one without boxes."""
    g = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, h, w, generator=g) for h, w in sizes]
    targets = []
    for h, w in sizes[:-1]:
        corner = torch.rand(2, 2, generator=g) * torch.tensor([w, h]) * 0.4
        extent = torch.tensor([w, h]) * (0.3 + 0.2 * torch.rand(2, 2, generator=g))
        labels = torch.randint(1, NUM_CLASSES, (2,), generator=g)
        targets.append({"boxes": torch.cat([corner, corner + extent], dim=1), "labels": labels})
    targets.append({"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)})
    return images, targets
