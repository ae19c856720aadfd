"""Prototype generation: what is collected, what comes out, and that it resumes."""

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from global_kd import PrototypeBank, PrototypeGenerator, Targets
from global_kd.functional import density_candidates, select_prototypes

LEVELS, CS, CT, CLASSES = 2, 3, 5, 4


def rows(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(LEVELS, count, CS, generator=g)
    teacher = torch.randn(LEVELS, count, CT, generator=g)
    labels = torch.randint(0, CLASSES, (count,), generator=g)
    return student, teacher, targets_for(labels)


def targets_for(labels, side=50.0, ids=None):
    count = len(labels)
    boxes = torch.tensor([[5.0, 5.0, 5.0 + side, 5.0 + side]]).repeat(count, 1)
    return Targets(boxes, labels, torch.zeros(count).long(), ids)


def take(student, teacher, targets, index):
    ids = None if targets.ids is None else targets.ids[index]
    picked = Targets(targets.boxes[index], targets.labels[index], targets.image_index[index], ids)
    return student[:, index], teacher[:, index], picked


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers(), strict=True))


@given(st.lists(st.integers(0, 60), max_size=4), st.integers(0, 99))
def test_any_chunking_gives_the_prototypes_of_the_whole(cuts, seed):
    """One batch, many, or empty ones between: with the key of a row fixed, so is the bank."""
    student, teacher, targets = rows(60, seed)
    whole = PrototypeGenerator(CLASSES, 3)
    whole.add(student, teacher, targets)
    parts = PrototypeGenerator(CLASSES, 3)
    edges = [0, *sorted(cuts), 60]
    for start, stop in zip(edges, edges[1:], strict=False):
        parts.add(*take(student, teacher, targets, slice(start, stop)))
        len(parts)  # a cut in between changes nothing
    # Keys are drawn per batch from one stream, so the order within a class may be compared too.
    assert equal(whole.generate(), parts.generate())


def test_prototypes_are_density_cut_and_pursuit_of_each_level_and_class():
    student, teacher, targets = rows(80)
    targets = Targets(targets.boxes, targets.labels, targets.image_index, torch.arange(80) + 1000)
    generator = PrototypeGenerator(CLASSES, 4, alpha=3.0, quantile=0.3, bandwidth=0.2)
    generator.add(student, teacher, targets)
    bank = generator.generate()
    for label in range(CLASSES):
        mine = (targets.labels == label).nonzero()[:, 0]
        for level in range(LEVELS):
            s, t = student[level, mine], teacher[level, mine]
            candidates = density_candidates(s, t, bandwidth=0.2, quantile=0.3)
            picks = mine[select_prototypes(s, t, 4, alpha=3.0, candidates=candidates)]
            n = len(picks)
            assert bank.counts()[level, label] == n
            # The same instances in any order of the sample: compare by id.
            assert set(bank.ids[level, label, :n].tolist()) == set((picks + 1000).tolist())
            kept = bank.ids[level, label, :n] - 1000
            assert torch.equal(bank.student[level, label, :n], student[level, kept])
            assert torch.equal(bank.teacher[level, label, :n], teacher[level, kept])


def test_a_sample_per_class_is_kept_however_long_and_skewed_the_stream():
    generator = PrototypeGenerator(2, max_instances=50)
    for batch in range(40):
        labels = torch.zeros(300, dtype=torch.int64)
        labels[0] = batch % 20 == 0  # class 1: two instances in 12 000
        ids = torch.arange(300) + 300 * batch
        x = torch.randn(1, 300, 2)
        generator.add(x, x, targets_for(labels, ids=ids))
        held = sum(len(part.labels) for part in generator._sample.parts)
        assert held <= 1.25 * 2 * 50 + 4096 + 300  # the documented bound, one batch above it
    assert generator.counts().tolist() == [50, 2]


def test_the_sample_is_fair_over_the_stream():
    """Early and late rows are kept with the same probability, over many seeds."""
    kept = []
    for seed in range(40):
        generator = PrototypeGenerator(1, max_instances=20, seed=seed)
        for batch in range(10):
            x = torch.ones(1, 20, 1)
            ids = torch.arange(20) + 20 * batch
            generator.add(x, x, targets_for(torch.zeros(20, dtype=torch.int64), ids=ids))
            len(generator)  # cut after every batch, the worst case for fairness
        kept.append(generator._sample.parts[0].ids)
    thirds = torch.cat(kept).float().div(200 / 3).long().bincount(minlength=3) / (40 * 20)
    # 800 draws: a standard deviation of .0167 about 1/3
    assert thirds.tolist() == pytest.approx([1 / 3] * 3, abs=0.06)


