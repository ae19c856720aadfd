"""The paper's protocol, pass after pass: the frozen teacher looks at every image once."""

import warnings

import pytest
import torch
from torch import nn

from global_kd import Distiller, GlobalKnowledgeLoss, PrototypeGenerator, Targets
from global_kd.prototypes.teacher_rows import Sights, TeacherRows, sight_of

BATCHES, BOXES = 6, 5


def detector(width):
    return nn.Sequential(nn.Conv2d(3, width, 8, stride=8), nn.Conv2d(width, 5, 1))


def batch(number, ids=True, boxes=BOXES):
    g = torch.Generator().manual_seed(number)
    corner = 20 * torch.rand(boxes, 2, generator=g)
    target = {
        "boxes": torch.cat([corner, corner + 9 + 25 * torch.rand(boxes, 2, generator=g)], dim=1),
        "labels": torch.randint(0, 3, (boxes,), generator=g),
    }
    if ids:
        target["ids"] = torch.arange(boxes) + 100 * number
    return torch.rand(1, 3, 64, 64, generator=g), [target]


def distiller(**options):
    torch.manual_seed(0)
    student, teacher = detector(4), detector(8)
    loss = GlobalKnowledgeLoss(
        3,
        **(
            {"num_prototypes": 3, "min_side": 12, "max_instances": 6, "total_steps": 9000} | options
        ),
    )
    paths = {"student_path": "0", "teacher_path": "0", "example_inputs": (batch(0)[0],)}
    kd = Distiller(student, teacher, loss, **paths)
    looks = []
    teacher[0].register_forward_pre_hook(lambda *_: looks.append(1))
    return kd, student, teacher, looks


def move(student, seed=5):
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers(), strict=True))


@pytest.mark.parametrize("most", [4, 800], ids=["a sample that is full", "room for all"])
def test_the_next_passes_give_the_same_prototypes_without_the_teacher(most):
    loader = [batch(n) for n in range(BATCHES)] + [batch(9, boxes=0)]
    kd, student, _, looks = distiller(max_instances=most)
    kd.refresh(loader, progress=False)
    assert len(looks) == len(loader)
    for seed in (5, 6):  # the student moves on
        move(student, seed)
        before = len(looks)
        kd.refresh(loader, progress=False)
        assert len(looks) == before + 1  # the first batch, to compare
        fresh, other, _, _ = distiller(max_instances=most)
        other.load_state_dict(student.state_dict())
        fresh.refresh(loader, progress=False)
        assert same(kd.loss.bank, fresh.loss.bank)
    assert kd.loss.bank.valid.any()


def test_a_stream_between_two_passes_changes_nothing():
    loader = [batch(n) for n in range(BATCHES)]
    (kd, student, _, looks), (fresh, *_) = distiller(refresh_every=2), distiller()
    kd.refresh(loader, progress=False)
    for n in range(5):
        student(loader[n][0])
        kd(*loader[n])
    before = len(looks)
    kd.refresh(loader, progress=False)
    fresh.refresh(loader, progress=False)
    assert len(looks) == before + 1 and same(kd.loss.bank, fresh.loss.bank)


def test_a_loader_that_augments_is_noticed():
    loader = [batch(n) for n in range(BATCHES)]
    mirrored = [(images.flip(3), targets) for images, targets in loader]
    (kd, _, _, looks), (fresh, *_) = distiller(), distiller()
    kd.refresh(loader, progress=False)
    with pytest.warns(UserWarning, match="sees the first batch otherwise"):
        kd.refresh(mirrored, progress=False)
    assert len(looks) == 2 * BATCHES
    fresh.refresh(mirrored, progress=False)
    assert same(kd.loss.bank, fresh.loss.bank)


def test_another_teacher_looks_at_everything():
    loader = [batch(n) for n in range(BATCHES)]
    kd, _, teacher, looks = distiller()
    kd.refresh(loader, progress=False)
    move(teacher)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kd.refresh(loader, progress=False)
    assert len(looks) == 2 * BATCHES


def test_new_instances_are_looked_at_and_those_that_are_gone_are_gone():
    first, second = ([batch(n) for n in numbers] for numbers in (range(4), range(1, 6)))
    (kd, _, _, looks), (fresh, *_) = distiller(max_instances=800), distiller(max_instances=800)
    kd.refresh(first, progress=False)
    kd.refresh(second, progress=False)
    assert len(looks) == 4 + 1 + 2  # the batch to compare, and two new ones
    fresh.refresh(second, progress=False)
    assert same(kd.loss.bank, fresh.loss.bank)


