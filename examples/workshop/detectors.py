"""Detectors by name, their weights, and the teacher that is trained once and then kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import urllib.error
from collections.abc import Callable
from pathlib import Path

import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from . import storage
from .digit_scenes import SceneSettings
from .small_detectors import SIZES, Size, SmallPyramid, small_faster_rcnn
from .source_digest import source_digest
from .training import Recipe

HERE = Path(__file__).parent
SHIPPED_TEACHER = HERE / "teacher_digits.pt"
TEACHER_COMMAND = "python examples/torchvision_frcnn.py --train-teacher"
TEACHER_ITERATIONS = 2000


def detector_names() -> list[str]:
    """The small ones and torchvision's Faster R-CNN, RetinaNet and FCOS."""
    known = torchvision.models.list_models(module=torchvision.models.detection)
    families = ("fasterrcnn", "retinanet", "fcos")
    return [*SIZES, *(name for name in known if name.startswith(families))]


def build_detector(
    name: str, num_classes: int, *, weights: str | None = None, side: int = 96
) -> nn.Module:
    """A detector with `num_classes` outputs, background included.

    `weights` is a file of ours, a plain state dict, "DEFAULT" (torchvision's trained detector),
    "backbone" (its ImageNet backbone) or None (random). `side` is for the small ones: the pixels
    of the picture they look at.
    """
    if weights not in ("DEFAULT", "backbone", None) and not Path(weights).is_file():
        raise SystemExit(f"There are no weights at {weights}.")
    if name in SIZES:
        if weights in ("DEFAULT", "backbone"):
            raise SystemExit(f"{name} has no released weights; give a file instead of {weights}.")
        model: nn.Module = small_faster_rcnn(SIZES[name], num_classes, side)
    elif name in detector_names():
        model = _from_torchvision(name, num_classes, weights)
    else:
        raise SystemExit(f"Unknown detector {name!r}; known are {', '.join(detector_names())}.")
    if weights not in ("DEFAULT", "backbone", None):
        load_weights(model, Path(weights), num_classes)
    return model


def _from_torchvision(name: str, num_classes: int, weights: str | None) -> nn.Module:
    build: Callable[..., nn.Module] = torchvision.models.get_model
    try:
        if weights == "DEFAULT":
            trained = torchvision.models.get_model_weights(name)["DEFAULT"]
            known = len(trained.meta["categories"])
            if known != num_classes:
                raise SystemExit(
                    f"{name}'s released weights know {known} classes, the data {num_classes} "
                    "(background included)."
                )
            return build(name, weights=trained)
        backbone = "DEFAULT" if weights == "backbone" else None
        return build(name, weights=None, weights_backbone=backbone, num_classes=num_classes)
    except (urllib.error.URLError, OSError) as error:
        raise SystemExit(f"Cannot download the weights of {name}: {error}.") from None


def resnet_detector(
    family: str, depth: int, num_classes: int, *, trained: bool = True
) -> nn.Module:
    """A Faster R-CNN or RetinaNet ("fasterrcnn", "retinanet") on a ResNet of any depth.

    Built as torchvision builds `fasterrcnn_resnet50_fpn` and `retinanet_resnet50_fpn`: with depth
    50, weights fit from one to the other. `trained`: the backbone gets trained weights, so batch
    norm, stem and first stage stay as they are.
    """
    retinanet = family == "retinanet"
    pyramid = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
    backbone = resnet_fpn_backbone(
        backbone_name=f"resnet{depth}",
        weights=None,
        norm_layer=FrozenBatchNorm2d if trained else nn.BatchNorm2d,
        trainable_layers=3 if trained else 5,
        **(pyramid if retinanet else {}),
    )
    detector: nn.Module = (RetinaNet if retinanet else FasterRCNN)(backbone, num_classes)
    return detector


