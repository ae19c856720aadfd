"""torchvision's detectors, and a home-made one, at the depths that people distil."""

from functools import partial

import torch
from torch import nn
from torchvision.models.detection import (
    FCOS,
    FasterRCNN,
    MaskRCNN,
    RetinaNet,
    ssdlite320_mobilenet_v3_large,
)
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from global_kd import Targets

from ..test_distiller import Detector
from .cases import Case, calibrated

K = 4  # three classes and the background
SIZE = {"min_size": 64, "max_size": 96}


def resnet(name, **options):
    # Batch norm: random weights would blow up under frozen statistics.
    return resnet_fpn_backbone(
        backbone_name=name,
        weights=None,
        trainable_layers=5,
        norm_layer=nn.BatchNorm2d,
        **options,
    )


def dense_backbone(name):
    levels = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
    if name.startswith("resnet"):
        return resnet(name, **levels)
    return mobilenet_backbone(
        backbone_name=name,
        weights=None,
        fpn=True,
        norm_layer=nn.BatchNorm2d,
        trainable_layers=6,
        returned_layers=[2, 3, 5],
    )


def faster_rcnn(name):
    return FasterRCNN(resnet(name), K, box_batch_size_per_image=32, **SIZE)


def mask_rcnn(name):
    return MaskRCNN(resnet(name), K, box_batch_size_per_image=32, **SIZE)


def retinanet(name):
    backbone = dense_backbone(name)
    levels = 5 if name.startswith("resnet") else 4
    sizes = tuple((x, int(x * 1.26), int(x * 1.59)) for x in (32, 64, 128, 256, 512)[:levels])
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * levels)
    return RetinaNet(backbone, K, anchor_generator=anchors, **SIZE)


def fcos(name):
    return FCOS(dense_backbone(name), K, **SIZE)


def ssdlite():
    return ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=K)


def batch(scenes):
    images = [s.image for s in scenes]
    targets = [{"boxes": s.boxes, "labels": s.labels + 1} for s in scenes]
    return images, targets


def step(model, arguments):
    return sum(model(*arguments).values())


def pair(name, student, teacher, lr=1e-3):
    return Case(
        name=name,
        needs=("torchvision",),
        student=partial(calibrated, *student),
        teacher=partial(calibrated, *teacher),
        num_classes=K,
        batch=batch,
        step=step,
        lr=lr,
    )


# --- home-made ------------------------------------------------------------------------------------


def home_made_batch(scenes):
    height, width = 128, 128
    canvas = torch.zeros(len(scenes), 3, height, width)
    for place, s in zip(canvas, scenes, strict=True):
        place[:, : s.image.shape[1], : s.image.shape[2]] = s.image
    index = torch.arange(len(scenes)).repeat_interleave(
        torch.tensor([len(s.labels) for s in scenes])
    )
    boxes = torch.cat([s.boxes for s in scenes])
    return canvas, Targets(boxes, torch.cat([s.labels for s in scenes]), index)


def home_made_step(model, arguments):
    return sum(x.square().mean() for x in model(arguments[0]))


CASES = [
    pair(
        "torchvision Faster R-CNN R50 <- R101",
        (faster_rcnn, "resnet50"),
        (faster_rcnn, "resnet101"),
        lr=3e-4,
    ),
    pair(
        "torchvision RetinaNet MobileNet <- R50",
        (retinanet, "mobilenet_v3_large"),
        (retinanet, "resnet50"),
    ),
    pair("torchvision FCOS R18 <- R50", (fcos, "resnet18"), (fcos, "resnet50")),
    pair(
        "torchvision RetinaNet R18 <- Faster R-CNN R50",
        (retinanet, "resnet18"),
        (faster_rcnn, "resnet50"),
    ),
    pair(
        "torchvision Faster R-CNN R18 <- Mask R-CNN R50",
        (faster_rcnn, "resnet18"),
        (mask_rcnn, "resnet50"),
        lr=3e-4,
    ),
    pair("torchvision SSDlite MobileNet <- SSDlite MobileNet", (ssdlite,), (ssdlite,)),
    Case(
        name="home-made, two modules",
        needs=(),
        student=partial(Detector, 8),
        teacher=partial(Detector, 24),
        num_classes=3,
        batch=home_made_batch,
        step=home_made_step,
        options={"example_inputs": (torch.zeros(1, 3, 128, 128),)},
    ),
]