@pytest.mark.parametrize("numbers", [[0, 1, 2], [5, 3, 1], [2]], ids=str)
def test_of_fewer_images_the_sample_is_theirs(numbers):
    """Instances that the fuller sample had no room for take the places of those that are gone."""
    loader = [batch(n) for n in range(BATCHES)]
    some = [loader[n] for n in numbers]
    (kd, _, _, looks), (fresh, *_) = distiller(), distiller()
    kd.refresh(loader, progress=False)
    before = len(looks)
    if len(numbers) > 1:  # the first batch is always looked at
        with pytest.warns(UserWarning, match="lacks instances of the last pass.*once more"):
            kd.refresh(some, progress=False)
        assert len(looks) == before + 1 + len(some)
    else:
        kd.refresh(some, progress=False)
    fresh.refresh(some, progress=False)
    assert same(kd.loss.bank, fresh.loss.bank)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kd.refresh(some, progress=False)  # the rows of this pass are used again
    assert same(kd.loss.bank, fresh.loss.bank)


def test_an_iterator_of_fewer_images_is_told():
    loader = [batch(n) for n in range(BATCHES)]
    kd, *_ = distiller()
    kd.refresh(loader, progress=False)
    with pytest.warns(UserWarning, match="an iterator cannot be read once more"):
        kd.refresh(iter(loader[:3]), progress=False)


@pytest.mark.parametrize(
    ("ids", "count"),
    [
        (lambda n: torch.full((BOXES,), n), BATCHES),  # of images
        (lambda n: torch.arange(BOXES), BOXES),  # counted anew in each image
        (lambda n: torch.arange(BOXES) + 100 * n, 0),
    ],
    ids=["an image's", "within an image", "a box's"],
)
def test_ids_that_several_boxes_have_are_told(ids, count):
    loader = []
    for n in range(BATCHES):
        images, (target,) = batch(n)
        loader.append((images, [{**target, "ids": ids(n)}]))
    kd, *_ = distiller()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        kd.refresh(loader + loader[:2], progress=False)  # twice the same is the same box
    expected = [f"refresh: {count} ids stand for several boxes each"] if count else []
    assert [str(x.message).split(",")[0] for x in told] == expected


def of_images(images, boxes, **ids):
    """One batch of several images; of each the first so many boxes."""
    parts = [batch(n, ids=False, boxes=count) for n, count in zip(images, boxes)]
    targets = [target for _, (target,) in parts]
    for target, x in zip(targets, ids.get("ids", ())):
        target["ids"] = torch.tensor(x)
    return torch.cat([x for x, _ in parts]), targets


SHARED = {
    "numbers within an image": [[0, 1, 2], [0, 1]],
    "numbers of the images": [[7, 7, 7], [8, 8]],
}
OWN = {
    "annotations": (1, 2, [[0, 1, 2], [3, 4]]),
    "one image twice": (1, 1, [[0, 1, 2], [0, 1]]),
    "none": (1, 2, []),
}


@pytest.mark.parametrize("ids", SHARED.values(), ids=SHARED)
def test_ids_that_several_boxes_have_are_told_at_the_first_step(ids):
    kd, student, _, _ = distiller(refresh_every=9)
    images, targets = of_images((1, 2), (3, 2), ids=ids)
    student(images)
    with pytest.warns(UserWarning, match="one instance .* such as [07]: .* annotation ids"):
        kd(images, targets)
    student(images)
    with warnings.catch_warnings():  # once
        warnings.filterwarnings("error", "targets: expected ids")
        kd(images, targets)


@pytest.mark.parametrize("case", OWN.values(), ids=OWN)
def test_nothing_is_told_of_ids_that_stand_for_one_instance(case):
    kd, student, _, _ = distiller(refresh_every=9)
    images, targets = of_images(case[:2], (3, 2), ids=case[2])
    if case[0] == case[1]:
        targets[1] = {name: x[:2] for name, x in targets[0].items()}
    student(images)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "targets: expected ids")
        kd(images, targets)


def test_without_ids_the_teacher_always_looks():
    loader = [batch(n, ids=False) for n in range(BATCHES)]
    kd, _, _, looks = distiller()
    for passes in (1, 2):
        kd.refresh(loader, progress=False)
        assert len(looks) == passes * BATCHES


