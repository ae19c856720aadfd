"""Levels: pairing by stride, assignment of boxes, adapters."""

import pytest
import torch

from global_kd.hooks import infer_stride
from global_kd.instances import assign_levels, pool_levels
from global_kd.pyramid import align_levels, build_adapters, pair_levels
from global_kd.targets import Targets


def test_levels_pair_by_stride_not_by_index():
    assert pair_levels([4, 8, 16, 32, 64], [8, 16, 32, 64, 128]) == [(1, 0), (2, 1), (3, 2), (4, 3)]
    assert pair_levels([16, 8], [8, 16]) == [(1, 0), (0, 1)]  # finest first
    # torchvision's MobileNet has stride 32 twice: the deeper one counts
    assert pair_levels([32, 32, 64], [4, 8, 16, 32, 64]) == [(1, 3), (2, 4)]
    # about equal: within half an octave, the nearest first, each level once
    assert pair_levels([8, 16, 32], [14]) == [(1, 0)]
    assert pair_levels([16, 32], [14, 18]) == [(0, 1)]
    assert pair_levels([4, 8, 16], [16 / 3, 32 / 3]) == [(0, 0), (1, 1)]
    assert pair_levels([8, 16], [8, 14]) == [(0, 0), (1, 1)]
    with pytest.raises(ValueError, match=r"student strides \[8\] and teacher strides \[16\]"):
        pair_levels([8], [16])
    with pytest.raises(ValueError, match=r"student strides \[4\] and teacher strides \[8\]"):
        pair_levels([4], [8])


@pytest.mark.parametrize(
    ("size", "cells", "stride"),
    [
        ((96, 96), (24, 24), 4),
        ((224, 224), (16, 16), 14),
        ((100, 75), (13, 10), 8),
        ((100, 100), (11, 11), 8),  # convolutions without padding
        ((100, 150), (16, 20), 8),  # padded to a multiple of 32 inside
        ((256, 256), (18, 18), 14),  # patches; the rest is cut off
        ((640, 480), (45, 34), 14),
    ],
)
def test_stride_of_a_map(size, cells, stride):
    assert infer_stride(size, cells) == stride


@pytest.mark.parametrize(
    ("side", "level"),
    # methods: below 112 px P2, below 224 P3, ..., from 896 P6 (the rule adds a pixel to each side)
    [(0, 0), (110.9, 0), (111.1, 1), (222.9, 1), (223.1, 2), (447.1, 3), (895.1, 4), (5000, 4)],
)
def test_assignment_is_the_released_rule(side, level):
    box = torch.tensor([[10.0, 10.0, 10.0 + side, 10.0 + side]])
    assert assign_levels(box, [4, 8, 16, 32, 64]).item() == level


def test_assignment_of_boxes_in_half_precision():
    """An area of 260 x 260 px overflows."""
    box = torch.tensor([[0.0, 0.0, 260.0, 260.0]])
    assert assign_levels(box.half(), [4, 8, 16, 32, 64]) == assign_levels(box, [4, 8, 16, 32, 64])


def test_assignment_on_a_pyramid_with_a_gap_goes_by_stride():
    sides = torch.tensor([50.0, 150, 300, 600, 1200])
    boxes = torch.stack([sides * 0, sides * 0, sides, sides], dim=1)
    full = assign_levels(boxes, [4, 8, 16, 32, 64])
    assert full.tolist() == [0, 1, 2, 3, 4]
    assert assign_levels(boxes, [4, 16, 64]).tolist() == [0, 0, 1, 1, 2]


def test_assignment_follows_the_first_stride_or_the_given_scale():
    box = torch.tensor([[0.0, 0.0, 150.0, 150.0]])
    assert assign_levels(box, [4, 8]).item() == 1
    assert assign_levels(box, [8, 16]).item() == 0  # 112 px at stride 8
    assert assign_levels(box, [8, 16], finest_scale=56).item() == 1


@pytest.mark.parametrize(("kind", "parameters"), [("conv3x3", 9), ("conv1x1", 1)])
def test_adapters_are_linear_and_seeded_and_leave_the_random_state(kind, parameters, monkeypatch):
    torch.manual_seed(1)
    random = torch.get_rng_state()
    gpus = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", gpus.append)
    one = build_adapters(kind, [3, 4], [5, 6])
    assert torch.equal(random, torch.get_rng_state()) and not gpus
    torch.manual_seed(2)  # the global state is not read either
    two, other = (build_adapters(kind, [3, 4], [5, 6], seed) for seed in (0, 1))
    assert not torch.equal(one[1].weight, other[1].weight)
    assert [c.weight.numel() for c in one] == [15 * parameters, 24 * parameters]
    assert torch.equal(one[1].weight, two[1].weight)
    x, y = torch.randn(2, 1, 3, 7, 7)
    zero = one[0](torch.zeros_like(x))
    torch.testing.assert_close(one[0](x + y) - zero, one[0](x) + one[0](y) - 2 * zero)


