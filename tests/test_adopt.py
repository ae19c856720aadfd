"""Prototypes for the next student of a teacher: whose a bank is, and how its rows are renewed."""

import copy

import pytest
import torch
from torch import nn

from global_kd import Distiller, GlobalKnowledgeLoss, PrototypeBank
from global_kd.detectors import fingerprint
from global_kd.functional import pool_boxes

from .detectors.detectors import detector, scenes
from .test_distiller import BOXES, IMAGES
from .test_distiller import Detector as HomeMade

NAMES = ("background", "ant", "bee", "cow")


def seeded(make, seed, *arguments):
    torch.manual_seed(seed)
    return make(*arguments)


def teacher():
    return seeded(detector, 7, "faster_rcnn", 12)


def distiller(student_seed=0, teacher=None, **options):
    """A Faster R-CNN student, its width another for every seed."""
    student = seeded(detector, student_seed, "faster_rcnn", 8 + student_seed)
    options = {"refresh_every": None, "min_side": 4, "num_prototypes": 3} | options
    teacher = seeded(detector, 7, "faster_rcnn", 12) if teacher is None else teacher
    scale = options.pop("teacher_scale", 1)
    loss = GlobalKnowledgeLoss(4, total_steps=9, **options)
    return Distiller(student, teacher, loss, teacher_scale=scale)


def loader(batches=3, ids=True):
    start, made = 0, []
    for seed in range(batches):
        images, targets = scenes(seed=seed)
        for t in targets:
            if ids:
                t["ids"] = torch.arange(start, start + len(t["boxes"]))
            start += len(t["boxes"])
        made.append((images, targets))
    return made


def first_bank(**options):
    kd = distiller(**options)
    kd.refresh(loader(), progress=False)
    kd.detach()
    return kd.loss.bank


def pooled(model, instance, level):
    """The definition: a network's mean feature of one box, found by its id, in eval mode."""
    model.eval()
    for images, targets in loader():
        transformed, truth = model.transform(images, targets)
        for i, t in enumerate(truth):
            for box in t["boxes"][t["ids"] == instance]:
                with torch.no_grad():
                    maps = list(model.backbone(transformed.tensors).values())
                return pool_boxes(maps[level], box[None], torch.tensor([i]), 4 * 2**level)[0]
    raise LookupError(instance)


class Counted:
    """A loader that counts the batches it gave out."""

    def __init__(self, batches):
        self.batches, self.given = batches, 0

    def __iter__(self):
        for batch in self.batches:
            self.given += 1
            yield batch


def test_the_next_student_takes_over_the_prototypes(tmp_path):
    """From one run's file: teacher rows as they were, the student's from its own network."""
    first_bank().save(tmp_path / "bank.pt")
    bank = PrototypeBank.load(tmp_path / "bank.pt")
    assert bank.teacher_fingerprint == fingerprint(teacher()) and bank.strides == (4, 8, 16)

    kd = distiller(student_seed=1)
    student, runs = kd._models[0].train(), []
    kd._models[1].register_forward_pre_hook(lambda *_: runs.append(1))
    kd._models[1].backbone.register_forward_pre_hook(lambda *_: runs.append(1))
    kd.adopt(bank, loader(), progress=False)
    assert not runs  # the teacher had nothing to do
    assert student.training  # its mode came back
    own = kd.loss.bank
    assert torch.equal(own.valid, bank.valid) and torch.equal(own.ids, bank.ids)
    assert torch.equal(own.teacher, bank.teacher)
    assert own.teacher_fingerprint == bank.teacher_fingerprint
    assert int(own.valid.sum()) > 10
    for level, label, slot in own.valid.nonzero().tolist():
        at = level, label, slot
        # To rounding: a box is pooled alone here, and with the others of its batch there.
        torch.testing.assert_close(own.student[at], pooled(student, own.ids[at], level))
        torch.testing.assert_close(own.teacher[at], pooled(teacher(), own.ids[at], level))


def test_adopting_is_what_refreshing_gives_for_the_same_instances():
    """With more slots than instances all of them are prototypes, whatever the pursuit picks."""
    bank = first_bank(num_prototypes=20)
    adopted, refreshed = (distiller(student_seed=1, num_prototypes=20) for _ in range(2))
    adopted.adopt(bank, loader(), progress=False)
    refreshed.refresh(loader(), progress=False)

    def by_instance(bank):
        return {
            (level, int(bank.ids[level, label, slot])): torch.cat(
                [bank.student[level, label, slot], bank.teacher[level, label, slot]]
            )
            for level, label, slot in bank.valid.nonzero().tolist()
        }

    mine, theirs = by_instance(adopted.loss.bank), by_instance(refreshed.loss.bank)
    common = mine.keys() & theirs.keys()
    assert len(common) > 10
    for key in common:
        torch.testing.assert_close(mine[key], theirs[key])