@pytest.mark.parametrize("mirrored", range(BATCHES))
def test_an_image_that_looks_otherwise_is_noticed_wherever_it_comes(mirrored):
    """The teacher looks at it; the rows of all others are still used."""
    loader = [batch(n) for n in range(BATCHES)]
    images, (target,) = loader[mirrored]
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = 64 - boxes[:, [2, 0]]
    second = [*loader]
    second[mirrored] = images.flip(3), [{**target, "boxes": boxes}]
    (kd, _, _, looks), (fresh, *_) = (distiller(max_instances=800) for _ in range(2))
    kd.refresh(loader, progress=False)
    with pytest.warns(UserWarning, match="otherwise than in the last pass") as told:
        kd.refresh(second, progress=False)
    assert len(told) == 1 and (mirrored == 0 or f"batch {mirrored} " in str(told[0].message))
    assert len(looks) == BATCHES + 2  # the compared one, and that one
    fresh.refresh(second, progress=False)
    assert same(kd.loss.bank, fresh.loss.bank)


@pytest.mark.parametrize("change", ["darker", "other channels", "mirrored inside"])
def test_other_colours_in_the_same_boxes_are_noticed(change):
    """The boxes tell nothing of it; what the student's network is given does."""
    loader = [batch(n) for n in range(BATCHES)]
    images, targets = loader[3]
    if change == "darker":
        images = images * 0.9
    elif change == "other channels":
        images = images.flip(1)
    else:  # one box, whose halves change places
        x1, y1, x2, y2 = targets[0]["boxes"][0].round().int().tolist()
        images = images.clone()
        images[..., y1:y2, x1:x2] = images[..., y1:y2, x1:x2].flip(3)
    second = [*loader]
    second[3] = images, targets
    (kd, _, _, looks), (fresh, *_) = (distiller(max_instances=800) for _ in range(2))
    kd.refresh(loader, progress=False)
    with pytest.warns(UserWarning, match="batch 3 otherwise than in the last pass"):
        kd.refresh(second, progress=False)
    assert len(looks) == BATCHES + 2
    fresh.refresh(second, progress=False)
    assert same(kd.loss.bank, fresh.loss.bank)


def test_random_flips_never_go_unnoticed():
    g = torch.Generator().manual_seed(0)

    def flipped():
        for n in range(BATCHES):
            images, (target,) = batch(n)
            boxes = target["boxes"].clone()
            if torch.rand((), generator=g) < 0.2:
                boxes[:, [0, 2]] = 64 - boxes[:, [2, 0]]
                images = images.flip(3)
            yield images, [{**target, "boxes": boxes}]

    kd, *_ = distiller()
    kd.refresh([batch(n) for n in range(BATCHES)], progress=False)
    for _ in range(8):
        second = list(flipped())
        fresh, *_ = distiller()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kd.refresh(second, progress=False)
            fresh.refresh(second, progress=False)
        assert same(kd.loss.bank, fresh.loss.bank)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: 0.9 * x,
        lambda x: x.flip(1),
        lambda x: x.flip(3),
        lambda x: x.roll(1, dims=2),
        lambda x: x + 0.05 * torch.rand(x.shape, generator=torch.Generator().manual_seed(1)),
    ],
    ids=["darker", "other colours", "mirrored in a box in the middle", "moved", "noise"],
)
def test_a_sight_tells_other_pixels_in_the_same_box(change):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([[12.0, 8.0, 52.0, 48.0], [20.0, 20.0, 44.0, 44.0]])
    targets = Targets(box, torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([5, 3]))
    generator = PrototypeGenerator(2, min_side=0)
    sights = Sights()
    sights.add(targets.ids, sight_of(targets, images))
    rows = torch.rand(1, 2, 4)
    generator.add(rows, rows, targets)
    kept = TeacherRows(generator, "cafe", sights)
    padded = torch.nn.functional.pad(images, (0, 32, 0, 32))  # as beside a larger image
    for same_images in (images, padded, images.double()):
        found, otherwise = kept.of(targets, sight_of(targets, same_images), generator)
        assert not otherwise and torch.equal(found, rows)
    found, otherwise = kept.of(targets, sight_of(targets, change(images)), generator)
    assert otherwise and found is None


def test_of_an_instance_that_comes_twice_the_later_sight_counts():
    sights = Sights()
    for value in (1.0, 2.0):
        sights.add(torch.tensor([4, 9]), torch.tensor([[value], [7.0]]))
    assert sights.of(torch.tensor([9, 4, 5])).tolist()[:2] == [[7.0], [2.0]]
    assert sights.of(torch.tensor([5])).isnan().all()
