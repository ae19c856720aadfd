"""Pictures of the search for wrong labels: what a rule points at, and how often it is right."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from workshop.plots import COLOURS, save, show

from .corruption import CLEAN, KINDS, LABEL, Corrupted
from .suspicion import RULES

CURVES = ("omega", "prototype margin", "teacher class", "teacher both", "student both")
RIGHT, WRONG = "#9a9a9a", "#e0301e"


def draw_label_errors(
    corrupted: Corrupted,
    suspicions: dict[str, Tensor],
    class_names: Sequence[str],
    path: Path,
    *,
    rival: str = "teacher both",
) -> None:
    """The twenty instances of lowest omega, the twenty that `rival` suspects most, ROC curves."""
    figure = plt.figure(figsize=(14.5, 6.0))
    gallery, curves = figure.subfigures(1, 2, squeeze=False, width_ratios=[2.9, 1])[0]
    blocks = gallery.subfigures(2, 1, squeeze=False).flat
    for block, rule in zip(blocks, ("omega", rival), strict=True):
        worst = suspicions[rule].topk(min(20, len(corrupted.kind))).indices.tolist()
        hits = sum(int(corrupted.kind[row]) != CLEAN for row in worst)
        name = "lowest ω" if rule == "omega" else f"most suspicious by “{RULES[rule]}”"
        block.suptitle(f"{name}: {hits} of {len(worst)} are wrong (red)", fontsize=11, y=0.99)
        grid = block.subplots(
            2, 10, gridspec_kw={"wspace": 0.08, "hspace": 0.3, "left": 0.01, "right": 0.985,
                                "bottom": 0.02, "top": 0.84},
        )  # fmt: skip
        for axes in grid.flat:
            axes.axis("off")
        for axes, row in zip(grid.flat, worst, strict=False):
            value = float(suspicions[rule][row])
            text = f"ω {1 - value:.2f}" if rule == "omega" else f"{value:.2f}"
            _draw_instance(axes, corrupted, row, class_names, text)
    panels = curves.subplots(
        2, 1, gridspec_kw={"hspace": 0.34, "left": 0.17, "right": 0.98, "bottom": 0.3, "top": 0.95}
    )
    wrong_label = corrupted.kind == LABEL
    wrong_box = (corrupted.kind != CLEAN) & ~wrong_label
    for axes, name, wrong in zip(panels, ("label", "box"), (wrong_label, wrong_box), strict=True):
        _draw_roc(axes, suspicions, wrong, wrong | (corrupted.kind == CLEAN))
        axes.set_title(f"wrong {name} against clean", fontsize=10)
        axes.set_ylabel("share of the wrong", fontsize=9)
    panels[1].set_xlabel("share of the clean that come before", fontsize=9)
    lines, names = panels[0].get_legend_handles_labels()
    curves.legend(lines, names, fontsize=7, frameon=False, loc="lower right")
    save(figure, path)


def _draw_instance(
    axes: Axes, corrupted: Corrupted, row: int, class_names: Sequence[str], text: str
) -> None:
    """An instance with context: the given box solid, the true one dashed where they differ."""
    scenes, truth, kind = corrupted.scenes, corrupted.truth, int(corrupted.kind[row])
    scene = int(torch.searchsorted(scenes.first, row, right=True)) - 1
    given, true = scenes.boxes[row], truth.boxes[row]
    colour = RIGHT if kind == CLEAN else WRONG
    axes.axis("on")
    show(axes, scenes[scene][0])
    corners = torch.stack([given, true])
    low, high = corners[:, :2].amin(dim=0), corners[:, 2:].amax(dim=0)
    half = max(12.0, 0.7 * float((high - low).max()))
    x, y = ((low + high) / 2).tolist()
    axes.set(xlim=(x - half, x + half), ylim=(y + half, y - half), facecolor="#e8e8e8")
    _outline(axes, given, "#ffd500", "-")
    if not torch.equal(given, true):
        _outline(axes, true, "#00e5ff", "--")
    label, was = class_names[int(scenes.labels[row])], class_names[int(truth.labels[row])]
    title = {LABEL: f"“{label}”, is {was}"}.get(kind, f"“{label}”")
    if kind not in (CLEAN, LABEL):
        title += f", {KINDS[kind]}"
    axes.set_title(title, fontsize=7.5, pad=2.5, color="black" if kind == CLEAN else WRONG)
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2.2)
    axes.text(
        0.04, 0.04, text, transform=axes.transAxes, color="white", fontsize=6.5,
        bbox={"facecolor": "black", "alpha": 0.6, "pad": 0.8, "linewidth": 0},
    )  # fmt: skip


def _outline(axes: Axes, box: Tensor, colour: str, style: str) -> None:
    """A box in pixels; imshow puts the middle of the first pixel at 0."""
    x1, y1, x2, y2 = (box - 0.5).tolist()
    axes.add_patch(
        Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, lw=1.2, linestyle=style)
    )


def _draw_roc(axes: Axes, suspicions: dict[str, Tensor], wrong: Tensor, asked: Tensor) -> None:
    colours = (*COLOURS, "#8172b3")
    for colour, rule in zip(colours, CURVES, strict=True):
        order = suspicions[rule][asked].argsort(descending=True)
        hit = wrong[asked][order].double()
        found, looked_at = hit.cumsum(0) / hit.sum(), (1 - hit).cumsum(0) / (1 - hit).sum()
        width = 2.4 if rule == "omega" else 1.4
        axes.plot([0, *looked_at.tolist()], [0, *found.tolist()], color=colour, linewidth=width,
                  label=textwrap.fill(RULES[rule], 48))  # fmt: skip
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
    axes.set(xlim=(0, 1), ylim=(0, 1.01))
    axes.grid(alpha=0.3)


def draw_omega(results: Sequence[dict[str, Any]], areas: tuple[float, float], path: Path) -> None:
    """Mean omega of held-out instances over training, by size; at the end, by kind of error."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 3.8), width_ratios=[1.8, 1], constrained_layout=True
    )
    small, medium = (round(area**0.5) for area in areas)
    names = {
        "all": "all",
        "small": f"small: up to {small}² px",
        "medium": f"medium: up to {medium}² px",
        "large": "large",
    }
    curves = [result["omega over training"] for result in results]
    for colour, (size, label) in zip(("black", *COLOURS), names.items(), strict=False):
        rows = [[point[size] for point in curve if size in point] for curve in curves]
        steps = [point["iteration"] for point in curves[0] if size in point]
        middle = [mean(values) for values in zip(*rows, strict=True)]
        left.plot(steps, middle, color=colour, label=label, marker="o", markersize=3)
        low, high = (list(map(f, zip(*rows, strict=True))) for f in (min, max))
        left.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    left.set(xlabel="iteration", ylabel="mean ω of held-out instances")
    left.set_title(f"mean and range over seeds: {len(results)}", fontsize=10)
    left.legend(frameon=False, fontsize=8, loc="lower right")
    for number, kind in enumerate(KINDS):
        values = [result["mean omega"][kind] for result in results]
        colour = RIGHT if kind == "clean" else WRONG
        right.bar(number, mean(values), color=colour, alpha=0.7, width=0.6)
        right.plot([number] * len(values), values, "k.", markersize=5)
        right.text(number, max(values), f"{mean(values):.3f}\n", ha="center", fontsize=8)
    right.set_xticks(range(len(KINDS)), KINDS)
    right.set(ylabel="mean ω after training", ylim=(0, 1.1))
    right.set_title("training instances, by what was done to them", fontsize=10)
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="y")
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)
