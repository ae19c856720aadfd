import math

import pytest

from benchmarks.accuracy.intervals import paired, t_quantile


# From any table of Student's t, two-sided 95 %.
@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (10, 2.228), (11, 2.201), (15, 2.131),
     (20, 2.086), (30, 2.042), (120, 1.980)],
)  # fmt: skip
def test_quantiles(freedom, expected):
    assert t_quantile(freedom) == pytest.approx(expected, abs=6e-4)


def test_no_freedom():
    with pytest.raises(ValueError, match="freedom: expected at least 1, but got 0"):
        t_quantile(0)


def test_by_hand():
    """Differences 1, 2 and 6: mean 3, standard deviation sqrt(7), half width 4.3027 sqrt(7/3)."""
    gap = paired({0: 11.0, 1: 22.0, 2: 36.0, 7: 1.0}, {0: 10.0, 1: 20.0, 2: 30.0, 8: 5.0})
    assert gap is not None
    assert (gap.n, gap.mean) == (3, 3.0)
    assert gap.half == pytest.approx(4.3027 * math.sqrt(7 / 3))
    assert not gap.beyond_noise
    assert str(gap) == "+3.0 ± 6.6"


def test_only_seeds_of_both_count():
    assert paired({0: 1.0}, {1: 1.0}) is None
    one = paired({0: 1.0, 1: 9.0}, {0: 0.5})
    assert one is not None and one.half is None and not one.beyond_noise
    assert str(one) == "+0.5 (n = 1)"


def test_an_effect_beyond_noise():
    gap = paired({0: 2.0, 1: 2.1, 2: 1.9}, dict.fromkeys(range(3), 1.0))
    assert gap is not None and gap.beyond_noise
    worse = paired(dict.fromkeys(range(3), 1.0), {0: 2.0, 1: 2.1, 2: 1.9})
    assert worse is not None and worse.beyond_noise and worse.mean == -gap.mean
