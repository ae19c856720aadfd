"""The examples that are read at one sitting: they run, and what they show is there."""

import json

import pytest

import own_detector


def test_own_detector():
    losses = own_detector.main(["--steps", "60"])
    assert losses["teacher"] < losses["student"] and len(losses) == 3
    assert losses["student + gk + pkd"] != losses["student"]


@pytest.mark.parametrize("arch", ["retinanet", "fcos"])
def test_torchvision_retinanet(tmp_path, arch, capsys):
    import torch

    import torchvision_retinanet as example

    output = tmp_path / "student.pt"
    options = ["--arch", arch, "--steps", "3", "--scenes", "48", "8"]
    scores = example.main([*options, "--cache", str(tmp_path), "--output", str(output)])
    assert list(scores) == ["teacher", "alone", "distilled"]
    bare = example.detector(arch, "small-student", 11)
    bare.load_state_dict(torch.load(output))
    assert "AP in percent" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("method", ["frs", "pkd"])
def test_unlabelled(tmp_path, method):
    import unlabelled

    output = tmp_path / "result.json"
    options = ["--quick", "--method", method, "--cache", str(tmp_path), "--output", str(output)]
    scores = unlabelled.main(options)
    assert scores["teacher"]["AP"] > 0.5
    written = json.loads(output.read_text())
    assert written["scores"] == scores and list(scores)[2:] == list(unlabelled.ARMS)
    assert written["options"]["labelled"] * 9 == written["options"]["unlabelled"]


def test_unlabelled_steps_train_the_student_without_a_label(tmp_path):
    import torch

    import unlabelled
    from global_kd import Distiller
    from global_kd.losses import PKD
    from workshop.detection_data import load_digits
    from workshop.detectors import SHIPPED_TEACHER, build_detector
    from workshop.digit_scenes import SceneSettings

    scenes = load_digits(tmp_path, SceneSettings(40, 4)).train

    class Unlabelled:
        def __len__(self):
            return len(scenes)

        def __getitem__(self, index):
            return scenes[index][0], {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}

    teacher = build_detector("small-teacher", 11, weights=str(SHIPPED_TEACHER))
    students = []
    for split in (scenes, Unlabelled()):
        torch.manual_seed(0)
        student = build_detector("small-student", 11)
        before = student.backbone.stem[0].weight.clone()
        kd = Distiller(student, teacher, PKD())
        unlabelled.go_on(student, "unlabelled", scenes, split, iterations=2, kd=kd)
        assert not torch.equal(before, student.backbone.stem[0].weight)
        students.append(student.state_dict())
    assert all(torch.equal(x, students[1][name]) for name, x in students[0].items())


def test_transformers_rtdetr(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    import transformers

    import transformers_rtdetr

    output = tmp_path / "output"
    terms, loss = transformers_rtdetr.main(["--steps", "2", "--output", str(output)])
    assert terms.keys() == {"kd_frs_features", "kd_frs_classes", "kd_pkd"} and loss > 0
    student = transformers.RTDetrForObjectDetection.from_pretrained(output)
    assert not any("kd" in name for name in student.state_dict())
