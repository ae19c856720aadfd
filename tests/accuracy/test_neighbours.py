"""How often what is nearest has the right class: by hand, and from a detector to the page."""

import json

import pytest
import torch

from benchmarks.accuracy import report
from benchmarks.accuracy.declaration import Arm, Table
from benchmarks.accuracy.neighbours import agreement, gather, looks_of, measure, prototypes, right
from benchmarks.accuracy.real import Real
from benchmarks.accuracy.store import Store
from benchmarks.accuracy.wrong_labels import areas
from workshop.detection_data import DIGIT_AREAS, DetectionData
from workshop.digit_scenes import CLASS_NAMES, SceneSettings, make_scenes
from workshop.small_detectors import SIZES, small_faster_rcnn


def test_shares_over_instances_and_over_classes():
    """Three of four of class 1 and none of the one of class 2."""
    found, labels = torch.tensor([1, 1, 1, 2, 1]), torch.tensor([1, 1, 1, 1, 2])
    assert right(found, labels) == {"all": 0.6, "classes": 0.375}


def clusters(number, seed):
    """Rows around three orthogonal directions, and which."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(3 * number) % 3 + 1
    rows = torch.eye(5)[labels] + 0.05 * torch.randn(3 * number, 5, generator=g)
    return rows * (1 + torch.rand(3 * number, 1, generator=g)), labels


def test_a_space_that_knows_classes_and_one_that_does_not():
    train, labels = clusters(20, 0)
    rows, truth = clusters(20, 1)
    told = agreement(train, labels, rows, truth)
    assert set(told) == {"instance", "prototype", "prototype, centred", "projection"}
    assert all(x == {"all": 1.0, "classes": 1.0} for x in told.values())
    noise = [torch.randn(300, 5, generator=torch.Generator().manual_seed(n)) for n in (2, 3)]
    which = torch.arange(300) % 3
    for x in agreement(noise[0], which, noise[1], which).values():
        assert x["all"] == pytest.approx(1 / 3, abs=0.1)


def test_an_instance_is_not_its_own_neighbour():
    rows = torch.eye(4)[[0, 0, 1, 1]]
    told = agreement(rows, torch.tensor([1, 2, 1, 2]), rows, torch.tensor([1, 2, 1, 2]))
    assert told["instance"]["all"] == 0.0


def test_prototypes_are_of_their_class():
    train, labels = clusters(30, 0)
    rows, classes = prototypes(train, labels)
    assert classes.bincount().tolist() == [0, 10, 10, 10]
    for row, label in zip(rows, classes, strict=True):
        assert labels[(train == row).all(dim=1)].tolist() == [int(label)]


@pytest.fixture(scope="module")
def scenes():
    few = SceneSettings(train=10, validation=8)
    train, validation = (make_scenes(split, few) for split in ("train", "validation"))
    return DetectionData("digits", train, validation, None, CLASS_NAMES, DIGIT_AREAS, flip=False)


def test_spaces_of_a_detector(scenes):
    torch.manual_seed(0)
    model = small_faster_rcnn(SIZES["small-student"], len(CLASS_NAMES)).eval()
    look = looks_of(model, (4.0, 8.0, 16.0))
    rows, labels = gather(look, scenes.validation, "looks")
    assert list(rows) == ["stride 4", "stride 8", "stride 16", "RoI embedding"]
    assert all(x.shape == (len(labels), 64) for x in rows.values())
    assert torch.equal(labels, scenes.validation.labels)  # none is that small
    told = measure(look, scenes)
    assert told["instances"] == len(labels) and set(told["spaces"]) == set(rows)


def test_the_page_shows_them(tmp_path, monkeypatch):
    share = {"all": 0.9, "classes": 0.5}
    kinds = dict.fromkeys(("instance", "prototype", "prototype, centred", "projection"), share)
    one = {"instances": 7, "most frequent": 0.85, "classes": 3, "spaces": {"stride 4": kinds}}
    one["wrong labels"] = {"share": 0.3, "instances": 7, "areas": {"teacher class": 0.987}}
    file = tmp_path / "neighbours.json"
    file.write_text(json.dumps({"bccd, its teacher": one}))
    text = "\n".join(report.nearest(file))
    assert "| bccd, its teacher | stride 4 | 7 | 85 % | 33 % | 50 (90) |" in text
    assert "| teacher: −log p(label) at the box | 0.99 |" in text
    assert "No numbers yet." in "\n".join(report.nearest(tmp_path / "none.json"))
    monkeypatch.setattr(report, "NEIGHBOURS", file)
    page, begin = tmp_path / "page.md", report.BEGIN.replace("results:", "results {}:")
    parts = (begin.format("bccd"), "old", begin.format("cards"), "old", begin.format("neighbours"))
    page.write_text(f"{parts[0]}\nold\n{report.END}\n{parts[2]}\nkept\n{report.END}\nbetween\n"
                    f"{parts[4]}\nold\n{report.END}\nafter\n")  # fmt: skip
    store = Store(tmp_path / "results", tmp_path)
    assert report.main({"cpu": (store, 1)}, Real("bccd").tables(), page) == 0
    text = page.read_text()
    assert "old" not in text and text.count(report.END) == 3
    assert f"{parts[0]}\n\nNo runs yet.\n\n{report.END}" in text and "kept" in text
    assert "between" in text and text.endswith("after\n") and "85 %" in text


def test_the_student_comes_first(tmp_path):
    with pytest.raises(SystemExit, match="Train the student first"):
        areas("bccd", Store(tmp_path, tmp_path))


def test_curves_with_fewer_points_are_drawn_at_those_that_all_have():
    assert report._thinned([25, 50, 75, 100], 2) == [50, 100]
    assert report._thinned([25, 50, 75, 100], 4) == [25, 50, 75, 100]
    assert report._thinned([30, 60, 90], 1) == [90]


def test_a_table_that_says_nothing_new_is_left_out(tmp_path):
    """Arms of the tables before it are no news; with one of its own it is printed whole."""
    real = Real("bccd")
    none, defaults = (
        Arm("none", real.student(), ()),
        Arm("defaults", real.taught(real.student(), real.method())),
    )
    store = Store(tmp_path, tmp_path)
    first, second = Table("a", "A", 1, (none,)), Table("b", "B", 1, (none, defaults))
    (store.results / f"{none.trial.at(0).identity}.json").write_text("{}")
    shown = [report.has_own(first, [], store, 1), report.has_own(second, [first], store, 1)]
    assert shown == [True, False] and report.has_own(first, [second], store, 1)
    (store.results / f"{defaults.trial.at(0).identity}.json").write_text("{}")
    assert report.has_own(second, [first], store, 1)


def test_two_points_make_no_curve(tmp_path):
    trial = Real("bccd").student()
    arms = (Arm("none", trial, ()), Arm("defaults", trial, ("none",)))
    points = [{"iteration": 100 * n, "AP": 0.1 * n} for n in (1, 2, 3)]
    for count, drawn in ((2, False), (3, True)):
        found = {arm.name: {0: {"curve": points[:count]}} for arm in arms}
        file = tmp_path / f"{count}.png"
        assert report.draw_curves(Table("t", "A table", 1, arms), found, file) is drawn
        assert file.exists() is drawn


def test_more_curves_than_can_be_told_apart_are_not_drawn(tmp_path):
    points = [{"iteration": 100 * n, "AP": 0.1 * n} for n in (1, 2, 3)]
    for count, drawn in ((20, True), (21, False)):
        arms = tuple(Arm(f"{n}", Real("bccd").student(), ()) for n in range(count))
        found = {arm.name: {0: {"curve": points}} for arm in arms}
        table = Table("t", "A table", 1, arms)
        assert report.draw_curves(table, found, tmp_path / f"{count}.png") is drawn