def test_reading_ends_with_the_last_instance():
    bank = first_bank()
    bank.valid &= bank.ids < 8  # the first two batches
    batches = Counted(loader())
    distiller(student_seed=1).adopt(bank, batches, progress=False)
    assert batches.given == 2


def test_lost_instances_are_counted_and_their_prototypes_dropped():
    bank, kd = first_bank(), distiller(student_seed=1)
    wanted, lost = int(bank.valid.sum()), int((bank.valid & (bank.ids >= 8)).sum())
    assert 0 < lost < wanted
    with pytest.warns(UserWarning, match=f"{lost} of {wanted} prototypes of the bank are dropped"):
        kd.adopt(bank, loader(batches=2), progress=False)
    assert torch.equal(kd.loss.bank.valid, bank.valid & (bank.ids < 8))


def refused(kd, bank, batches, message):
    kd.refresh(loader(batches=1), progress=False)
    before = copy.deepcopy(kd.loss.bank)
    with pytest.raises(ValueError, match=message):
        kd.adopt(bank, batches, progress=False)
    for mine, kept in zip(kd.loss.bank.buffers(), before.buffers(), strict=True):
        assert torch.equal(mine, kept)
    assert kd.loss.bank.origin() == before.origin()


def test_when_no_instance_is_found_the_loss_keeps_its_bank():
    bank = first_bank()
    bank.ids += 1000
    refused(distiller(1), bank, loader(), r"ids between 10\d\d and 10\d\d, .*but got none")
    refused(distiller(1), first_bank(), [], "but got none")


def test_targets_without_ids_are_refused():
    refused(distiller(1), first_bank(), loader(ids=False), "loader: expected targets with ids")


def without_an_id(bank):
    bank.ids[tuple(bank.valid.nonzero()[0])] = -1


STRANGERS = [
    (lambda b: setattr(b, "teacher_fingerprint", "cafe"), r"expected teacher '\w{16}', .* 'cafe'"),
    (lambda b: setattr(b, "teacher_fingerprint", None), "expected teacher .* but got None"),
    (lambda b: setattr(b, "strides", (8, 16, 32)), r"expected strides \[4\.0, 8\.0, 16\.0\].*32"),
    (lambda b: setattr(b, "strides", None), r"expected strides \[4\.0, .*but got None"),
    (lambda b: setattr(b, "class_names", NAMES[::-1]), "class_names: .*'background' for class 0"),
    (lambda b: b.valid.zero_(), "expected prototypes with the ids .* but got 0, 0 without"),
    (without_an_id, "expected prototypes with the ids .*, 1 without"),
]


@pytest.mark.parametrize(("change", "message"), STRANGERS)
def test_a_bank_that_means_something_else_here_is_refused(change, message):
    bank = first_bank(class_names=NAMES)
    change(bank)
    refused(distiller(1, class_names=NAMES), bank, loader(), f"bank: {message}")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4, 3, 8, 12), r"bank: expected strides \[4.*, but got \[4\.0, 8\.0\]"),
        ((3, 5, 3, 8, 12), "bank: expected classes 4, but got 5"),
        ((3, 4, 3, 8, 13), "bank: expected teacher channels 12, but got 13"),
    ],
)
def test_a_bank_of_other_shape_is_refused(shape, message):
    bank = PrototypeBank(
        *shape, strides=(4, 8, 16)[: shape[0]], teacher_fingerprint=fingerprint(teacher())
    )
    refused(distiller(1), bank, loader(), message)


def test_names_are_compared_where_both_know_them_and_taken_over():
    kd = distiller(student_seed=1)
    kd.adopt(first_bank(class_names=NAMES), loader(), progress=False)
    assert kd.loss.bank.class_names == NAMES
    kd = distiller(student_seed=1, class_names=NAMES)
    kd.adopt(first_bank(), loader(), progress=False)
    assert kd.loss.bank.class_names == NAMES


def test_what_is_no_bank_is_named():
    with pytest.raises(TypeError, match="bank: expected a PrototypeBank, but got OrderedDict"):
        distiller().adopt(first_bank().state_dict(), loader())


# --- whose prototypes ----------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.register_buffer("mean", torch.tensor([1.5, 2.0]))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("scratch", torch.rand(2), persistent=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([0.5, -1.0]).view(2, 1, 1, 1))
            self.conv.bias.zero_()


SMALL = "7cf5c74568aef4a4"