def small_retinanet(size: Size, num_classes: int, side: int = 96) -> RetinaNet:
    """`small_faster_rcnn`'s pyramid under a RetinaNet.

    It starts with scores of 0.01 and keeps detections from 0.001, so that there are some early.
    """
    return RetinaNet(
        SmallPyramid(size),
        num_classes,
        min_size=side,
        max_size=side,
        anchor_generator=AnchorGenerator(((13,), (22,), (40,)), ((1.0,),) * 3),
        score_thresh=0.001,
        topk_candidates=150,
        detections_per_img=30,
    )


def load_backbone(model: nn.Module, weights: str, depth: int) -> None:
    """ImageNet weights into a `resnet_detector`: torchvision's ("imagenet") or those of a file."""
    if weights == "imagenet":
        known = torchvision.models.get_model_weights(f"resnet{depth}")["IMAGENET1K_V1"]
        try:
            stored = known.get_state_dict(progress=True, check_hash=True)
        except (urllib.error.URLError, OSError, RuntimeError) as error:
            raise SystemExit(
                f"Cannot download the ImageNet weights of ResNet-{depth} "
                f"({storage.first_line(error)}); give --backbone-weights the file of {known.url}, "
                "or random, to train from nothing."
            ) from None
    else:
        stored = storage.load(Path(weights))
        if not isinstance(stored, dict):
            raise SystemExit(f"{weights} is not a file of weights.")
    body: nn.Module = model.backbone.body  # type: ignore[assignment, union-attr]
    try:
        body.load_state_dict({k: v for k, v in stored.items() if not k.startswith("fc.")})
    except RuntimeError:
        raise SystemExit(f"{weights} holds no weights of a ResNet-{depth}.") from None


def load_weights(model: nn.Module, path: Path, num_classes: int) -> None:
    """Load a state dict, also one under "weights" or "model", of any floating type."""
    stored = storage.load(path)
    if stored is None:
        raise SystemExit(f"{path} is not a file of weights.")
    if isinstance(stored, dict):
        stored = stored.get("weights", stored.get("model", stored))
    own = model.state_dict()
    if not isinstance(stored, dict) or not stored.keys() & own.keys():
        raise SystemExit(f"{path} holds no weights of a {type(model).__name__}.")
    for key, value in own.items():
        given = stored.get(key)
        if given is None or given.shape[:1] == value.shape[:1]:
            continue
        if key.endswith(("cls_score.weight", "cls_logits.weight")):
            found = num_classes * given.shape[0] // value.shape[0]
            raise SystemExit(
                f"The weights in {path} know {found} classes, the data {num_classes} "
                "(background included)."
            )
    try:
        model.load_state_dict(stored)
    except RuntimeError:
        raise SystemExit(f"The weights in {path} belong to another detector.") from None


def half(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with floats of 16 bits: half the disk, the same detector to the eye."""
    return {
        key: value.half() if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }


def teacher_fingerprint(settings: SceneSettings, recipe: Recipe) -> str:
    """What the small teacher depends on: scenes, recipe, and the code of scenes and detector."""
    parts = [settings.fingerprint(), dataclasses.asdict(recipe)]
    text = json.dumps(parts, sort_keys=True) + source_digest(str(HERE / "small_detectors.py"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def find_teacher(fingerprint: str, cache: Path) -> Path | None:
    """The small teacher of this fingerprint: a former run's, or the one that is shipped."""
    for path in (cache / "teacher_digits.pt", SHIPPED_TEACHER):
        if path.is_file():
            stored = storage.load(path)
            if isinstance(stored, dict) and stored.get("fingerprint") == fingerprint:
                return path
            print(f"{path} was made by other code, for other scenes or in another way: not used.")
    return None


def keep_teacher(model: nn.Module, fingerprint: str, scores: dict[str, float], path: Path) -> None:
    """Write a teacher so that `find_teacher` knows it again."""
    content = {"fingerprint": fingerprint, "scores": scores, "weights": half(model)}
    storage.save({"command": TEACHER_COMMAND, **content}, path)
