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

import storage
from digit_scenes import SceneSettings
from small_detectors import SIZES, small_faster_rcnn
from source_digest import source_digest
from training import Recipe

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
