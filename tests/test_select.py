"""The candidate cut and the dual-space matching pursuit, against the objective's own definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import global_kd.functional as F
from tests import oracles
from tests.strategies import random


def rows(n: int, channels: int, seed: int, kind: str = "normal", dtype=torch.float64):
    """Unequal norms always; `clusters` looks like instances of a class, `few` repeats rows."""
    values = random((n, channels), seed)
    if kind == "clusters":
        values = random((3, channels), seed + 1).repeat(n // 3 + 1, 1)[:n] + 0.3 * values
    if kind == "few":
        values = values[torch.arange(n) % max(1, n // 2)]
    return (values * (0.5 + random((n, 1), seed + 2).abs())).to(dtype)


# --- density ---------------------------------------------------------------------------------


def circle(*angles: float):
    """Unit vectors at these angles: the cosine of two rows is that of the difference."""
    angle = torch.tensor(angles, dtype=torch.float64)
    return torch.stack([angle.cos(), angle.sin()], 1)


def test_density_by_hand():
    """Three rows in a bunch, two alone (density 1). N = 5, so the cut is the element of rank 2,
    the loosest of the bunch; the two denser ones stay. A factor on the rows changes nothing.
    """
    points = circle(0.0, 0.05, 0.11, 1.5, 3.0)
    assert F.density_candidates(points, points * 3).tolist() == [0, 1]


def test_both_spaces_have_to_agree():
    """Rows 0 and 1 are above the cut for the student, 1 and 2 for the teacher."""
    student, teacher = circle(0.0, 0.05, 0.11, 1.5, 3.0), circle(0.11, 0.05, 0.0, 1.5, 3.0)
    assert F.density_candidates(student, teacher).tolist() == [1]


def test_fallback_takes_the_largest_summed_density():
    """Above the cuts: rows 0, 1 for the student and 3, 4 for the teacher, so nobody in both.

    Sums of densities: 4.00, 4.00, 5.78, 3.96, 3.82. ceil(0.6 * 5) = 3 rows stay.
    """
    student, teacher = circle(0.0, 0.05, 0.11, 1.5, 3.0), circle(1.5, 3.0, 0.0, 0.2, 0.3)
    assert F.density_candidates(student, teacher).tolist() == [0, 1, 2]
    assert F.density_candidates(teacher, student).tolist() == [0, 1, 2]


@pytest.mark.parametrize("n", [0, 1, 2])
def test_so_few_that_nothing_can_be_above_the_cut(n):
    """N = 1 is its own cut, N = 2 is symmetric: the fallback keeps ceil(0.6 N), that is all."""
    chosen = F.density_candidates(random((n, 3), 0), random((n, 5), 1))
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == list(range(n))


def test_identical_rows_fall_back_to_the_lowest_indices():
    """All densities are equal, so none is strictly above: the first ceil(0.6 * 10) rows."""
    same = torch.tensor([[1.0, 0.0]]).repeat(10, 1)
    assert F.density_candidates(same, same).tolist() == [0, 1, 2, 3, 4, 5]


@given(
    n=st.integers(1, 40),
    cs=st.integers(1, 6),
    ct=st.integers(1, 6),
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(("normal", "clusters")),
    bandwidth=st.sampled_from((0.1, 0.5)),
    quantile=st.sampled_from((0.0, 0.25, 0.4, 0.5)),
)
def test_density_candidates_equal_the_definition(n, cs, ct, seed, kind, bandwidth, quantile):
    student, teacher = rows(n, cs, seed, kind), rows(n, ct, seed + 5, kind)
    chosen = F.density_candidates(student, teacher, bandwidth=bandwidth, quantile=quantile)
    assert chosen.dtype == torch.int64 and 1 <= len(chosen) <= n
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    expected, doubt = oracles.density_candidates(student, teacher, bandwidth, quantile)
    assume(not doubt)  # channels of one or two tie by construction
    assert chosen.tolist() == expected


def test_density_of_many_rows_is_the_same_in_blocks():
    """More rows than any sensible block size, checked against one big matrix."""
    n = 2500
    student, teacher = rows(n, 4, 0, "clusters"), rows(n, 6, 1, "clusters")

    def density(values):
        u = torch.nn.functional.normalize(values)
        return (-(((1 - u @ u.T) / 0.1) ** 2)).exp().sum(1)

    rho_s, rho_t = density(student), density(teacher)
    rank = int(0.4 * n)
    above = (rho_s > rho_s.sort().values[rank]) & (rho_t > rho_t.sort().values[rank])
    assert F.density_candidates(student, teacher).tolist() == above.nonzero().flatten().tolist()


def test_density_in_half_precision_stays_usable():
    student, teacher = rows(60, 8, 0, "clusters"), rows(60, 8, 3, "clusters")
    half = F.density_candidates(student.bfloat16(), teacher.bfloat16())
    wide = F.density_candidates(student.bfloat16().double(), teacher.bfloat16().double())
    assert len(set(half.tolist()) ^ set(wide.tolist())) <= 2


def test_density_ignores_the_scale_of_a_row():
    student, teacher = rows(30, 4, 0, "clusters"), rows(30, 5, 1, "clusters")
    scale = 10 ** (2 * random((30, 1), 9))
    assert torch.equal(
        F.density_candidates(student, teacher), F.density_candidates(student * scale, teacher)
    )


# --- pursuit ---------------------------------------------------------------------------------


def follow(student, teacher, picks, alpha=10.0, candidates=None, unique=True):
    """Every pick is the best of its step; where the best is clear, there is no other choice."""
    pursuit = oracles.Pursuit(student, teacher, alpha, candidates, unique)
    clear = True
    for pick in picks:
        assert pick in pursuit.open, f"{pick} was not open to choice: {pursuit.open}"
        errors = pursuit.errors()
        least, scale = min(errors.values()), max(pursuit.total(), 1e-12)
        assert errors[pick] <= least + 1e-9 * scale + 1e-12
        clear &= sum(e <= least + 1e-9 * scale for e in errors.values()) == 1
        pursuit.take(pick)
    return clear


def test_pursuit_by_hand():
    """Axis vectors, all arithmetic exact. Three rows on e0, two on e1, one on e2.

    A pick of e0 removes three rows' energy, e1 two, e2 one; among equals the lowest index.
    """
    axes = [2, 0, 1, 0, 1, 0]
    student = torch.eye(3, dtype=torch.float64)[axes]
    teacher = torch.eye(4, dtype=torch.float64)[axes] * 5  # the scale of a row does not matter
    assert F.select_prototypes(student, teacher, 3).tolist() == [1, 2, 0]
    # Nothing is left to explain: the remaining candidates tie at zero gain, lowest index first.
    # alpha = 0 keeps every number an integer, so that the tie is exact on any machine.
    picks = F.select_prototypes(student, teacher, 6, alpha=0.0)
    assert picks.tolist() == [1, 2, 0, 3, 4, 5]


def test_the_tie_term_by_hand():
    """Two spaces that disagree. Rows 0 and 1 agree for the student only; 2 and 3 in both.

    Without the tie (alpha = 0) candidate 0 explains 2 (student) + 1 (teacher) = 3 and candidate 2
    explains 2 + 2 = 4. With any alpha the agreeing pair wins even more.
    """
    student = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 1]]
    teacher = torch.eye(4, dtype=torch.float64)[[0, 1, 2, 2]]
    for alpha in (0.0, 10.0):
        assert F.select_prototypes(student, teacher, 1, alpha=alpha).tolist() == [2]


def test_alpha_changes_the_pick():
    """Student: rows 0-2 share an axis; teacher: all differ, but rows 3, 4 share axes in both.

    alpha = 0: candidate 0 gains 3 + 1 = 4 and so does candidate 3 with 2 + 2: a tie, index 0.
    alpha > 0 charges disagreement, so the pair that agrees in both spaces wins.
    """
    student = torch.eye(5, dtype=torch.float64)[[0, 0, 0, 1, 1]]
    teacher = torch.eye(5, dtype=torch.float64)[[0, 1, 2, 3, 3]]
    assert F.select_prototypes(student, teacher, 1, alpha=0.0).tolist() == [0]
    assert F.select_prototypes(student, teacher, 1, alpha=10.0).tolist() == [3]


@settings(max_examples=120)
@given(
    n=st.integers(1, 24),
    cs=st.integers(1, 7),
    ct=st.integers(1, 7),
    num=st.integers(1, 8),
    alpha=st.sampled_from((0.0, 0.5, 10.0, 1000.0)),
    unique=st.booleans(),
    given_candidates=st.booleans(),
    kind=st.sampled_from(("normal", "clusters", "few")),
    seed=st.integers(0, 10_000),
)
def test_picks_equal_brute_force(n, cs, ct, num, alpha, unique, given_candidates, kind, seed):
    student, teacher = rows(n, cs, seed, kind), rows(n, ct, seed + 5, kind)
    candidates = None
    if given_candidates:
        generator = torch.Generator().manual_seed(seed)
        candidates = torch.randperm(n, generator=generator)[: n // 2 + 1].sort().values
    picks = F.select_prototypes(
        student, teacher, num, alpha=alpha, candidates=candidates, unique=unique
    )
    usable = n if candidates is None else len(candidates)
    assert picks.dtype == torch.int64
    assert len(picks) == (min(num, usable) if unique else num)
    if unique:
        assert len(set(picks.tolist())) == len(picks)
    clear = follow(student, teacher, picks.tolist(), alpha, candidates, unique)
    if clear:
        steps = oracles.select_prototypes(student, teacher, num, alpha, candidates, unique)
        assert picks.tolist() == [step.pick for step in steps]


@pytest.mark.parametrize(
    ("n", "cs", "ct", "num"),
    [
        pytest.param(80, 16, 24, 10, id="a class of the size met in practice"),
        pytest.param(60, 3, 40, 20, id="many more picks than student channels"),
        pytest.param(30, 64, 64, 30, id="fewer rows than channels, every row picked"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_picks_equal_brute_force_on_larger_problems(n, cs, ct, num, dtype):
    student, teacher = rows(n, cs, 1, "clusters", dtype), rows(n, ct, 2, "clusters", dtype)
    picks = F.select_prototypes(student, teacher, num).tolist()
    assert follow(student, teacher, picks)
    assert picks == [s.pick for s in oracles.select_prototypes(student, teacher, num)]


def test_picks_may_repeat_when_asked():
    """Plain matching pursuit comes back to a row: two rows, a mixture, many picks."""
    student, teacher = rows(6, 2, 0), rows(6, 2, 1)
    picks = F.select_prototypes(student, teacher, 20, unique=False).tolist()
    assert len(picks) == 20 and len(set(picks)) <= 6
    assert follow(student, teacher, picks, unique=False)


def test_more_prototypes_than_candidates_gives_them_all():
    picks = F.select_prototypes(rows(4, 3, 0), rows(4, 3, 1), 10)
    assert sorted(picks.tolist()) == [0, 1, 2, 3]


def test_given_candidates_are_the_only_picks_but_all_rows_are_explained():
    """Rows outside the candidates still pull: three of them lie along candidate 1."""
    student = torch.eye(3, dtype=torch.float64)[[0, 1, 1, 1, 1]]
    picks = F.select_prototypes(student, student, 5, candidates=torch.tensor([0, 1]))
    assert picks.tolist() == [1, 0]


def test_no_rows_and_no_candidates_give_no_picks():
    empty = F.select_prototypes(torch.zeros(0, 3), torch.zeros(0, 5), 10)
    none = F.select_prototypes(
        rows(3, 3, 0), rows(3, 5, 0), 10, candidates=torch.zeros(0, dtype=torch.int64)
    )
    for picks in (empty, none):
        assert picks.dtype == torch.int64 and picks.tolist() == []


@pytest.mark.parametrize("unique", [True, False])
def test_a_row_that_is_zero_in_either_space_is_never_picked(unique):
    student, teacher = rows(6, 3, 0), rows(6, 4, 1)
    student[1] = 0
    teacher[4] = 0
    picks = F.select_prototypes(student, teacher, 8, unique=unique).tolist()
    assert not {1, 4} & set(picks)
    assert len(picks) == (4 if unique else 8)
    assert follow(student, teacher, picks, unique=unique)  # their other half still counts


def test_zero_rows_everywhere():
    """No direction to pick and none to measure, but no error either."""
    zeros = torch.zeros(5, 3)
    assert F.select_prototypes(zeros, zeros, 3).tolist() == []
    assert len(F.density_candidates(zeros, zeros)) >= 1


@pytest.mark.parametrize("unique", [True, False])
def test_identical_rows(unique):
    same = torch.tensor([[0.3, -0.7, 0.1]]).repeat(7, 1)
    picks = F.select_prototypes(same, same, 5, unique=unique).tolist()
    assert picks[0] == 0 and len(picks) == 5
    if unique:
        assert len(set(picks)) == 5


def test_a_candidate_named_twice_is_one_candidate():
    """`unique` speaks of instances, not of places in the list."""
    student, teacher = rows(6, 3, 0), rows(6, 4, 1)
    picks = F.select_prototypes(student, teacher, 4, candidates=torch.tensor([1, 1, 4, 4]))
    assert sorted(picks.tolist()) == [1, 4]


def test_an_exact_copy_never_wins_over_the_row_before_it():
    """Ties go to the lowest index also where the numbers are not round."""
    for seed in range(8):
        student, teacher = rows(9, 5, seed), rows(9, 7, seed + 50)
        doubled = torch.cat([student, student]), torch.cat([teacher, teacher])
        picks = F.select_prototypes(*doubled, 6, unique=False).tolist()
        assert max(picks) < 9, seed


@given(n=st.integers(2, 20), seed=st.integers(0, 10_000), unique=st.booleans())
def test_the_scale_of_a_row_does_not_matter(n, seed, unique):
    student, teacher = rows(n, 4, seed), rows(n, 6, seed + 5)
    expected = F.select_prototypes(student, teacher, 5, unique=unique)
    power = 2.0 ** torch.randint(-12, 12, (n, 1), generator=torch.Generator().manual_seed(seed))
    scaled = F.select_prototypes(student * power, teacher / power, 5, unique=unique)
    assert torch.equal(scaled, expected)


@given(n=st.integers(2, 20), seed=st.integers(0, 10_000))
def test_permuting_the_rows_permutes_the_picks(n, seed):
    student, teacher = rows(n, 4, seed), rows(n, 6, seed + 5)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    picks = F.select_prototypes(student, teacher, 6)
    assume(follow(student, teacher, picks.tolist()))  # ties follow the index, not the row
    assert torch.equal(order[F.select_prototypes(student[order], teacher[order], 6)], picks)


def test_more_picks_only_add_to_the_list():
    student, teacher = rows(40, 6, 0), rows(40, 9, 1)
    long = F.select_prototypes(student, teacher, 12).tolist()
    for num in (1, 5, 11):
        assert F.select_prototypes(student, teacher, num).tolist() == long[:num]


def test_deterministic_and_the_global_random_state_untouched():
    student, teacher = rows(50, 6, 0), rows(50, 9, 1)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = F.select_prototypes(student, teacher, 10)
    candidates = F.density_candidates(student, teacher)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(F.select_prototypes(student, teacher, 10), first)
    assert torch.equal(F.density_candidates(student, teacher), candidates)


def test_picking_keeps_no_graph_and_changes_no_input():
    student, teacher = rows(12, 3, 0).requires_grad_(), rows(12, 3, 1).requires_grad_()
    copies = student.detach().clone(), teacher.detach().clone()
    assert not F.select_prototypes(student, teacher, 4).requires_grad
    assert not F.density_candidates(student, teacher).requires_grad
    assert torch.equal(student, copies[0]) and torch.equal(teacher, copies[1])


def test_rows_of_half_precision():
    """bfloat16 rows are read exactly: the picks are those of the same numbers in float64."""
    student, teacher = rows(30, 8, 0).bfloat16(), rows(30, 5, 1).bfloat16()
    picks = F.select_prototypes(student, teacher, 8)
    assert torch.equal(picks, F.select_prototypes(student.double(), teacher.double(), 8))


def test_autocast_does_not_change_the_picks():
    """Under autocast a matrix product would drop to bfloat16 and pick other rows."""
    student, teacher = rows(60, 8, 0, "clusters", torch.float32), rows(60, 5, 1).float()
    picks, kept = F.select_prototypes(student, teacher, 10), F.density_candidates(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(F.select_prototypes(student, teacher, 10), picks)
        assert torch.equal(F.density_candidates(student, teacher), kept)
