"""Data of one's own: what is read, which thresholds follow, and what is said about time."""

import json

import pytest
import torch

from workshop import forecast, sizes
from workshop.detection_data import DetectionData
from workshop.detectors import build_detector
from workshop.own_data import load_own
from workshop.training import Recipe
from workshop.voc_data import load_voc

from .test_torchvision_frcnn import run, weights
from .trees import write_coco, write_voc


def write_own_coco(root, ids=(0, 90210)):
    """`write_coco` with other category ids, and without what other tools leave out."""
    write_coco(root)
    for split in ("train2017", "val2017"):
        file = root / "annotations" / f"instances_{split}.json"
        content = json.loads(file.read_text())
        swap = dict(zip((2, 5), ids))
        for annotation in content["annotations"]:
            annotation["category_id"] = swap[annotation["category_id"]]
            if not annotation["iscrowd"]:
                del annotation["iscrowd"], annotation["area"]
        for entry in content["images"]:
            entry["file_name"] = f"C:/data/{entry['file_name']}"
        for category in content["categories"]:
            category["id"] = swap[category["id"]]
        file.write_text(json.dumps(content))
    return [
        [root / s, root / "annotations" / f"instances_{s}.json"] for s in ("train2017", "val2017")
    ]


def write_side_by_side(root):
    """The pictures and XML files of `write_voc` in one folder a split, with own class names."""
    base = write_voc(root / "tree") / "VOCdevkit" / "VOC2007"
    for split in ("train", "val"):
        (root / split).mkdir()
        for path in [*base.glob(f"*/{split}*.jpg"), *base.glob(f"*/{split}*.xml")]:
            content = path.read_bytes().replace(b"<name>cat", b"<name>bolt")
            (root / split / path.name).write_bytes(content)
    return [[root / "train"], [root / "val"]]


class TestReading:
    def test_coco_with_any_ids(self, tmp_path):
        data = load_own(*write_own_coco(tmp_path))
        assert data.class_names == ["background", "green", "red"]
        assert set(data.ground_truth.getCatIds()) == {1, 2}
        content = json.loads((tmp_path / "annotations" / "instances_train2017.json").read_text())
        wanted = {a["id"]: 1 + (a["category_id"] == 90210) for a in content["annotations"]}
        assert wanted == {n: a["category_id"] for n, a in data.train.truth.anns.items()}
        labels = torch.cat([data.train[n][1]["labels"] for n in range(len(data.train))])
        assert set(labels.tolist()) == {1, 2} and len(labels) == len(wanted) - 2

    def test_classes_of_the_validation_split_are_known_by_name(self, tmp_path):
        train, validation = write_own_coco(tmp_path / "a")
        _, other = write_own_coco(tmp_path / "b", ids=(90210, 0))
        one, two = load_own(train, validation), load_own(train, other)
        first, second = (
            {n: a["category_id"] for n, a in data.ground_truth.anns.items()} for data in (one, two)
        )
        assert first == second and set(first.values()) == {1, 2}

    def test_cocos_own_categories_keep_their_ids(self, tmp_path):
        splits = write_own_coco(tmp_path, ids=(18, 17))
        for _, file in splits:
            text = file.read_text().replace('"green"', '"dog"').replace('"red"', '"cat"')
            file.write_text(text)
        data = load_own(*splits)
        assert len(data.class_names) == 91
        assert data.class_names[17:19] == ["cat", "dog"]

    def test_voc_beside_the_pictures(self, tmp_path):
        data = load_own(*write_side_by_side(tmp_path))
        assert list(data.class_names) == ["background", "bolt", "dog"]
        assert sum(len(data.train[n][1]["boxes"]) for n in range(6)) == 4  # 2 are difficult

    def test_a_tree_like_vocs_with_other_classes(self, tmp_path):
        base = write_voc(tmp_path) / "VOCdevkit" / "VOC2007"
        for xml in base.glob("Annotations/*.xml"):
            xml.write_text(xml.read_text().replace("<name>cat", "<name>nut"))
        assert list(load_voc(base).class_names) == ["background", "dog", "nut"]

    def test_a_box_without_area_is_left_out(self, tmp_path):
        splits = write_side_by_side(tmp_path)
        xml = tmp_path / "train" / "train1.xml"
        flat = "<object><name>dog</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>5</xmax>"
        flat += "<ymax>9</ymax></bndbox></object></annotation>"
        before = len(load_own(*splits).train.items[1])
        xml.write_text(xml.read_text().replace("</annotation>", flat))
        assert len(load_own(*splits).train.items[1]) == before

    def test_what_is_wrong_is_named(self, tmp_path):
        splits = write_own_coco(tmp_path)
        (tmp_path / "val2017" / "001.jpg").unlink()
        with pytest.raises(SystemExit, match="^1 of 6 pictures are not in .*001.jpg"):
            load_own(*splits)
        sides = write_side_by_side(tmp_path / "voc")
        (tmp_path / "voc" / "val" / "val1.xml").write_text("<annotation>")
        with pytest.raises(SystemExit, match="val1.xml is not a VOC annotation"):
            load_own(*sides)
        (tmp_path / "voc" / "val" / "val1.jpg").unlink()
        with pytest.raises(SystemExit, match="There is no picture for .*val1.xml"):
            load_own(*sides)
        with pytest.raises(SystemExit, match="annotations of one kind"):
            load_own(splits[0], sides[1])


