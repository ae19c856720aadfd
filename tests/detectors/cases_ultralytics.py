"""Ultralytics detectors for the compatibility table, and scenes in its own data format."""

from typing import Any

from torch import Tensor, nn

from .cases import Case, Scene

SIDE, NUM_CLASSES = 128, 3


def batch(scenes: list[Scene], side: int = SIDE) -> dict[str, Any]:
    """Scenes through Ultralytics' letterbox, formatting, collation and preprocessing."""
    from ultralytics.data.augment import Format, LetterBox
    from ultralytics.data.dataset import YOLODataset
    from ultralytics.utils.instance import Instances

    letterbox, to_tensors = LetterBox((side, side)), Format()
    samples = []
    for scene in scenes:
        bgr = (scene.image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).flip(2)
        boxes = Instances(
            scene.boxes.numpy().copy(),
            scene.boxes.new_zeros(len(scene.boxes), 1, 2).numpy(),  # no masks; 8.3 wants an array
            bbox_format="xyxy",
            normalized=False,
        )
        classes = scene.labels.float().numpy()[:, None]
        sample = {"img": bgr.contiguous().numpy(), "cls": classes, "instances": boxes}
        sample = to_tensors(letterbox(sample))
        samples.append({k: sample[k] for k in ("img", "cls", "bboxes", "batch_idx")})
    together = YOLODataset.collate_fn(samples)
    together["img"] = together["img"].float() / 255
    return together


def model(name: str, family: str = "DetectionModel", nc: int = NUM_CLASSES) -> nn.Module:
    """A model of random weights as Ultralytics' trainer sets it up."""
    from ultralytics.cfg import get_cfg
    from ultralytics.nn import tasks

    made = getattr(tasks, family)(name, nc=nc, verbose=False)
    made.nc, made.args = nc, get_cfg()
    return made


def step(student: nn.Module, arguments: tuple[Any, ...]) -> Tensor:
    loss, _ = student(*arguments)
    return loss.sum()


def _case(student: tuple[str, ...], teacher: tuple[str, ...], name: str) -> Case:
    return Case(
        name,
        ("ultralytics",),
        lambda: model(*student),
        lambda: model(*teacher),
        NUM_CLASSES,
        lambda scenes: (batch(scenes),),
        step,
    )


CASES = [
    _case(("yolov8n.yaml",), ("yolov8x.yaml",), "YOLOv8n <- YOLOv8x"),
    _case(("yolo11n.yaml",), ("yolo11m.yaml",), "YOLO11n <- YOLO11m"),
    _case(("yolo26n.yaml",), ("yolo26m.yaml",), "YOLO26n <- YOLO26m"),
    _case(("yolov10n.yaml",), ("yolov10m.yaml",), "YOLOv10n <- YOLOv10m"),
    _case(
        ("yolo11n.yaml",),
        ("rtdetr-l.yaml", "RTDETRDetectionModel"),
        "YOLO11n <- RT-DETR-L (Ultralytics)",
    ),
]
