"""Real pictures: readers of three layouts, sizes, splits, wrong labels; on tiny folders."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.accuracy import pictures
from benchmarks.accuracy.declaration import CLASSES, Others, Pictures, Trial, declared
from benchmarks.accuracy.equal_tuning import METHODS
from benchmarks.accuracy.experiments import BEST as DIGITS
from benchmarks.accuracy.experiments import REDUCED
from benchmarks.accuracy.pictures import HELD_OUT, SOURCES, described, load, mislabelled
from benchmarks.accuracy.real import BEST, REAL, Real
from benchmarks.accuracy.store import RESULTS, Store
from benchmarks.accuracy.work import everything, in_order
from workshop.detection_data import first_batches, target_of
from workshop.digit_scenes import SceneSettings, make_scenes
from workshop.small_detectors import SIZES, small_faster_rcnn

TABLES = [table for tables in REAL.values() for table in tables]


def paint(path, number, size=(64, 48)):
    """A picture whose only bright rectangle is the box (8, 16, 24, 32); `number` is its grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size[1], size[0], 3), number, dtype=np.uint8)
    pixels[16:32, 8:24] = 255
    Image.fromarray(pixels).save(path.with_suffix(".png"))


def annotate(path, name):
    path.parent.mkdir(parents=True, exist_ok=True)
    box = "<xmin>9</xmin><ymin>17</ymin><xmax>24</xmax><ymax>32</ymax>"
    flat = "<xmin>5</xmin><ymin>9</ymin><xmax>5</xmax><ymax>9</ymax>"
    objects = "".join(
        f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>" for corners in (box, flat)
    )
    path.write_text(f"<annotation>{objects}</annotation>")


def write_bccd(root):
    base = root / "BCCD"
    (base / "ImageSets" / "Main").mkdir(parents=True)
    splits = {"train": range(9), "val": range(9, 11), "test": range(11, 12)}
    for split, numbers in splits.items():
        text = "".join(f"B{n}\n" for n in numbers)
        (base / "ImageSets" / "Main" / f"{split}.txt").write_text(text)
        for n in numbers:
            paint(base / "JPEGImages" / f"B{n}", n)
            annotate(base / "Annotations" / f"B{n}.xml", CLASSES["bccd"][1 + n % 3])


def write_cards(root):
    for split, numbers in (("train", range(9)), ("test", range(9, 12))):
        for n in numbers:
            paint(root / "images" / split / f"c{n:02d}", n)
            annotate(root / "images" / split / f"c{n:02d}.xml", CLASSES["cards"][1 + n % 6])


def write_deeppcb(root):
    base = root / "PCBData"
    for split, numbers in (("trainval", range(9)), ("test", range(9, 12))):
        lines = [f"g/{n}/{n}.png g/{n}_not/{n}.txt" for n in numbers]
        base.mkdir(parents=True, exist_ok=True)
        (base / f"{split}.txt").write_text("\n".join(lines) + "\n")
        for n in numbers:
            paint(base / "g" / str(n) / f"{n}_test", n)
            boxes = base / "g" / f"{n}_not" / f"{n}.txt"
            boxes.parent.mkdir(parents=True)
            boxes.write_text(f"8 16 24 32 {1 + n % 6}\n")


WRITE = {"bccd": write_bccd, "cards": write_cards, "deeppcb": write_deeppcb}


@pytest.mark.parametrize("source", WRITE)
def test_each_layout_gives_the_data_sets_own_splits(source, tmp_path):
    WRITE[source](tmp_path / "data")
    data, wrong = load(Pictures(source, side=32), tmp_path / "data", tmp_path)
    assert (len(data.train), len(data.validation)) == (9, 3) and not wrong.any()
    greys = [int(255 * split[i][0].min()) for split in (data.train, data.validation)
             for i in range(len(split))]  # fmt: skip
    assert greys == list(range(12))
    for i in range(9):
        image, target = data.train[i]
        assert image.shape == (3, 24, 32)  # half the size
        assert target["boxes"].tolist() == [[4, 8, 12, 16]]  # the one without area is left out
        assert image[:, 8:16, 4:12].min() == 1 and image[:, :8].max() < 0.1
        assert target["labels"].tolist() == [1 + i % (len(CLASSES[source]) - 1)]
    told = described(Pictures(source, side=32), data)
    assert told["repository"] == f"github.com/{SOURCES[source].repository}"
    assert told["commit"] == SOURCES[source].commit and len(told["digest"]) == 12


def test_pictures_are_decoded_once(tmp_path):
    write_cards(tmp_path / "data")
    first, _ = load(Pictures("cards", side=32), tmp_path / "data", tmp_path)
    again, _ = load(Pictures("cards", side=32), None, tmp_path)  # from the cache
    for i in range(9):
        assert torch.equal(first.train[i][0], again.train[i][0])
        assert torch.equal(first.train[i][1]["boxes"], again.train[i][1]["boxes"])


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"--data bccd needs --root.*Shenggan"):
        load(Pictures("bccd"), None, tmp_path)
    with pytest.raises(SystemExit, match="there is no folder"):
        load(Pictures("bccd"), tmp_path / "none", tmp_path)
    for source, what in (("bccd", "train.txt"), ("cards", "train"), ("deeppcb", "trainval.txt")):
        with pytest.raises(SystemExit, match=what):
            load(Pictures(source), tmp_path, tmp_path)
    write_deeppcb(tmp_path)
    (tmp_path / "PCBData" / "g" / "3" / "3_test.png").unlink()
    with pytest.raises(SystemExit, match="3_test.png is missing"):
        load(Pictures("deeppcb"), tmp_path, tmp_path)


