"""The pictures a run leaves behind: curves, predictions, prototypes."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files, never windows

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from torchvision.ops import box_iou, nms

from global_kd import Distiller

from .detection_data import DetectionData, DetectionSet, find_box, first_batches, to_device
from .training import Run

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52")


def draw_curves(runs: Mapping[str, Run], teacher_ap: float | None, images: int, path: Path) -> None:
    """Detection loss (without the terms of distillation) and AP over the iterations."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    for colour, (name, run) in zip(COLOURS, runs.items(), strict=False):
        steps = [row["iteration"] for row in run.losses]
        detection = [
            sum(v for k, v in row.items() if k not in ("iteration", "total") and k[:3] != "kd_")
            for row in run.losses
        ]
        left.plot(steps, detection, color=colour, alpha=0.25, linewidth=1)
        left.plot(steps, _smooth(detection), color=colour, label=name)
        right.plot(
            [0, *(row["iteration"] for row in run.scores)],
            [0, *(100 * row["AP"] for row in run.scores)],
            marker="o",
            markersize=4,
            color=colour,
            label=name,
        )
    if teacher_ap is not None:
        right.axhline(
            100 * teacher_ap, color="grey", linestyle="--", linewidth=1, label="teacher, all images"
        )
    left.set(xlabel="iteration", ylabel="detection loss", ylim=(0, None))
    right.set(xlabel="iteration", ylabel=f"AP (%) on {images} validation images", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    save(figure, path)


def _smooth(values: Sequence[float], window: int = 9) -> list[float]:
    """Running mean over the last `window` values."""
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        means.append(sum(part) / len(part))
    return means


def draw_predictions(
    models: Mapping[str, nn.Module],
    data: DetectionData,
    path: Path,
    *,
    images: Sequence[int],
    threshold: float = 0.5,
) -> None:
    """A row for each validation image: the ground truth, then each model's detections."""
    columns = ["ground truth", *models]
    figure, grid = plt.subplots(
        len(images),
        len(columns),
        figsize=(2.6 * len(columns), 2.65 * len(images)),
        squeeze=False,
        constrained_layout=True,
    )
    for row, index in zip(grid, images, strict=True):
        image, target = data.validation[index]
        show(row[0], image)
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            _outline(row[0], box, data.class_names[label], "white")
        for axes, model in zip(row[1:], models.values(), strict=True):
            show(axes, image)
            found = _detect(model, image, threshold)
            right = _matches(found, target)
            for box, label, score, good in zip(
                found["boxes"].tolist(),
                found["labels"].tolist(),
                found["scores"].tolist(),
                right,
                strict=True,
            ):
                text = f"{data.class_names[label]} .{min(99, round(score * 100)):02d}"
                _outline(axes, box, text, "#7CFC00" if good else "#ff4040")
    for axes, name in zip(grid[0], columns, strict=True):
        axes.set_title(name, fontsize=11)
    figure.suptitle(
        f"score ≥ {threshold}, the best of boxes that overlap by 0.6; "
        "green: the right class with IoU ≥ 0.5, red: not",
        fontsize=10,
    )
    save(figure, path)


@torch.no_grad()
def _detect(model: nn.Module, image: Tensor, threshold: float) -> dict[str, Tensor]:
    """Detections worth drawing, best score first, one for each place whatever its class."""
    model.eval()
    output: dict[str, Tensor] = model([image.to(next(model.parameters()).device)])[0]
    kept = nms(output["boxes"], output["scores"], iou_threshold=0.6)
    kept = kept[output["scores"][kept] >= threshold]
    return {name: output[name][kept].cpu() for name in ("boxes", "labels", "scores")}


def _matches(found: dict[str, Tensor], target: dict[str, Tensor]) -> list[bool]:
    """Whether each detection, best score first, finds a box that none before it found."""
    overlaps = box_iou(found["boxes"], target["boxes"])
    same = found["labels"][:, None] == target["labels"][None]
    overlaps = torch.where(same, overlaps, 0.0)
    good = []
    for row in overlaps:
        best = int(row.argmax()) if len(row) else -1
        good.append(best >= 0 and float(row[best]) >= 0.5)
        if good[-1]:
            overlaps[:, best] = 0
    return good


@dataclasses.dataclass(frozen=True)
class Instance:
    """A ground-truth box of a training image and the omega it got."""

    image: int
    box: int
    omega: float


def weigh_instances(
    kd: Distiller, data: DetectionData, level: int, images: int, device: str
) -> dict[int, list[Instance]]:
    """Omega on `level` of the boxes in the first training images: by class, lowest first."""
    found: dict[int, list[Instance]] = {}
    for batch in to_device(first_batches(data.train, images, 25), device):
        boxes, omega = kd.weigh(*batch)
        identities = torch.cat([target["ids"] for target in batch[1]]).tolist()
        for identity, label, weight in zip(
            identities, boxes.labels.tolist(), omega[level].tolist(), strict=True
        ):
            found.setdefault(label, []).append(Instance(*find_box(identity), weight))
    for instances in found.values():
        instances.sort(key=lambda instance: instance.omega)
    return found


def draw_prototypes(
    kd: Distiller, data: DetectionData, level: int, path: Path, *, images: int, device: str
) -> None:
    """A row for each class: the crops chosen as prototypes, then those of the lowest omega."""
    found = _known_prototypes(kd, level)
    classes = [label for label, kept in enumerate(found) if kept][:12]
    if not classes:
        return
    doubtful = weigh_instances(kd, data, level, images, device)
    chosen, low = min(10, kd.loss.bank.ids.shape[2]), 6
    columns = chosen + 1 + low
    figure, grid = plt.subplots(
        len(classes),
        columns,
        figsize=(0.72 * columns + 0.5, 0.86 * len(classes) + 0.7),
        squeeze=False,
        gridspec_kw={
            "wspace": 0.06,
            "hspace": 0.06,
            "width_ratios": [1] * chosen + [0.25] + [1] * low,
        },
    )
    for axes in grid.flat:
        axes.axis("off")
    for row, label in zip(grid, classes, strict=True):
        _name(row[0], data.class_names[label])
        for axes, identity in zip(row[:chosen], found[label], strict=False):
            axes.imshow(_crop(data.train, *find_box(identity)))
        for axes, instance in zip(row[chosen + 1 :], doubtful.get(label, [])[:low], strict=False):
            axes.imshow(_crop(data.train, instance.image, instance.box))
            axes.text(
                0.04, 0.04, f"ω .{min(99, max(0, round(instance.omega * 100))):02d}",
                transform=axes.transAxes, color="white", fontsize=6.5, va="bottom",
                bbox={"facecolor": "black", "alpha": 0.6, "pad": 0.8, "linewidth": 0},
            )  # fmt: skip
    stride = kd.loss.rdm.strides[level]
    _heading(
        grid[0][0], grid[0][chosen - 1], f"prototypes at stride {stride:g}, in the order picked"
    )
    _heading(grid[0][chosen + 1], grid[0][-1], f"lowest ω in {images} training images")
    save(figure, path)


def draw_prototypes_by_level(
    kd: Distiller,
    data: DetectionData,
    path: Path,
    *,
    shown: int = 8,
    marked: Collection[int] = (),
) -> None:
    """A row for each class, a block for each level: the first crops chosen as prototypes there.

    The numbers (`box_id`) in `marked` get a red frame.
    """
    strides = kd.loss.rdm.strides
    levels = [_known_prototypes(kd, level) for level in range(len(strides))]
    classes = [c for c in range(data.num_classes) if any(found[c] for found in levels)][:12]
    if not classes:
        return
    figure, grid = plt.subplots(
        len(classes),
        len(levels) * (shown + 1) - 1,
        figsize=(0.62 * len(levels) * (shown + 0.3), 0.74 * len(classes) + 0.7),
        squeeze=False,
        gridspec_kw={
            "wspace": 0.06,
            "hspace": 0.06,
            "width_ratios": ([1.0] * shown + [0.3]) * (len(levels) - 1) + [1.0] * shown,
        },
    )
    for axes in grid.flat:
        axes.axis("off")
    for row, label in zip(grid, classes, strict=True):
        _name(row[0], data.class_names[label])
        for level, found in enumerate(levels):
            start = level * (shown + 1)
            for axes, identity in zip(row[start : start + shown], found[label], strict=False):
                axes.imshow(_crop(data.train, *find_box(identity)))
                if identity in marked:
                    axes.add_patch(
                        Rectangle(
                            (0, 0), 1, 1, fill=False, edgecolor="red", lw=3,
                            transform=axes.transAxes,
                        )
                    )  # fmt: skip
    for level, stride in enumerate(strides):
        start = level * (shown + 1)
        _heading(grid[0][start], grid[0][start + shown - 1], f"stride {stride:g}")
    save(figure, path)


def _known_prototypes(kd: Distiller, level: int) -> list[list[int]]:
    """Of each class, the numbers (`box_id`) of a level's prototypes, in the order picked."""
    bank = kd.loss.bank
    return [
        [identity for identity in ids[valid].tolist() if identity >= 0]
        for ids, valid in zip(bank.ids[level].cpu(), bank.valid[level].cpu(), strict=True)
    ]


def _name(axes: Axes, text: str) -> None:
    """A row's name, left of its first axes."""
    axes.text(-0.15, 0.5, text, transform=axes.transAxes, ha="right", va="center", fontsize=12)


def _heading(first: Axes, last: Axes, text: str) -> None:
    """Text centred above the axes from `first` to `last`."""
    box = first.get_position()
    centre = (box.x0 + last.get_position().x1) / 2
    first.figure.text(centre, box.y1 + 0.012, text, ha="center", va="bottom", fontsize=10)


def _crop(split: DetectionSet, image: int, box: int, size: int = 64) -> Any:
    """The square around a box, with a margin, as (size, size, 3) for `imshow`."""
    picture, target = split[image]
    x1, y1, x2, y2 = target["boxes"][box].tolist()
    half = 0.62 * max(x2 - x1, y2 - y1)
    height, width = picture.shape[-2:]
    middle_x, middle_y = _inside((x1 + x2) / 2, half, width), _inside((y1 + y2) / 2, half, height)
    xs = torch.linspace(middle_x - half, middle_x + half, size) / width * 2 - 1
    ys = torch.linspace(middle_y - half, middle_y + half, size) / height * 2 - 1
    grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1)[None]
    square = torch.nn.functional.grid_sample(
        picture[None], grid, padding_mode="border", align_corners=False
    )
    return square[0].permute(1, 2, 0).clamp(0, 1).numpy()


def _inside(middle: float, half: float, length: int) -> float:
    """The middle moved so that middle ± half stays within [0, length], where that is possible."""
    return min(max(middle, half), length - half) if 2 * half <= length else middle


def show(axes: Axes, image: Tensor) -> None:
    """An image (3, H, W) in [0, 1], its pixels as they are."""
    axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def _outline(axes: Axes, box: Sequence[float], text: str, colour: str) -> None:
    x1, y1, x2, y2 = box
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, lw=1.3))
    axes.text(
        x1, max(y1, 4), text, color="black", fontsize=6.5, va="bottom", clip_on=True,
        bbox={"facecolor": colour, "pad": 0.6, "linewidth": 0, "alpha": 0.85},
    )  # fmt: skip


def save(figure: Any, path: Path) -> None:
    """Write a figure and close it."""
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