class TestThresholds:
    def test_follow_the_boxes(self):
        long = torch.linspace(12, 56, 441)
        both = torch.stack([long, 2 * long], dim=1)
        min_side, finest = sizes.thresholds(both, torch.ones(441, dtype=torch.int64), 4.0)
        assert min_side == round(12 + 4.4) and finest == round((12 + 26.4) * 2**0.5 / 2)

    def test_stay_within_the_papers(self):
        large, ones = torch.full((5, 2), 400.0), torch.ones(5, dtype=torch.int64)
        assert sizes.thresholds(large, ones, 4.0) == (30, 56)
        assert sizes.thresholds(large / 100, ones, 4.0) == (4, 16)
        assert sizes.thresholds(large[:0], ones[:0], 8.0) == (30, 112)

    def test_half_of_a_class_of_small_objects_can_become_prototypes(self):
        both = torch.cat([torch.full((99, 2), 28.0), torch.full((1, 2), 9.0)])
        labels = torch.ones(100, dtype=torch.int64)
        assert sizes.thresholds(both, labels, 4.0)[0] == 28
        labels[-1] = 2
        assert sizes.thresholds(both, labels, 4.0)[0] == 9

    def test_are_pixels_of_the_input(self, tmp_path):
        data = load_own(*write_own_coco(tmp_path))
        model = build_detector("small-student", 3, side=48)  # pictures are 96 x 64
        found, labels = sizes.boxes_at_input(data.train, model)
        given = torch.cat([data.train[n][1]["boxes"] for n in range(6)])
        torch.testing.assert_close(found, (given[:, 2:] - given[:, :2]) / 2)
        assert len(labels) == len(found) and sizes.finest_stride(model) == 4


def test_a_run_on_each_kind(tmp_path, capsys):
    for kind, splits in (
        ("coco", write_own_coco(tmp_path / "coco")),
        ("voc", write_side_by_side(tmp_path / "voc")),
    ):
        options = ["--train", *splits[0], "--validation", *splits[1], "--train-teacher"]
        options += "--teacher small-teacher --student small-student --side 96".split()
        options += "--teacher-iterations 2 --iterations 3 --batch-size 2 --no-baseline".split()
        options += ["--threads", 1, "--output", tmp_path / f"out_{kind}"]
        run([str(option) for option in options])
        assert "At the student's input boxes are" in capsys.readouterr().out
        predictor = weights(tmp_path / f"out_{kind}", "gk")[
            "roi_heads.box_predictor.cls_score.weight"
        ]
        assert len(predictor) == 3


class TestForecast:
    def test_long_trainings_are_announced_and_nothing_changes(self, tmp_path, capsys):
        data: DetectionData = load_own(*write_own_coco(tmp_path))
        model = build_detector("small-student", 3)
        before = {name: x.clone() for name, x in model.state_dict().items()}
        random = torch.get_rng_state()
        assert forecast.forecast("A student", model, data, Recipe(1, batch_size=2)) > 0
        assert capsys.readouterr().out == ""
        many = Recipe(10**7, batch_size=2)
        seconds = forecast.forecast("A student", model, data, many)
        told = capsys.readouterr().out
        assert f"about {seconds / 3600:.1f} hours here: 10000000 iterations of 2 pictures" in told
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
        assert torch.equal(random, torch.get_rng_state())

    def test_after_the_first_steps_the_rest_is_told(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr("workshop.training.LONG", 0.0)
        splits = write_own_coco(tmp_path)
        options = ["--train", *splits[0], "--validation", *splits[1], "--method", "none"]
        options += "--student small-student --iterations 12 --batch-size 2 --threads 1".split()
        run([str(o) for o in options], "--output", tmp_path / "output")
        assert "hours to go." in capsys.readouterr().out