def test_the_fingerprint_is_the_same_everywhere():
    """A constant, so the same in every process, whatever happens to the memory of the tensors."""
    model = Small()
    assert fingerprint(model) == SMALL
    assert fingerprint(model.to(memory_format=torch.channels_last).requires_grad_(False)) == SMALL
    model.conv = torch.compile(model.conv, backend="eager")
    assert fingerprint(model) == SMALL


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m: m.conv.weight.data[1].add_(1e-6), id="a parameter"),
        pytest.param(lambda m: m.count.add_(1), id="a buffer"),
        pytest.param(lambda m: m.half(), id="a number type"),
        pytest.param(lambda m: setattr(m, "mean", m.mean[:, None]), id="a shape"),
        pytest.param(lambda m: m.register_buffer("more", torch.ones(0)), id="a name"),
    ],
)
def test_the_fingerprint_tells_detectors_apart(change):
    model = Small()
    change(model)
    assert fingerprint(model) != SMALL


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.cfloat]
)
def test_the_fingerprint_reads_every_number_type(dtype):
    def holding(value):
        model = nn.Module()
        model.register_buffer("x", torch.tensor(value, dtype=dtype))
        return fingerprint(model)

    assert holding(0) == holding(0) != holding(1)


def step(kd):
    images, targets = scenes()
    kd._models[0].train()(images, targets)
    return kd(images, targets)


def test_training_signs_the_bank_at_its_first_step():
    kd = distiller(refresh_every=1)
    assert kd.loss.bank.teacher_fingerprint is None  # a teacher may be loaded after the Distiller
    changed = teacher()
    nn.init.ones_(next(changed.parameters()))
    kd._models[1].load_state_dict(changed.state_dict())
    step(kd)
    assert kd.loss.bank.teacher_fingerprint == fingerprint(changed)
    step(kd)
    assert kd.loss.bank.valid.any()


def test_resuming_with_another_teacher_is_refused_until_its_prototypes_are_gone():
    kd = distiller(refresh_every=1)
    step(kd), step(kd)
    saved = kd.state_dict()
    resumed = distiller(refresh_every=1)
    resumed.load_state_dict(saved)
    step(resumed)  # the same teacher

    other = seeded(detector, 8, "faster_rcnn", 12)
    resumed = distiller(refresh_every=1, teacher=other)
    resumed.load_state_dict(copy.deepcopy(saved))
    with pytest.raises(ValueError, match=rf"teacher: expected that of .*{fingerprint(other)}.*cle"):
        step(resumed)
    resumed.loss.bank.clear()
    step(resumed)
    assert resumed.loss.bank.teacher_fingerprint == fingerprint(other)


def test_a_refresh_keeps_nothing_of_another_teacher():
    """Of the same teacher, classes that were not seen keep their prototypes; of another, not."""
    kd, other = (
        distiller(),
        distiller(teacher=seeded(detector, 8, "faster_rcnn", 12)),
    )
    kd.refresh(loader(), progress=False)
    saved = kd.loss.bank.state_dict()
    images, targets = loader(batches=1)[0]
    for t in targets:
        t["labels"].fill_(2)
    for each in (kd, other):
        each.loss.bank.load_state_dict(saved)
        each.refresh([(images, targets)], progress=False)
    assert (kd.loss.bank.counts()[0] > 0).tolist() == [False, True, True, True]
    assert (other.loss.bank.counts()[0] > 0).tolist() == [False, False, True, False]
    assert other.loss.bank.teacher_fingerprint == fingerprint(other._models[1])


def test_the_teachers_scale_and_the_module_read_are_part_of_whose_a_bank_is():
    plain = fingerprint(teacher())
    kd = distiller(teacher_scale=2)
    kd.refresh(loader(), progress=False)
    assert kd.loss.bank.teacher_fingerprint == f"{plain}, scale 2"
    refused(distiller(1), kd.loss.bank, loader(), f"expected teacher '{plain}', but got .*scale 2'")


def home_made(width, seed):
    student = seeded(HomeMade, seed, width)
    loss = GlobalKnowledgeLoss(2, total_steps=10, refresh_every=2, min_side=0, relation=5)
    return Distiller(student, seeded(HomeMade, 9, 9), loss, example_inputs=(IMAGES,))


def test_home_made_detectors_and_prototypes_from_the_stream():
    """Ids of instances pass through training steps, too; batch norm runs in eval mode."""
    targets = [
        {**t, "ids": torch.arange(len(t["boxes"])) + 10 * i} for i, t in enumerate(BOXES, start=1)
    ]
    kd = home_made(4, 0)
    for _ in range(3):
        kd._models[0](IMAGES)
        kd(IMAGES, targets)
    bank = kd.loss.bank
    assert set(bank.ids[bank.valid].tolist()) <= {10, 20, 21} and bank.valid.any()
    following = home_made(6, 1)
    running = following._models[0].body.norm.running_mean.clone()
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    batches = [(IMAGES, [nothing] * 2), (IMAGES, targets)]  # no boxes, no ids: a normal day
    following.adopt(bank, batches, progress=False)
    own = following.loss.bank
    assert own.teacher_fingerprint.endswith(", at body")
    assert torch.equal(own.valid, bank.valid) and own.student[own.valid].abs().sum() > 0
    assert torch.equal(following._models[0].body.norm.running_mean, running)
    following._models[0](IMAGES)
    assert following(IMAGES, targets)["kd_relation"] > 0  # from the first step on
