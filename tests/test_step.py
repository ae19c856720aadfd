"""Records of a step: dense heads and how those of two detectors are paired."""

import pytest
import torch

from global_kd.step import Dense, Grid, Positives, Step, pair_dense

GRIDS = (Grid(8, 3, 4, 2), Grid(16, 2, 2, 2))
ROWS = 32


def dense(grids=GRIDS, classes=3, batch=2, seed=0, **options):
    rows = sum(grid.rows for grid in grids)
    g = torch.Generator().manual_seed(seed)
    return Dense(torch.randn(batch, rows, classes, generator=g), tuple(grids), **options)


def test_probabilities_leave_the_background_out():
    plain = dense()
    assert torch.equal(plain.probabilities(), plain.logits.sigmoid())
    for background, kept in ((0, [1, 2]), (2, [0, 1]), (-1, [0, 1])):
        soft = dense(activation="softmax", background=background)
        assert torch.equal(soft.probabilities(), soft.logits.softmax(dim=2)[..., kept])
    half = Dense(plain.logits.bfloat16(), GRIDS)
    assert half.scores.dtype == torch.float32


def test_the_location_view_takes_the_best_anchor_and_class():
    x = dense(valid=torch.arange(ROWS) != 3)
    fine, coarse = x.score_maps()
    p = x.logits.sigmoid()
    for y in range(3):
        for column in range(4):
            rows = [2 * (4 * y + column) + a for a in range(2)]
            expected = torch.stack([p[:, r].amax(dim=1) for r in rows if r != 3]).amax(dim=0)
            assert torch.equal(fine[:, y, column], expected)
    assert coarse.shape == (2, 2, 2)
    assert torch.equal(x.score_map(16, (2, 2)), coarse)
    assert torch.equal(x.score_map(8, (2, 4)), fine[:, :2])
    larger = x.score_map(8, (4, 5))
    assert torch.equal(larger[:, :3, :4], fine) and larger[:, 3].eq(0).all()
    assert x.score_map(32, (1, 1)) is None


def numbered(*grids):
    """Every row says where it is: stride, y, x and anchor."""
    rows = [
        [g.stride, y, x, a]
        for g in grids
        for y in range(g.height)
        for x in range(g.width)
        for a in range(g.anchors)
    ]
    return Dense(
        torch.tensor(rows, dtype=torch.float32)[None],
        tuple(grids),
        priors=torch.tensor(rows, dtype=torch.float32),
    )


@pytest.mark.parametrize(
    ("mine", "theirs", "shared"),
    [
        pytest.param(GRIDS, GRIDS, GRIDS, id="equal"),
        pytest.param(GRIDS, (Grid(8, 5, 4, 2), Grid(16, 2, 3, 2)), GRIDS, id="other padding"),
        pytest.param(
            (Grid(8, 4, 4), Grid(16, 2, 2), Grid(32, 1, 1)),
            (Grid(16, 3, 1), Grid(32, 2, 2), Grid(64, 1, 1)),
            (Grid(16, 2, 1), Grid(32, 1, 1)),
            id="other levels",
        ),
    ],
)
def test_rows_are_paired_by_stride_and_cell(mine, theirs, shared):
    a, b, rows = pair_dense(numbered(*mine), numbered(*theirs))
    assert a.grids == b.grids == shared
    assert torch.equal(a.logits, numbered(*shared).logits)
    assert torch.equal(a.logits, b.logits) and torch.equal(a.priors, b.priors)
    whole = numbered(*mine).logits
    assert torch.equal(whole if rows is None else whole[:, rows], a.logits)
    assert (rows is None) == (tuple(mine) == tuple(shared))


def test_a_row_counts_where_it_is_valid_on_both_sides():
    some = torch.arange(ROWS) % 2 == 0
    others = torch.stack([torch.arange(ROWS) % 3 == 0, torch.arange(ROWS) < 5])
    a, b, _ = pair_dense(dense(valid=some), dense(valid=others))
    assert torch.equal(a.valid, some & others) and torch.equal(b.valid, some & others)
    a, b, _ = pair_dense(dense(), dense(valid=some))
    assert torch.equal(a.valid, some) and torch.equal(b.valid, some)


def test_two_levels_of_one_stride_keep_their_order():
    """torchvision's MobileNet pyramids put out two levels of one grid."""
    grids = (Grid(32, 2, 2), Grid(32, 2, 2), Grid(64, 1, 1))
    x, y = dense(grids), dense(grids)
    a, b, rows = pair_dense(x, y)
    assert rows is None and torch.equal(a.logits, b.logits)
    one, two, rows = pair_dense(x, dense(grids[1:]))
    assert torch.equal(rows, torch.arange(4, 9))  # the last ones belong together
    assert one.grids == two.grids == grids[1:]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (dense(classes=5), "3 of sigmoid class logits a location, the teacher 5 of sigmoid"),
        (dense(activation="softmax"), "3 of sigmoid .* 3 of softmax"),
        (dense((Grid(8, 3, 4, 1),)), "at stride 8 the student has 2 anchors a cell, the teacher 1"),
        (dense((Grid(64, 1, 1),)), r"no level of equal stride: .*\[8, 16\].*\[64\]"),
    ],
)
def test_rows_that_have_no_partner_are_refused(other, message):
    with pytest.raises(ValueError, match=message):
        pair_dense(dense(), other)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"logits: expected \(B, 32, K\)"):
        Dense(torch.zeros(1, 31, 3), GRIDS)
    with pytest.raises(ValueError, match=r"boxes: expected shape \(1, 32, 4\)"):
        Dense(torch.zeros(1, 32, 3), GRIDS, boxes=torch.zeros(1, 31, 4))
    with pytest.raises(ValueError, match="student, teacher: expected class logits of both"):
        Positives(torch.zeros(1, dtype=torch.int64), student=torch.zeros(1, 3))


def test_a_step_of_some_levels():
    maps = [torch.rand(1, 2, 4, 4), torch.rand(1, 2, 2, 2), torch.rand(1, 2, 1, 1)]
    step = Step(maps, maps, (8, 16, 32), omega=torch.arange(6.0).view(3, 2))
    some = step.at([0, 2])
    assert some.strides == (8, 32) and some.teacher[1] is maps[2]
    assert torch.equal(some.omega, torch.tensor([[0.0, 1], [4, 5]]))
    assert step.at([0, 1, 2]) is step
