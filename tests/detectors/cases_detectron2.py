"""Detectron2's model zoo in the compatibility checks: its configs, random weights, small images."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from .cases import Case, Scene

NUM_CLASSES = 3


def config(name: str, num_classes: int = NUM_CLASSES, side: int = 128):
    """A config of the model zoo for the CPU: few classes, few proposals, small images."""
    from detectron2 import model_zoo

    cfg = model_zoo.get_config(f"COCO-Detection/{name}.yaml")
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = num_classes
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 32
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 100
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 50
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (side,), side * 5 // 4
    cfg.INPUT.RANDOM_FLIP = "none"
    return cfg


def build(cfg):
    """The model of a config, random weights."""
    from detectron2.modeling import build_model

    return tame(build_model(cfg))


def tame(model):
    """Frozen batch norms expect trained weights; smaller branches keep the sum of blocks finite."""
    from detectron2.modeling.backbone.resnet import BottleneckBlock

    for module in model.modules():
        if isinstance(module, BottleneckBlock):
            module.conv3.norm.weight.data.fill_(0.2)
    return model


def mapped(cfg, scenes: list[Scene]) -> list[dict]:
    """Scenes as Detectron2's own mapper makes a batch of them, read from files and resized."""
    from detectron2.data import DatasetMapper
    from detectron2.structures import BoxMode
    from PIL import Image

    mapper, batch = DatasetMapper(cfg, is_train=True), []
    with tempfile.TemporaryDirectory() as folder:
        for i, scene in enumerate(scenes):
            file = Path(folder) / f"{i}.png"
            pixels = (scene.image.clamp(0, 1) * 255).round().permute(1, 2, 0)
            Image.fromarray(pixels.numpy().astype(np.uint8)).save(file)
            record = {"file_name": str(file), "image_id": i}
            record["height"], record["width"] = scene.image.shape[1:]
            record["annotations"] = [
                {
                    "bbox": [x1, y1, x2, y2],
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "category_id": label,
                    "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
                }
                for (x1, y1, x2, y2), label in zip(scene.boxes.tolist(), scene.labels.tolist())
            ]
            batch.append(mapper(record))
    return batch


def step(student, arguments):
    """The sum of the student's own losses; Detectron2 trains within an event storage."""
    from detectron2.utils.events import EventStorage

    with EventStorage():
        return sum(student(*arguments).values())


def _case(title: str, student: str, teacher: str, lr: float = 1e-3) -> Case:
    return Case(
        title,
        ("detectron2",),
        lambda: build(config(student)),
        lambda: build(config(teacher)),
        NUM_CLASSES,
        lambda scenes: (mapped(config(student), scenes),),
        step,
        lr=lr,
    )


CASES = [
    _case(
        "Detectron2 Faster R-CNN R50-FPN <- R101-FPN",
        "faster_rcnn_R_50_FPN_1x",
        "faster_rcnn_R_101_FPN_3x",
        lr=3e-4,
    ),
    _case("Detectron2 RetinaNet R50 <- R101", "retinanet_R_50_FPN_1x", "retinanet_R_101_FPN_3x"),
]
