"""Pairs with Hugging Face transformers detectors for the compatibility checks; no downloads."""

from functools import partial

import torch

from .cases import Case, Scene

NUM_CLASSES = 3
R18, R50, R101 = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 23, 3)
WIDTHS = {"basic": [64, 128, 256, 512], "bottleneck": [256, 512, 1024, 2048]}


def coco(scenes: list[Scene]) -> list[dict]:
    """COCO annotations, boxes xywh in pixels of the original images."""
    return [
        {
            "image_id": i,
            "annotations": [
                {
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "category_id": label,
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
                for (x1, y1, x2, y2), label in zip(s.boxes.tolist(), s.labels.tolist())
            ],
        }
        for i, s in enumerate(scenes)
    ]


def processed(processor, scenes: list[Scene]) -> dict:
    """What a user's collator gives: resized, padded and normalised by an image processor."""
    images = [(s.image.clamp(0, 1) * 255).round().to(torch.uint8) for s in scenes]
    return dict(processor(images=images, annotations=coco(scenes), return_tensors="pt"))


def at_work(model):
    """Statistics of one batch: the maps of an RT-DETR of random weights are all but 0 without."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.momentum = None  # an average, so far of one
    with torch.no_grad():
        model.train()(torch.rand(2, 3, 128, 128))
    for m, momentum in zip(norms, momenta):
        m.momentum = momentum
    return model


def rt_detr_resnet(depths, layer_type="bottleneck"):
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    backbone = RTDetrResNetConfig(
        depths=depths,
        hidden_sizes=WIDTHS[layer_type],
        layer_type=layer_type,
        out_indices=[2, 3, 4],
    )
    # Fewer queries than the published 300: an image of 128 pixels has 336 cells.
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=WIDTHS[layer_type][1:],
        num_labels=NUM_CLASSES,
        num_queries=30,
        num_denoising=10,
        decoder_layers=3,
        initializer_range=0.1,
    )
    return at_work(RTDetrForObjectDetection(config))


def deformable_detr_resnet(depths, layer_type="bottleneck"):
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        depths=depths,
        hidden_sizes=WIDTHS[layer_type],
        layer_type=layer_type,
        out_indices=[2, 3, 4],
    )
    config = DeformableDetrConfig(
        backbone_config=backbone,
        num_labels=NUM_CLASSES,
        num_queries=30,
        encoder_layers=3,
        decoder_layers=3,
    )
    return DeformableDetrForObjectDetection(config)


def yolos_tiny():
    from transformers import YolosConfig, YolosForObjectDetection

    config = YolosConfig(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=[800, 1344],
        num_detection_tokens=100,
        num_labels=NUM_CLASSES,
    )
    return YolosForObjectDetection(config)


def torchvision_resnet50(name):
    from torchvision.models import detection

    make = getattr(detection, f"{name}_resnet50_fpn")
    return make(
        weights=None, weights_backbone=None, num_classes=NUM_CLASSES, min_size=96, max_size=128
    )


def rt_detr_batch(scenes):
    from transformers import RTDetrImageProcessor

    return (processed(RTDetrImageProcessor(size={"height": 128, "width": 128}), scenes),)


def deformable_detr_batch(scenes):
    from transformers import DeformableDetrImageProcessor

    size = {"shortest_edge": 96, "longest_edge": 128}
    return (processed(DeformableDetrImageProcessor(size=size), scenes),)


def torchvision_batch(scenes):
    return [s.image for s in scenes], [{"boxes": s.boxes, "labels": s.labels} for s in scenes]


def transformers_step(student, arguments):
    return student(**arguments[0]).loss


def torchvision_step(student, arguments):
    return sum(student(*arguments).values())


CASES = [
    Case(
        "torchvision FCOS R50 <- RT-DETR R101",
        ("torchvision", "transformers"),
        partial(torchvision_resnet50, "fcos"),
        partial(rt_detr_resnet, R101),
        NUM_CLASSES,
        torchvision_batch,
        torchvision_step,
        lr=1e-4,
    ),
    Case(
        "RT-DETR R18 <- RT-DETR R50",
        ("transformers", "scipy", "torchvision"),
        partial(rt_detr_resnet, R18, "basic"),
        partial(rt_detr_resnet, R50),
        NUM_CLASSES,
        rt_detr_batch,
        transformers_step,
    ),
    Case(
        "Deformable DETR R18 <- Deformable DETR R50",
        ("transformers", "scipy", "torchvision"),
        partial(deformable_detr_resnet, R18, "basic"),
        partial(deformable_detr_resnet, R50),
        NUM_CLASSES,
        deformable_detr_batch,
        transformers_step,
    ),
    Case(
        "torchvision RetinaNet R50 <- YOLOS (ViT)",
        ("torchvision", "transformers"),
        partial(torchvision_resnet50, "retinanet"),
        yolos_tiny,
        NUM_CLASSES,
        torchvision_batch,
        torchvision_step,
    ),
]
