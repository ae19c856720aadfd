"""What hypothesis draws: maps with boxes of every kind, paired rows, classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

STRIDES = (8, 4, 16.0, 1, 0.5, 3)  # a power of two, a float, below one, not a power of two


def random(shape, seed: int, dtype=torch.float64) -> Tensor:
    """Normal values from a generator of their own, made in float64 so that dtypes agree."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@dataclass
class Scene:
    """Two paired maps with boxes on them."""

    student: Tensor
    teacher: Tensor
    boxes: Tensor
    image_index: Tensor
    weights: Tensor
    stride: float

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.student.shape[-2:])


@st.composite
def boxes_in(draw, height: int, width: int, stride: float) -> list[float]:
    """One box on a grid of quarter cells: inside, crossing, outside, zero-area, on the border."""

    def interval(size: int) -> tuple[float, float]:
        low = draw(st.integers(-6 * size, 8 * size))  # quarter cells: up to two canvases away
        side = draw(st.one_of(st.just(0), st.integers(1, 3), st.integers(0, 8 * size)))
        return low * stride / 4, (low + side) * stride / 4

    (x1, x2), (y1, y2) = interval(width), interval(height)
    return [x1, y1, x2, y2]


@st.composite
def scenes(draw, min_boxes: int = 0, max_boxes: int = 5, dtype=torch.float64) -> Scene:
    batch, channels = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    height, width = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    stride = draw(st.sampled_from(STRIDES))
    count = draw(st.integers(min_boxes, max_boxes))
    boxes = [draw(boxes_in(height, width, stride)) for _ in range(count)]
    images = [draw(st.integers(0, batch - 1)) for _ in range(count)]
    weights = [draw(st.sampled_from((0.0, 0.25, 0.6, 1.0))) for _ in range(count)]
    seed = draw(st.integers(0, 10_000))
    shape = (batch, channels, height, width)
    return Scene(
        student=random(shape, seed, dtype),
        teacher=random(shape, seed + 1, dtype),
        boxes=torch.tensor(boxes, dtype=dtype).reshape(-1, 4),
        image_index=torch.tensor(images, dtype=torch.int64),
        weights=torch.tensor(weights, dtype=dtype),
        stride=stride,
    )


def scene(
    batch=2, channels=3, size=(6, 8), count=4, stride=8, seed=0, dtype=torch.float64
) -> Scene:
    """An ordinary scene: boxes inside the canvas, a few cells wide."""
    height, width = size
    generator = torch.Generator().manual_seed(seed)
    span = torch.tensor([width * stride, height * stride], dtype=torch.float64)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * span * 0.6
    sides = (0.1 + 0.3 * torch.rand(count, 2, generator=generator, dtype=torch.float64)) * span
    images = torch.arange(count) % batch
    return Scene(
        student=random((batch, channels, height, width), seed, dtype),
        teacher=random((batch, channels, height, width), seed + 1, dtype),
        boxes=torch.cat([corner, corner + sides], 1).to(dtype),
        image_index=images,
        weights=torch.rand(count, generator=generator, dtype=torch.float64).to(dtype),
        stride=stride,
    )


@dataclass
class Relation:
    """Rows and prototypes of one level in both spaces, with unequal channel counts."""

    student: Tensor
    teacher: Tensor
    student_prototypes: Tensor
    teacher_prototypes: Tensor
    prototype_labels: Tensor
    labels: Tensor
    weights: Tensor

    @property
    def features(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.student, self.teacher, self.student_prototypes, self.teacher_prototypes


def relation(rows=5, prototypes=4, cs=3, ct=6, classes=3, seed=0, dtype=torch.float64, levels=None):
    lead = () if levels is None else (levels,)
    generator = torch.Generator().manual_seed(seed)
    return Relation(
        student=random((*lead, rows, cs), seed + 1, dtype),
        teacher=random((*lead, rows, ct), seed + 2, dtype),
        student_prototypes=random((*lead, prototypes, cs), seed + 3, dtype),
        teacher_prototypes=random((*lead, prototypes, ct), seed + 4, dtype),
        prototype_labels=torch.randint(-1, classes, (*lead, prototypes), generator=generator),
        labels=torch.randint(0, classes, (rows,), generator=generator),
        weights=torch.rand((*lead, rows), generator=generator, dtype=torch.float64).to(dtype),
    )


@st.composite
def relations(draw, dtype=torch.float64) -> Relation:
    return relation(
        rows=draw(st.integers(0, 6)),
        prototypes=draw(st.integers(0, 6)),
        cs=draw(st.integers(1, 5)),
        ct=draw(st.integers(1, 5)),
        classes=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 10_000)),
        dtype=dtype,
        levels=draw(st.sampled_from((None, 1, 3))),
    )