def test_tuning_is_scored_on_pictures_held_out_of_training(tmp_path):
    """Every fourth training picture; validation pictures are in neither part."""
    write_bccd(tmp_path)
    data, _ = load(Pictures("bccd", side=32, held_out=True), tmp_path, tmp_path)
    greys = [
        [int(255 * s[i][0].min()) for i in range(len(s))] for s in (data.train, data.validation)
    ]
    assert greys[1] == [n for n in range(9) if n % HELD_OUT == HELD_OUT - 1]
    assert sorted(greys[0] + greys[1]) == list(range(9))


def test_tuning_and_reporting_are_kept_apart():
    base = Real("bccd").student()
    with pytest.raises(ValueError, match="held_out: expected True on the split 'tuning'"):
        dataclasses.replace(base, split="tuning")
    with pytest.raises(ValueError, match="held_out: expected False"):
        dataclasses.replace(base, data=Pictures("bccd", held_out=True))
    with pytest.raises(ValueError, match="teacher: expected one of the same pictures"):
        dataclasses.replace(
            Real("bccd").student(True), method=Others("pkd"), teacher=Real("bccd").teacher()
        )


def test_a_few_labels_are_wrong_and_the_same_ones_where_there_are_more():
    target = target_of([[0.0, 0.0, 1.0, 1.0]] * 20, [1, 2, 3, 3] * 5)
    given = pictures.PictureSet([torch.zeros(3, 2, 2)], first=torch.tensor([0, 20]), **target)
    few, many = (mislabelled(given, share, 4) for share in (0.2, 0.5))
    for (found, wrong), number in ((few, 4), (many, 10)):
        assert int(wrong.sum()) == number
        assert torch.equal(found.labels != given.labels, wrong)
        assert set(found.labels.tolist()) <= {1, 2, 3}
    assert (many[1] | ~few[1]).all()


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_arms_are_compared_with_what_differs_in_the_method_alone(table):
    arms = {arm.name: arm.trial for arm in table.arms}
    for arm in table.arms:
        for other in arm.against:
            one, two = vars(arm.trial), vars(arms[other])
            varied = {key for key in one if one[key] != two[key]}
            assert varied <= {"method", "teacher"} or "as long" in arm.name


def test_no_two_trainings_have_one_identity_and_nothing_is_trained_on_what_it_is_scored_on():
    known = {}
    for tables in REAL.values():
        for trial in everything(in_order(tables, 2)):
            assert known.setdefault(trial.identity, trial) == trial
            assert isinstance(trial.data, Pictures)
            if trial.teacher is not None:
                assert trial.teacher.data.held_out == trial.data.held_out
            if trial.split == "tuning":
                assert trial.data.held_out and trial.seed == 0


TUNED = [(source, REAL[source], f"{source}-q2-tuning", BEST[source]) for source in BEST]
TUNED += [("", REDUCED.tables(), f"{prefix}q6-tuning", DIGITS[prefix]) for prefix in DIGITS]


@pytest.mark.parametrize(("folder", "tables", "name", "best"), TUNED, ids=lambda x: str(x)[:16])
def test_the_best_shares_are_those_that_the_tuning_split_chose(folder, tables, name, best):
    store = Store(RESULTS / folder / "cpu", Path())
    table = next(t for t in tables if t.name == name)
    scores = {}
    for arm in table.arms:
        if arm.name != "none":
            method, share = arm.name.split(", ")
            result = store.result(arm.trial)
            scores.setdefault(method, {})[float(share)] = result["scores"]["AP"]
    assert best == {method: max(known, key=known.get) for method, known in scores.items()}


def test_a_declaration_of_pictures_and_methods_is_plain():
    how = Others("pkd", 0.3, robust=True, beside=Real("bccd").method())
    told = declared(Real("bccd").taught(Real("bccd").student(), how))
    assert told["data"] == {
        "source": "bccd", "side": 160, "share": 1.0, "wrong_labels": 0.0, "held_out": False
    }  # fmt: skip
    assert told["method"]["names"] == "pkd" and told["method"]["beside"]["min_side"] == 8.0
    assert Trial().class_names[1] == "0" and Real("cards").student().class_names[1] == "ace"


@pytest.fixture(scope="module")
def batches():
    scenes = make_scenes("train", SceneSettings(train=6, validation=1))
    return [*first_batches(scenes, 6, 3)]


@pytest.mark.parametrize("name", ["defaults", *METHODS, "pkd + global"])
def test_every_declared_method_pulls_with_its_share(name, batches):
    """The shares of its terms add up; what stands beside it keeps its weights."""
    torch.manual_seed(0)
    student, teacher = (small_faster_rcnn(SIZES[x], 11).train() for x in SIZES)
    how = Real("bccd").equal_tuning("q2").at_share(name.split()[0], 0.3)
    if "global" in name:
        how = dataclasses.replace(how, robust=True, beside=Real("bccd").method())
    kd = how.distiller(student, teacher, 11, 100, 0)
    torch.manual_seed(1)
    how.begin(kd, batches)
    torch.manual_seed(1)
    found = kd.calibrate(loader=batches, share={}, verbose=False).shares
    mine = [x.measured for term, x in found.items() if (name == "defaults") or "kd_pkd" in term
            or "global" not in name]  # fmt: skip
    assert mine and sum(mine) == pytest.approx(0.3, rel=0.02)
    if "global" in name:
        weights = kd.losses["global_knowledge"].weights
        assert weights == {"foreground": 2, "background": 1, "relation": 0, "logits": 5}
    losses = student(*batches[0]) | kd(*batches[0])
    total = sum(losses.values())
    total.backward()
    assert torch.isfinite(total)
