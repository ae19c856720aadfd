"""Feature pyramids of two detectors: strides, pairing, channel adapters."""

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import _check

ADAPTERS = ("conv3x3", "conv1x1", "match", "projector", "identity")


def pair_levels(
    student_strides: Sequence[float], teacher_strides: Sequence[float]
) -> list[tuple[int, int]]:
    """Indices ``(student, teacher)`` of the levels that belong together, finest first.

    Levels of equal stride do. A student level without an equal takes the unpaired teacher level of
    the nearest stride, if the two are less than a factor of sqrt(2) apart (a ViT of stride 14
    beside 16). Of several levels of one stride (torchvision's MobileNet pyramids) the last one, the
    deepest, is taken.

    Raises:
        ValueError: No level has a partner.
    """
    student = {stride: i for i, stride in enumerate(student_strides)}
    teacher = {stride: j for j, stride in enumerate(teacher_strides)}
    paired = {stride: stride for stride in student.keys() & teacher.keys()}
    near = sorted(
        (abs(math.log2(s / t)), s, t)
        for s in student.keys() - paired.keys()
        for t in teacher.keys() - paired.keys()
    )
    for octaves, s, t in near:
        if octaves < 0.5 and s not in paired and t not in paired.values():
            paired[s] = t
    if not paired:
        raise ValueError(
            f"levels: expected student and teacher levels of about equal stride, but got student "
            f"strides {list(student_strides)} and teacher strides {list(teacher_strides)}; "
            "teacher_scale changes the teacher's"
        )
    return [(student[s], teacher[paired[s]]) for s in sorted(paired)]


def align_levels(
    student: Tensor,
    teacher: Tensor,
    student_stride: float,
    teacher_stride: float,
    *,
    student_size: Sequence[float] | None = None,
    teacher_size: Sequence[float] | None = None,
    slack: float = 32.0,
) -> tuple[Tensor, Tensor]:
    """Maps ``(B, C, H, W)`` of one level on one grid: cell for cell the same part of the image.

    Cells are counted from the top left in both networks. Where strides are equal and one grid is a
    cell or more larger (rounding, padding to another multiple), both are cut to the smaller one:
    nothing is interpolated. Where strides differ, the teacher's map is sampled bilinearly at the
    centres of the student's cells.

    Args:
        student: The student's map.
        teacher: The teacher's, not necessarily of the same grid.
        student_stride: Pixels per cell, of the student's network input.
        teacher_stride: Likewise, in the student's pixels too (divided by a ``teacher_scale``).
        student_size: ``(H, W)`` of the canvas that the student is said to have seen; with it, the
            grid must be this canvas's: to less than two cells, or padded inside to a multiple of
            32, 64 or 128.
        teacher_size: Likewise, in the student's pixels.
        slack: Pixels by which what both saw may differ beyond two cells: the multiple to which
            either is padded, such as a teacher's divisor.

    Raises:
        ValueError: Grids that are not of one canvas: another resolution than was said, or a network
            that resizes inside.
    """
    _check_canvas("student", student, student_stride, student_size)
    _check_canvas("teacher", teacher, teacher_stride, teacher_size)
    mine, theirs = student_size, teacher_size
    if mine is None or theirs is None:
        mine = [cells * student_stride for cells in student.shape[2:]]
        theirs = [cells * teacher_stride for cells in teacher.shape[2:]]
    slack += 2 * max(student_stride, teacher_stride)
    if any(abs(m - t) > slack for m, t in zip(mine, theirs, strict=True)):
        raise ValueError(
            "teacher: expected a grid of the student's canvas, but the student saw "
            f"{_canvas(mine)} pixels ({_cells(student, student_stride)}) and the teacher "
            f"{_canvas(theirs)} ({_cells(teacher, teacher_stride)}); a teacher that resizes inside "
            "needs teacher_scale, or its resizing switched off"
        )
    if student_stride == teacher_stride:
        height = min(student.shape[2], teacher.shape[2])
        width = min(student.shape[3], teacher.shape[3])
        return student[:, :, :height, :width], teacher[:, :, :height, :width]
    ratio = student_stride / teacher_stride

    def centres(cells: int, theirs: int) -> Tensor:
        at = torch.arange(cells, device=teacher.device, dtype=torch.float32) + 0.5
        return at * (2 * ratio / theirs) - 1  # grid_sample: the whole map is [-1, 1]

    y = centres(student.shape[2], teacher.shape[2])
    x = centres(student.shape[3], teacher.shape[3])
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    sampled = functional.grid_sample(
        teacher.float(),
        grid.expand(len(teacher), -1, -1, -1),
        padding_mode="border",
        align_corners=False,
    )
    return student, sampled.to(teacher.dtype)


