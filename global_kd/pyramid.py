"""Feature pyramids of two detectors: strides, pairing, channel adapters."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import _check

ADAPTERS = ("conv3x3", "conv1x1", "identity")


def pair_levels(
    student_strides: Sequence[float], teacher_strides: Sequence[float]
) -> list[tuple[int, int]]:
    """Indices ``(student, teacher)`` of the levels of equal stride, finest first.

    Of several levels of one stride (torchvision's MobileNet pyramids) the last one, the deepest,
    is taken.

    Raises:
        ValueError: No level has a partner.
    """
    student = {stride: i for i, stride in enumerate(student_strides)}
    teacher = {stride: j for j, stride in enumerate(teacher_strides)}
    paired = sorted(student.keys() & teacher.keys())
    if not paired:
        raise ValueError(
            f"levels: expected student and teacher levels of equal stride, but got student "
            f"strides {list(student_strides)} and teacher strides {list(teacher_strides)}"
        )
    return [(student[stride], teacher[stride]) for stride in paired]


def build_adapters(
    kind: str, student_channels: Sequence[int], teacher_channels: Sequence[int], seed: int = 0
) -> nn.ModuleList:
    """One linear channel adapter per level, student to teacher channels, no activation.

    ``"conv3x3"`` (the paper's), ``"conv1x1"`` (a ninth of its cost) or ``"identity"``. The global
    random state stays as it is: adding distillation must not change the student's own randomness.
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.ModuleList(nn.Conv2d(cs, ct, size, padding=size // 2) for cs, ct in pairs)


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
