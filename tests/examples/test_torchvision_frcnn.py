import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchvision_frcnn
from workshop import detectors, job
from workshop.digit_scenes import SceneSettings
from workshop.options import knowledge, parse
from workshop.small_detectors import SIZES, small_faster_rcnn
from workshop.training import Trainer

from .conftest import EXAMPLES
from .trees import write_coco, write_voc

TEACHER = str(EXAMPLES / "workshop" / "teacher_digits.pt")
METRICS = {"AP", "AP50", "AP75", "APs", "APm", "APl"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(job, "draw", lambda *arguments: None)


@pytest.fixture
def tiny(cache, tmp_path, no_pictures):
    """Options of a run that takes seconds and draws nothing, and its output folder."""
    options = f"--scenes 40 16 --iterations 7 --batch-size 8 --refresh-every 3 --cache {cache}"
    options += " --processes 1"
    output = tmp_path / "output"
    return [*options.split(), "--teacher-weights", TEACHER, "--output", str(output)], output


def run(options, *more):
    torchvision_frcnn.main([*options, *map(str, more)])


def weights(folder, arm):
    return torch.load(folder / f"student_{arm}.pt", weights_only=True)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def without_seconds(metrics):
    rows = {name: {**row, "seconds": 0} for name, row in metrics["models"].items()}
    return {**metrics, "models": rows, "overhead": 0}


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory):
    """The output folder of a whole run."""
    output = tmp_path_factory.mktemp("whole")
    options = f"--scenes 40 16 --iterations 12 --batch-size 8 --refresh-every 3 --cache {cache}"
    options += " --processes 1"
    events = output / "events"
    run(options.split(), "--teacher-weights", TEACHER, "--output", output, "--log-dir", events)
    return output