@pytest.mark.parametrize(("side", "kept"), [(30.0, 0), (30.01, 3)])
def test_small_instances_are_left_out_strictly(side, kept):
    student, teacher, _ = rows(3)
    generator = PrototypeGenerator(CLASSES)
    generator.add(student, teacher, targets_for(torch.tensor([0, 1, 1]), side))
    assert len(generator) == kept
    assert generator.generate().valid.any() == (kept > 0)


def test_rows_of_an_overflowed_step_do_not_enter():
    student, teacher, targets = rows(4)
    student[1, 2, 0] = torch.inf
    teacher[0, 3, 1] = torch.nan
    generator = PrototypeGenerator(CLASSES)
    generator.add(student, teacher, targets)
    assert len(generator) == 2
    assert generator.generate().student.isfinite().all()


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_instances_are_normal(count):
    student, teacher, _ = rows(count)
    generator = PrototypeGenerator(CLASSES, min_side=0)
    generator.add(*rows(0))  # an image without boxes
    if count == 0:
        with pytest.raises(RuntimeError, match="no instances were added"):
            generator.generate()
        return
    generator.add(student, teacher, targets_for(torch.full((count,), 2)))
    counts = generator.generate().counts()
    assert (counts[:, 2] >= 1).all() and counts[:, [0, 1, 3]].sum() == 0


def test_deterministic_and_the_global_random_state_is_untouched():
    state = torch.get_rng_state()
    banks = []
    for _ in range(2):
        generator = PrototypeGenerator(CLASSES, max_instances=5, seed=7)
        for i in range(3):
            generator.add(*rows(40, i))
        banks.append(generator.generate())
    assert torch.equal(state, torch.get_rng_state())
    assert equal(*banks)


def test_resume_continues_exactly_and_loads_without_unpickling_code():
    generator = PrototypeGenerator(CLASSES, max_instances=6, seed=3)
    generator.add(*rows(50, 0))
    buffer = io.BytesIO()
    torch.save(generator.state_dict(), buffer)
    buffer.seek(0)
    resumed = PrototypeGenerator(CLASSES, max_instances=6, seed=99)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for g in (generator, resumed):
        g.add(*rows(50, 1))
    assert equal(generator.generate(), resumed.generate())
    with pytest.raises(ValueError, match="made for other classes"):
        PrototypeGenerator(2).load_state_dict(generator.state_dict())


def test_bad_rows_are_named():
    student, teacher, targets = rows(4)
    generator = PrototypeGenerator(CLASSES)
    with pytest.raises(ValueError, match=r"student: expected \(L, 4, Cs\)"):
        generator.add(student[:, :3], teacher[:, :3], targets)
    with pytest.raises(ValueError, match="labels: expected values below 4, but got 9"):
        generator.add(student, teacher, targets_for(torch.tensor([0, 9, 1, 1])))
    generator.add(student, teacher, targets)
    with pytest.raises(ValueError, match=r"teacher: expected \(2, R, 5\) like the rows before"):
        generator.add(student, student, targets)


def test_bank_keeps_old_prototypes_of_what_was_not_seen():
    bank = PrototypeBank(1, 2, 2, 1, 1)
    first, second = PrototypeBank(1, 2, 2, 1, 1), PrototypeBank(1, 2, 2, 1, 1)
    first.valid[0, :, :], first.student[:] = True, 1.0
    second.valid[0, 1, 0], second.student[0, 1, 0] = True, 2.0
    bank.update(first)
    bank.update(second)
    assert bank.student[0, :, :, 0].tolist() == [[1, 1], [2, 0]]
    assert bank.counts().tolist() == [[2, 1]]
    assert bank.flat()[2].tolist() == [[0, 0, 1, -1]]


def test_bank_of_other_shape_is_refused():
    bank = PrototypeBank(2, 3, 4, 5, 6)
    with pytest.raises(ValueError, match="made for other levels, classes or channels"):
        PrototypeBank(2, 3, 4, 5, 7).load_state_dict(bank.state_dict())


def numbered(count, classes=CLASSES, seed=0):
    student, teacher, targets = rows(count, seed)
    labels = targets.labels % classes
    return student, teacher, targets_for(labels, ids=torch.arange(count) + 10)


@given(st.permutations(range(40)), st.lists(st.integers(0, 40), max_size=3), st.booleans())
def test_neither_order_nor_batches_choose_the_sample(order, cuts, with_ids):
    student, teacher, targets = numbered(40)
    if not with_ids:
        targets = Targets(targets.boxes, targets.labels, targets.image_index)
    whole, parts = (PrototypeGenerator(CLASSES, 3, max_instances=4, seed=2) for _ in range(2))
    whole.add(student, teacher, targets)
    order = torch.tensor(order)
    edges = [0, *sorted(cuts), 40]
    for start, stop in zip(edges, edges[1:], strict=False):
        parts.add(*take(student, teacher, targets, order[start:stop]))
    assert parts.counts().tolist() == whole.counts().tolist()
    assert equal(whole.generate(), parts.generate())