def _check_canvas(side: str, x: Tensor, stride: float, size: Sequence[float] | None) -> None:
    """Cells times stride is what this side is said to have seen."""
    if size is None:
        return
    for cells, pixels in zip(x.shape[2:], size, strict=True):
        padded = any(cells * stride == math.ceil(pixels / k) * k for k in (32, 64, 128))
        if abs(cells * stride - pixels) >= 2 * stride and not padded:
            raise ValueError(
                f"{side}: expected a map of a canvas of {_canvas(size)} pixels, but got "
                f"{_cells(x, stride)}, which it makes of about "
                f"{_canvas([n * stride for n in x.shape[2:]])}; pass the images that it was called "
                "with, of which it resizes none inside"
            )


def _canvas(size: Sequence[float]) -> str:
    return " x ".join(f"{side:g}" for side in size)


def _cells(x: Tensor, stride: float) -> str:
    return f"{x.shape[2]} x {x.shape[3]} cells of stride {stride:g}"


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """New modules made within have the initial values of this seed.

    The global random state stays as it is: adding distillation must not change the student's own
    randomness.
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)  # torch.manual_seed reseeds GPUs, too
        yield


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors made within are of this dtype unless they are told otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_adapters(
    kind: str, student_channels: Sequence[int], teacher_channels: Sequence[int], seed: int = 0
) -> nn.ModuleList:
    """One channel adapter per level, student to teacher channels.

    ``"conv3x3"`` (that of global knowledge), ``"conv1x1"`` (a ninth of its cost), ``"match"``
    (1x1 where channels differ, nothing where they do not), ``"projector"`` (1x1, ReLU, 1x1; the
    only one that is not linear) or ``"identity"``. The global random state stays as it is: adding
    distillation must not change the student's own randomness.
    """
    _check.one_of("adapter", kind, ADAPTERS)
    pairs = list(zip(student_channels, teacher_channels, strict=True))
    if kind == "identity":
        for level, (cs, ct) in enumerate(pairs):
            if cs != ct:
                raise ValueError(
                    f"adapter: 'identity' expects equal channels, but level {level} has {cs} in "
                    f"the student and {ct} in the teacher; use 'conv1x1' or 'conv3x3'"
                )
        return nn.ModuleList(nn.Identity() for _ in pairs)
    size = 3 if kind == "conv3x3" else 1

    def adapter(cs: int, ct: int) -> nn.Module:
        if kind == "match" and cs == ct:
            return nn.Identity()
        conv = nn.Conv2d(cs, ct, size, padding=size // 2)
        if kind != "projector":
            return conv
        return nn.Sequential(conv, nn.ReLU(), nn.Conv2d(ct, ct, 1))

    with seeded(seed):
        return nn.ModuleList(adapter(cs, ct) for cs, ct in pairs)


def start_small(adapters: nn.Module, seed: int = 0) -> None:
    """Convolutions that begin near 0, as released with FGFI and DeFeat.

    Weights are ``1e-4`` times normal values folded into (-2, 2), biases 0: the first steps then
    pull the student's maps hardly at all. The global random state stays as it is.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in adapters.modules():
        if isinstance(module, nn.Conv2d):
            values = torch.randn(module.weight.shape, generator=generator).fmod(2).mul(1e-4)
            with torch.no_grad():
                module.weight.copy_(values)
                if module.bias is not None:
                    module.bias.zero_()


def check_pyramids(
    student: Sequence[Tensor], teacher: Sequence[Tensor], strides: Sequence[float]
) -> None:
    """Paired levels of equal batch, height and width; one for each stride."""
    for name, levels in (("student", student), ("teacher", teacher)):
        if isinstance(levels, Tensor) or not all(isinstance(x, Tensor) for x in levels):
            raise TypeError(f"{name}: expected a list of maps (B, C, H, W), one per level")
        if len(levels) != len(strides):
            raise ValueError(
                f"{name}: expected {len(strides)} levels (strides {list(strides)}), but got "
                f"{len(levels)}"
            )
        for level, x in enumerate(levels):
            _check.tensor(f"{name}[{level}]", x, 4, "(B, C, H, W)")
            _check.floating(f"{name}[{level}]", x)
    for level, (s, t) in enumerate(zip(student, teacher, strict=True)):
        if s.shape[0] != t.shape[0] or s.shape[2:] != t.shape[2:]:
            raise ValueError(
                f"level {level} (stride {strides[level]}): expected maps of equal batch, height "
                f"and width, but got student {tuple(s.shape)} and teacher {tuple(t.shape)}"
            )
        _check.same_device(**{f"student[{level}]": s, f"teacher[{level}]": t})
