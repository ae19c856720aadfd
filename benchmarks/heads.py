"""What two detectors' heads say of a scene: the facts that losses ask for beyond maps and boxes."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from global_kd import Targets
from global_kd.step import Dense, Grid, Positives, Queries, RegionOutputs, Regions

from .scene import Scene, Size, boxes_like_coco

BINS = 16  # of a side's distance
QUERIES = 300  # an image


def facts(scene: Scene, size: Size, device: torch.device) -> tuple[dict[str, Any], list[Tensor]]:
    """All facts by the names of `Step`, and those of the student's tensors that want a gradient.

    One location a cell, sigmoid scores, boxes and distributions of their sides; two second stages
    on the same proposals; a decoder's queries; a teacher's head of one 3x3 convolution.
    """
    g = torch.Generator().manual_seed(1)
    leaves: list[Tensor] = []

    def normal(*shape: int, learns: bool) -> Tensor:
        x = torch.randn(*shape, generator=g).to(device, size.dtype)
        if learns:
            leaves.append(x.requires_grad_())
        return x

    batch, classes, boxes = size.batch, size.classes, len(scene.targets)
    grids = tuple(Grid(s, *x.shape[2:]) for s, x in zip(scene.strides, scene.teacher, strict=True))
    count = sum(grid.rows for grid in grids)
    priors = torch.cat([cells(grid) for grid in grids]).to(device)

    def dense(learns: bool) -> Dense:
        reach = torch.cat([torch.full((grid.rows, 1), 2 * grid.stride) for grid in grids])
        far = torch.rand(batch, count, 4, generator=g) * reach
        decoded = (priors.cpu() + far * torch.tensor([-1, -1, 1, 1])).to(device)
        if learns:
            leaves.append(decoded.requires_grad_())
        logits = normal(batch, count, classes, learns=learns)
        bins = normal(batch, count, 4, BINS, learns=learns)
        return Dense(logits, grids, boxes=decoded, bins=bins, priors=priors)

    def second_stage(learns: bool) -> RegionOutputs:
        regressed = proposals.boxes[:, None].repeat(1, classes, 1)
        if learns:
            leaves.append(regressed.requires_grad_())
        return RegionOutputs(normal(rows, classes + 1, learns=learns), regressed)

    of_proposals = 4 * size.rows  # a quarter has a ground truth
    rows = batch * of_proposals
    proposals = Targets(
        boxes_like_coco(rows, size.height, size.width, g),
        torch.randint(1, classes + 1, (rows,), generator=g),
        torch.arange(batch).repeat_interleave(of_proposals),
    ).to(device)
    of_image = boxes // batch  # ground truths lie image by image
    match = torch.randint(-3 * of_image, of_image, (rows,), generator=g).to(device).clamp(min=-1)
    match = torch.where(match >= 0, match + proposals.image_index * of_image, -1)
    regions = Regions(proposals, match, second_stage(True), second_stage(False))

    assigned = torch.full((batch, count), -1)
    for image in range(batch):
        where = torch.randperm(count, generator=g)[: size.rows]
        box = torch.randint(of_image, where.shape, generator=g)
        assigned[image, where] = image * of_image + box
    student, teacher = dense(True), dense(False)
    weight = torch.randn(classes + 4, size.channels, 3, 3, generator=g) / (3 * size.channels**0.5)
    weight = weight.to(device, size.dtype)
    outside = boxes_like_coco(batch * QUERIES, size.height, size.width, g).to(device)
    images = torch.rand(batch, 3, size.height, size.width, generator=g)
    found = {
        "positives": Positives(
            scene.logit_box, student=scene.student_logits, teacher=scene.teacher_logits
        ),
        "dense": (student, teacher),
        "student_dense": student,
        "teacher_dense": teacher,
        "assigned": assigned.to(device),
        "regions": regions,
        "teacher_regions": regions,
        "queries": Queries(
            normal(batch, QUERIES, size.channels, learns=False),
            normal(batch, QUERIES, classes, learns=False),
            outside.view(batch, QUERIES, 4),
        ),
        "images": images.to(device, size.dtype),
        "teacher_head": lambda maps: judged(maps, weight, teacher),
    }
    return found, [*leaves, scene.student_logits]


def cells(grid: Grid) -> Tensor:
    """Each location as a box of one cell, `(N, 4)`."""
    y, x = torch.meshgrid(torch.arange(grid.height), torch.arange(grid.width), indexing="ij")
    corner = torch.stack([x, y], dim=2).view(-1, 2) * grid.stride
    return torch.cat([corner, corner + grid.stride], dim=1)


def judged(maps: Any, weight: Tensor, like: Dense) -> Dense:
    """The teacher's head: classes and the distances of the sides, by one convolution."""
    seen = [functional.conv2d(x, weight, padding=1).flatten(2).movedim(1, 2) for x in maps]
    rows = torch.cat(seen, dim=1)
    assert like.priors is not None
    sign = torch.tensor([-1.0, -1.0, 1.0, 1.0], device=rows.device)
    boxes = like.priors + rows[..., -4:].exp() * sign
    return replace(like, logits=rows[..., :-4], boxes=boxes)
