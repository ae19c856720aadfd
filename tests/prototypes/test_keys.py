"""Keys: pseudo-random, and a function of the instance alone."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from global_kd.prototypes.keys import NEVER, _mix, digest, keys_of

MASK = 2**64 - 1
INT64 = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(INT64, min_size=1, max_size=5))
def test_mixing_is_the_finalizer_of_splitmix64(values):
    def mix(x):
        x &= MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)

    mixed = _mix(torch.tensor(values)).tolist()
    assert [x & MASK for x in mixed] == [mix(x) for x in values]


@given(st.lists(INT64, min_size=1, max_size=50, unique=True), INT64, st.integers(0, 1000))
def test_keys_are_in_range_distinct_and_of_the_instance_alone(ids, seed, turn):
    whole = keys_of(torch.tensor(ids), seed, turn)
    assert (whole >= 0).all() and (whole < NEVER).all()
    assert len(set(whole.tolist())) == len(ids)
    for x, key in zip(ids, whole.tolist(), strict=True):
        assert keys_of(torch.tensor([x]), seed, turn).item() == key


def test_keys_of_counted_ids_are_evenly_spread_and_change_with_seed_and_turn():
    ids = torch.arange(20_000)
    first = keys_of(ids, 0, 0).double() / NEVER
    for other in (keys_of(ids, 1, 0), keys_of(ids, 0, 1), keys_of(ids, -1, 0)):
        other = other.double() / NEVER
        # 20 000 draws: a standard deviation of .002 of the mean, of .007 of a correlation
        assert abs(other.mean() - 0.5) < 0.01
        assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < 0.03
    tenths = (first * 10).long().bincount(minlength=10) / len(ids)
    assert (tenths - 0.1).abs().max() < 0.01
    # neighbours know nothing of each other
    assert abs(torch.corrcoef(torch.stack([first[:-1], first[1:]]))[0, 1]) < 0.03


def test_a_digest_sees_every_bit_and_every_place():
    row = torch.randn(1, 40)
    seen = {digest(row).item()}
    for place in range(40):
        other = row.clone()
        other[0, place] = torch.nextafter(row[0, place], torch.tensor(10.0))
        seen.add(digest(other).item())
    for place in range(39):
        other = row.clone()
        other[0, [place, place + 1]] = other[0, [place + 1, place]]
        seen.add(digest(other).item())
    assert len(seen) == 1 + 40 + 39
    many = torch.randn(7, 40)
    assert torch.equal(digest(many)[3:4], digest(many[3:4].clone()))