class TestWholeRun:
    def test_metrics(self, finished):
        metrics = json.loads((finished / "metrics.json").read_text())
        assert list(metrics["models"]) == ["teacher", "student", "student + gk"]
        for row in metrics["models"].values():
            assert row.keys() >= METRICS and all(0 <= row[name] <= 1 for name in METRICS)
        teacher, plain, distilled = metrics["models"].values()
        assert teacher["AP"] > 0.3 and teacher["seconds"] is None
        assert teacher["parameters"] > 3 * plain["parameters"] == 3 * distilled["parameters"]
        assert plain["seconds"] > 0 and metrics["overhead"] is not None
        assert [point["iteration"] for point in plain["curve"]] == [2, 4, 6, 8, 10, 12]
        assert metrics["options"]["seed"] == 0 and metrics["environment"]["torch"]

    @pytest.mark.parametrize("arm", ["none", "gk"])
    def test_the_weights_load_into_the_bare_torchvision_model(self, finished, arm):
        model = small_faster_rcnn(SIZES["small-student"], num_classes=11)
        model.load_state_dict(weights(finished, arm))  # strict
        found = model.eval()([torch.rand(3, 96, 96)])
        assert found[0]["boxes"].shape[1] == 4

    def test_the_two_students_differ(self, finished):
        assert not equal(weights(finished, "none"), weights(finished, "gk"))

    @pytest.mark.parametrize("name", ["curves", "predictions", "prototypes"])
    def test_pictures(self, finished, name):
        from PIL import Image

        picture = Image.open(finished / f"{name}.png").convert("RGB")
        assert min(picture.size) > 300
        assert all(low < 50 and high > 200 for low, high in picture.getextrema())

    def test_tensorboard(self, finished):
        assert len(list((finished / "events").glob("*/events.out.tfevents.*"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["none", "gk"])
def test_an_interrupted_run_ends_with_the_same_numbers(tiny, tmp_path, monkeypatch, arm):
    # Ctrl-C after 4 of 7 iterations of one arm: not at the end of an epoch (5), and between two
    # refreshes of the prototypes (3), so that collected rows have to survive.
    options, output = tiny
    run(options)
    broken = tmp_path / "broken"
    update, arms_begun = Trainer.update, []

    def update_and_press_ctrl_c(self, losses):
        losses = update(self, losses)
        if self.run.iteration == 1:
            arms_begun.append(self)
        if len(arms_begun) == ("none", "gk").index(arm) + 1 and self.run.iteration == 4:
            signal.raise_signal(signal.SIGINT)
        return losses

    options[options.index(str(output))] = str(broken)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", update_and_press_ctrl_c)
        with pytest.raises(SystemExit) as stopped:
            run(options)
    assert stopped.value.code == 130
    assert not (broken / f"student_{arm}.pt").exists()
    torch.rand(5)  # whatever happens to the random state in between
    run(options, "--resume")
    for name in ("none", "gk"):
        assert equal(weights(broken, name), weights(output, name))
    first, second = (json.loads((o / "metrics.json").read_text()) for o in (output, broken))
    assert without_seconds(first) == without_seconds(second)


def test_all_weights_zero_is_no_distillation(tiny):
    options, output = tiny
    run(options, *"--foreground 0 --background 0 --relation 0 --logits 0".split())
    assert equal(weights(output, "none"), weights(output, "gk"))


@pytest.mark.parametrize(
    ("method", "terms"),
    [
        ("frs", {"kd_frs_features"}),
        ("GK+PKD", {"kd_foreground", "kd_logits", "kd_pkd"}),
        ("fgd+mgd", {"kd_fgd_foreground", "kd_fgd_relation", "kd_mgd"}),
    ],
)
def test_other_methods(tiny, method, terms, capsys):
    options, output = tiny
    run(options, "--method", method, "--no-baseline", "--share", 0.2)
    assert "weight after" in capsys.readouterr().out
    state = torch.load(output / "state" / f"{method.lower()}.pt", weights_only=True)
    assert state["run"]["losses"][-1].keys() > terms
    metrics = json.loads((output / "metrics.json").read_text())
    assert list(metrics["models"]) == ["teacher", f"student + {method.lower()}"]
    assert (output / f"student_{method.lower()}.pt").is_file()


def test_a_short_training_renews_its_prototypes_all_the_same():
    for words, iterations, wanted in (("", 800, 100), ("", 10, 2), ("--refresh-every 50", 10, 50)):
        args = parse(words.split())
        assert knowledge(args, iterations).refresh_every == wanted


@pytest.mark.parametrize(
    ("words", "share"),
    [
        ("", None),  # digit scenes, for which the weights were chosen
        ("--share 0.2", 0.2),
        ("--data voc --root .", 1.0),
        ("--train a --validation b", 1.0),
        ("--train a --validation b --share 0", None),
        ("--train a --validation b --share 0.3", 0.3),
        ("--train a --validation b --logits 2", None),
        ("--train a --validation b --method gk+pkd", None),
    ],
)
def test_on_other_data_weights_are_set_by_their_share(words, share):
    assert parse(words.split()).share == share


def test_every_method_of_the_docs_has_a_name():
    from workshop.methods import known_methods

    page = (EXAMPLES.parent / "docs" / "methods.md").read_text()
    written = {
        line[3:] for line in page.splitlines() if line.startswith("## ") and " " not in line[3:]
    }
    assert {loss.__name__ for loss in known_methods().values()} == written
    assert all(
        n.replace("_", "") in ("gk", loss.__name__.lower()) for n, loss in known_methods().items()
    )


def test_a_resumed_run_keeps_the_weights_of_its_share(tiny, monkeypatch, capsys):
    options, output = tiny
    options += ["--method", "pkd", "--no-baseline", "--share", "0.2"]
    run(options)
    weights_of = weights(output, "pkd")
    first = output / "state" / "pkd.pt"
    before = torch.load(first, weights_only=True)["kd"]
    capsys.readouterr()
    run(options, "--resume")
    assert "weight after" not in capsys.readouterr().out
    after = torch.load(first, weights_only=True)["kd"]
    extra = "losses.pkd._extra_state"
    assert torch.equal(before[extra], after[extra]) and before[extra][1] not in (-1, 6)
    assert equal(weights_of, weights(output, "pkd"))


@pytest.mark.slow
def test_two_processes_do_not_change_the_numbers(tiny, tmp_path):
    options, output = tiny
    run(options)
    options[options.index(str(output))] = str(tmp_path / "two")
    run(options, "--processes", 2)
    for arm in ("none", "gk"):
        assert equal(weights(output, arm), weights(tmp_path / "two", arm))


@pytest.mark.slow
def test_workers_do_not_change_the_numbers(tiny, tmp_path):
    options, output = tiny
    run(options, "--method", "none")
    options[options.index(str(output))] = str(tmp_path / "workers")
    run(options, "--method", "none", "--workers", 2)
    assert equal(weights(output, "none"), weights(tmp_path / "workers", "none"))
    assert not (output / "student_gk.pt").exists()


@pytest.mark.slow
def test_warm_start_without_baseline_under_amp(tiny):
    options, output = tiny
    run(options, "--warm-start", "--no-baseline", "--amp", "--prototype-images", 16)
    assert (output / "state" / "start.pt").is_file() and (output / "student_gk.pt").is_file()
    assert not (output / "student_none.pt").exists()


class TestTeacher:
    def test_the_shipped_one_is_small_and_made_by_this_code(self):
        stored = torch.load(TEACHER, weights_only=True)
        assert Path(TEACHER).stat().st_size <= 3e6
        assert stored["command"] == detectors.TEACHER_COMMAND and stored["scores"]["AP"] > 0.45
        recipe = detectors.Recipe(detectors.TEACHER_ITERATIONS)
        expected = detectors.teacher_fingerprint(SceneSettings(), recipe)
        assert stored["fingerprint"] == expected, (
            "scenes or small detectors changed: run " + detectors.TEACHER_COMMAND + " and copy "
            "teacher.pt from its output to examples/workshop/teacher_digits.pt"
        )

    @pytest.mark.slow
    def test_it_is_trained_once_and_then_kept(self, tmp_path, capsys, no_pictures):
        options = f"--scenes 40 16 --iterations 1 --teacher-iterations 2 --cache {tmp_path}".split()
        options += ["--no-baseline", "--output", str(tmp_path / "output")]

        def seconds():
            metrics = json.loads((tmp_path / "output" / "metrics.json").read_text())
            return metrics["models"]["teacher"]["seconds"]

        run(options)
        assert "teacher_digits.pt was made" in capsys.readouterr().out  # the shipped one
        assert seconds() is not None
        run(options)
        assert seconds() is None
        kept = tmp_path / "teacher_digits.pt"
        kept.write_bytes(b"not a file of tensors")
        run(options)
        assert seconds() is not None


@pytest.mark.parametrize("data", ["coco", "voc"])
def test_other_data(tmp_path, data):
    root = {"coco": write_coco, "voc": write_voc}[data](tmp_path / data)
    options = f"--data {data} --root {root} --iterations 2 --batch-size 2 --lr 1e-3 --train-teacher"
    names = "--teacher small-teacher --student small-student --teacher-iterations 2 --processes 1"
    output = tmp_path / "output"
    run(options.split(), *names.split(), "--output", output)
    metrics = json.loads((output / "metrics.json").read_text())
    assert len(metrics["models"]) == 3 and metrics["areas"]["small"] == [0, 32**2]
    classes = {"coco": 6, "voc": 21}[data]
    predictor = weights(output, "gk")["roi_heads.box_predictor.cls_score.weight"]
    assert len(predictor) == classes


def test_what_the_trees_are_read_as(tmp_path):
    from workshop.detection_data import box_id, epoch_batches, find_box, load_coco
    from workshop.voc_data import load_voc

    coco = load_coco(write_coco(tmp_path / "coco"))
    assert coco.class_names == ["background", "-", "green", "-", "-", "red"]
    counts = [len(coco.train[i][1]["boxes"]) for i in range(6)]
    assert counts == [0, 1, 2, 0, 1, 2]  # neither the crowd nor the box without area
    assert set(coco.ground_truth.imgs) == {3, 13, 23, 33, 43, 53}
    voc = load_voc(write_voc(tmp_path / "voc"))
    assert sum(len(voc.train[i][1]["boxes"]) for i in range(6)) == 4  # 2 of 6 are difficult
    assert sum(a["iscrowd"] for a in voc.ground_truth.anns.values()) == 2
    image, target = voc.train[1]
    x1, y1, x2, y2 = target["boxes"][0].int().tolist()
    assert image[:, y1:y2, x1:x2].amax(dim=0).min() > 0.6  # bright, up to JPEG
    assert find_box(box_id(41, 7)) == (41, 7)
    # Mirrored boxes still surround the rectangles.
    for images, targets in epoch_batches(voc.train, 1, seed=3, flip=True):
        for x1, y1, x2, y2 in targets[0]["boxes"].int().tolist():
            assert x1 < x2 and images[0][:, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].amax(0).min() > 0.6


@pytest.mark.slow
def test_torchvision_models_by_name(tmp_path):
    root = write_coco(tmp_path / "coco", images=3)
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    torch.save(detectors.build_detector(name, 6).state_dict(), tmp_path / "teacher.pt")
    options = f"--data coco --root {root} --iterations 1 --batch-size 1 --teacher {name}".split()
    options += f"--student {name} --no-baseline --threads 1 --output {tmp_path / 'output'}".split()
    run(options, "--teacher-weights", tmp_path / "teacher.pt")
    student = detectors.build_detector(name, 6, weights=str(tmp_path / "output/student_gk.pt"))
    assert type(student).__module__ == "torchvision.models.detection.faster_rcnn"


class TestErrors:
    """One sentence that says what to do, and no traceback."""

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ("--data coco", "--data coco needs --root, the folder of the data set"),
            ("--data voc --root {tmp}/nowhere", r"There is no folder .*/nowhere"),
            ("--data coco --root {tmp}", r"No COCO data in .*train2017 is missing"),
            ("--data voc --root {tmp}", r"No VOC data in .* VOCdevkit/VOC<year> is missing"),
            ("--data coco --root {tmp}/coco", "needs a trained teacher: give --teacher-weights"),
            ("--data coco --root {tmp}/bad", r"instances_train2017.json is not a COCO"),
            ("--teacher-weights {tmp}/nothing.pt", r"There are no weights at .*/nothing.pt"),
            ("--teacher-weights {tmp}/garbage.pt", r"garbage.pt is not a file of weights"),
            ("--teacher-weights {tmp}/other.pt", r"other.pt holds no weights of a FasterRCNN"),
            ("--student-weights {teacher}", "belong to another detector"),
            ("--student-weights DEFAULT", "small-student has no released weights"),
            (
                "--data coco --root {tmp}/coco --teacher small-teacher --teacher-weights {teacher}",
                "know 11 classes, the data 6",
            ),
            ("--student resnet50", "Unknown detector 'resnet50'; known are small-teacher, "),
            ("--resume", "Cannot resume: there is no run in"),
            ("--device cuda:7", r"--device cuda:7 cannot be used: "),
            ("--train-teacher", "Give --teacher-weights or --train-teacher, not both"),
            ("--method gk+nkd", "unknown method 'nkd'; known are gk, "),
            ("--method pkd+pkd", "names a method twice"),
            ("--method dicod", "dicod needs a classifier, which only Python can give it"),
            ("--method detrdistill", "--method detrdistill: losses: DETRDistill needs queries"),
            ("--method pkd --prototype-images 9", "--prototype-images needs gk in --method"),
            ("--share -1", "--share must not be less than 0"),
            ("--train {tmp}", "--train and --validation belong together"),
            ("--train {tmp}/a {tmp}/b --validation {tmp} {tmp}", r"There is no .*/a\.$"),
            ("--train {tmp} --validation {tmp}", "There is no XML file in"),
            ("--batch-size 0", "--batch-size must be greater than 0"),
            ("--output {tmp}/garbage.pt/output", "Cannot make the folder"),
        ],
    )
    def test_sentence(self, tmp_path, cache, options, sentence):
        write_coco(tmp_path / "coco")
        bad = write_coco(tmp_path / "bad")
        (bad / "annotations" / "instances_train2017.json").write_text("{")
        (tmp_path / "garbage.pt").write_text("garbage")
        torch.save({"weight": torch.ones(1)}, tmp_path / "other.pt")
        given = options.format(tmp=tmp_path, teacher=TEACHER).split()
        default = f"--scenes 40 16 --iterations 1 --cache {cache} --output {tmp_path / 'o'}".split()
        if "--data" not in options and "--teacher-weights" not in options:
            default += ["--teacher-weights", TEACHER]
        with pytest.raises(SystemExit, match=sentence) as stopped:
            run(default, *given)
        assert str(stopped.value).endswith(".") and "\n" not in str(stopped.value)

    def test_other_options_on_resume(self, tiny):
        options, output = tiny
        run(options, "--method", "none")
        with pytest.raises(SystemExit, match=r"has --seed 0, not 1\.$"):
            run(options, "--method", "none", "--resume", "--seed", 1)

    def test_a_damaged_state(self, tiny):
        options, output = tiny
        run(options, "--method", "none")
        (output / "state" / "none.pt").write_bytes(b"half a file")
        with pytest.raises(SystemExit, match="none.pt is damaged; delete it"):
            run(options, "--method", "none", "--resume")

    def test_too_little_disk(self, tiny, monkeypatch):
        usage = type("usage", (), {"free": 1000})
        monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
        with pytest.raises(SystemExit, match=r"^Too little disk: the output needs \d+ MB in"):
            run(tiny[0])

    def test_divergence(self, tiny):
        with pytest.raises(SystemExit, match="diverged at iteration 7 .* try a lower --lr"):
            run(tiny[0], "--method", "none", "--lr", "1e30")

    @pytest.mark.slow
    def test_as_the_user_sees_it(self, tmp_path):
        path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / "torchvision_frcnn.py"), "--data", "coco", "--root",
             str(tmp_path), "--output", str(tmp_path / "output")],
            capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith("No COCO data in ") and done.stderr.count("\n") == 1