def test_an_instance_that_is_seen_again_replaces_its_older_row():
    generator = PrototypeGenerator(1, 3)
    student, teacher, targets = numbered(3, classes=1)
    for moved in (0.0, 1.0, 2.0):
        generator.add(student + moved, teacher, targets)
        len(generator)
    assert generator.counts().tolist() == [3]
    kept = generator._sample.parts[0]
    at = kept.ids - 10
    assert torch.equal(kept.student, (student + 2.0).transpose(0, 1)[at])


def test_without_ids_the_teachers_features_tell_instances_apart():
    """The same box on the same pixels is the same instance, whatever the student makes of it."""
    generator = PrototypeGenerator(CLASSES, 3)
    student, teacher, targets = rows(5)
    generator.add(student, teacher, targets)
    generator.add(student + 1, teacher, targets)
    assert len(generator) == 5
    generator.add(student, teacher + 1, targets)
    assert len(generator) == 10


def test_every_reset_and_seed_draws_another_sample_of_the_same_size():
    samples = []
    for seed, resets in ((0, 0), (0, 1), (0, 2), (1, 0)):
        generator = PrototypeGenerator(1, max_instances=10, seed=seed)
        for _ in range(resets):
            generator.reset()
        generator.add(*numbered(60, classes=1))
        samples.append(frozenset(generator.sample()[2].tolist()))
    assert len(set(samples)) == 4 and {len(x) for x in samples} == {10}
    generator.reset(turn=0)
    generator.seed = 0
    generator.add(*numbered(60, classes=1))
    assert frozenset(generator.sample()[2].tolist()) == samples[0]


def test_limits_say_which_keys_a_full_sample_takes():
    generator = PrototypeGenerator(2, max_instances=10)
    student, teacher, targets = numbered(60, classes=1)
    generator.add(student, teacher, targets)
    _, labels, ids, key = generator.sample()
    limits = generator.limits(labels, key)
    taken = generator.keys(targets) <= limits[targets.labels]
    assert set(targets.ids[taken].tolist()) == set(ids.tolist())
    assert limits[1] > generator.keys(targets).max()  # a class that is not full takes any


def test_which_of_two_rows_of_one_call_is_kept_does_not_depend_on_their_order():
    """As where two ranks see one padded instance in the same step, with other rounding."""
    student, teacher, _ = rows(2)
    kept = []
    for order in ([0, 1], [1, 0]):
        generator = PrototypeGenerator(CLASSES, min_side=0)
        same = targets_for(torch.tensor([1, 1]), ids=torch.tensor([7, 7]))
        generator.add(student[:, order], teacher[:, order], same)
        assert len(generator) == 1
        kept.append(generator._sample.parts[0].student)
    assert torch.equal(*kept)


def test_one_box_with_two_labels_is_an_instance_of_either_class():
    student, teacher, _ = rows(1)
    for ids in (torch.tensor([7, 7]), None):
        generator = PrototypeGenerator(CLASSES, min_side=0)
        twice = targets_for(torch.tensor([1, 3]), ids=ids)
        generator.add(student[:, [0, 0]], teacher[:, [0, 0]], twice)
        assert generator.counts().tolist() == [0, 1, 0, 1]


def test_rows_of_a_checkpoint_follow_the_next_batch_to_its_device():
    """Loaded with map_location="cpu" and gone on with elsewhere; "meta" stands for elsewhere."""
    before = PrototypeGenerator(CLASSES)
    before.add(*rows(6))
    after = PrototypeGenerator(CLASSES)
    after.load_state_dict(before.state_dict())
    student, teacher, targets = rows(6, seed=1)
    after.add(student.to("meta"), teacher.to("meta"), targets.to("meta"))
    assert {x.device.type for part in after._sample.parts for x in part} == {"meta"}


@pytest.mark.parametrize("levels", [1, LEVELS])
def test_waiting_rows_keep_nothing_else_alive(levels):
    """Rows that are a part of a larger table, as ground truth lies behind proposals."""
    student, teacher, targets = rows(50)
    last = take(student[:levels], teacher[:levels], targets, slice(48, 50))
    generator = PrototypeGenerator(CLASSES)
    generator.add(*last)
    for row, channels in zip(generator._sample.parts[0], (CS, CT), strict=False):
        assert row.untyped_storage().nbytes() == 2 * levels * channels * 4