def test_identity_adapter_needs_equal_channels():
    assert isinstance(build_adapters("identity", [3], [3])[0], torch.nn.Identity)
    with pytest.raises(ValueError, match="level 1 has 4 in the student and 5 in the teacher"):
        build_adapters("identity", [3, 4], [3, 5])
    with pytest.raises(ValueError, match="adapter: expected one of .* but got 'mlp'"):
        build_adapters("mlp", [3], [3])


def test_levels_of_unequal_channels_share_one_table():
    targets = Targets(torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.tensor([0]), torch.tensor([0]))
    rows = pool_levels([torch.ones(1, 2, 4, 4), torch.ones(1, 3, 2, 2)], targets, [4, 8])
    assert rows.tolist() == [[[1, 1, 0]], [[1, 1, 1]]]


def level(height, width):
    return torch.arange(height * width).reshape(1, 1, height, width).float()


@pytest.mark.parametrize(
    ("student", "teacher", "student_size", "teacher_size", "stride"),
    [
        ((10, 15), (10, 15), (80, 120), (80, 120), 8),
        ((7, 11), (8, 12), (60, 92), (60, 92), 8),  # rounded down and up
        ((8, 12), (7, 11), (60, 92), (60, 92), 8),
        ((60, 80), (64, 80), (480, 640), (512, 640), 8),  # padded to a divisor of 32
        ((13, 19), (16, 32), (100, 150), (100, 150), 8),  # padded inside, to 128 in one direction
        ((1, 1), (2, 2), (50, 50), (64, 64), 64),
    ],
)
def test_what_rounding_and_padding_explain_is_cut(
    student, teacher, student_size, teacher_size, stride
):
    maps = level(*student), level(*teacher)
    sizes = {"student_size": student_size, "teacher_size": teacher_size}
    for options in (sizes, {} if teacher != (16, 32) else {"slack": 128}):
        s, t = align_levels(*maps, stride, stride, **options)
        height, width = (min(pair) for pair in zip(student, teacher, strict=True))
        assert torch.equal(s, maps[0][..., :height, :width])
        assert torch.equal(t, maps[1][..., :height, :width])


def test_a_teacher_that_resizes_inside_is_no_rounding():
    with pytest.raises(ValueError, match=r"saw 256 x 256 pixels \(32 x 32 .*640 x 640 \(80 x 80"):
        align_levels(level(32, 32), level(80, 80), 8, 8)
    with pytest.raises(ValueError, match="teacher: expected a grid of the student's canvas"):
        align_levels(level(32, 32), level(32, 80), 8, 8)  # in one direction only
    with pytest.raises(ValueError, match="teacher: expected a grid of the student's canvas"):
        align_levels(level(32, 32), level(48, 48), 16, 14)  # strides that differ


def test_a_side_that_saw_another_canvas_is_named():
    """`kd` was given 128 pixels and the student 160; a teacher's padding to 32 would explain it."""
    sizes = {"student_size": (128, 128), "teacher_size": (128, 128)}
    with pytest.raises(ValueError, match="^student: expected .*128 x 128.*20 x 20 .*160 x 160"):
        align_levels(level(20, 20), level(16, 16), 8, 8, **sizes)
    with pytest.raises(ValueError, match="^teacher: expected .*128 x 128.*20 x 16 .*160 x 128"):
        align_levels(level(16, 16), level(20, 16), 8, 8, **sizes)
    with pytest.raises(ValueError, match="^student: expected"):
        align_levels(level(10, 10), level(16, 16), 8, 8, **sizes)  # smaller, too
    with pytest.raises(ValueError, match="the student saw 128 x 128 .*the teacher 256 x 256"):
        align_levels(
            level(16, 16), level(32, 32), 8, 8, student_size=(128, 128), teacher_size=(256, 256)
        )


def test_a_scaled_teacher_is_measured_in_the_students_pixels():
    images = (96, 192)
    s, t = align_levels(
        level(12, 24), level(18, 36), 8, 16 / 3, student_size=images, teacher_size=images
    )
    assert s.shape == t.shape
