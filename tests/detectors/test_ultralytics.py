"""Real Ultralytics models of random weights: maps, boxes in pixels of the canvas, its trainer."""

import copy
import io
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.small_loss import small_loss

# Read when Ultralytics is imported: no settings outside of a temporary folder, no network.
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())
os.environ.setdefault("YOLO_OFFLINE", "1")
os.environ.setdefault("YOLO_AUTOINSTALL", "0")
pytest.importorskip(
    "ultralytics",
    minversion="8.4",
    reason="needs ultralytics 8.4",
    exc_type=ImportError,  # OpenCV without its system libraries
)

from global_kd import Distiller, GlobalKnowledgeLoss, Pixels
from global_kd.detectors.ultralytics import UltralyticsDetector
from global_kd.functional import logit_loss, pool_boxes
from global_kd.hooks import evaluating

from ..test_docs import blocks_of
from .cases import Scene, scenes
from .cases_ultralytics import NUM_CLASSES, batch, model, step
from .detectors import detector
from .detectors import scenes as torchvision_scenes

EXAMPLES = Path(__file__).parents[2] / "examples"


# Random weights: maps next to zero.
gk = partial(small_loss, NUM_CLASSES, standardize=False)


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolov10n.yaml", "yolo26n.yaml"])
def test_a_few_steps_of_training(name):
    """All terms appear, are finite, move the student, and leave the teacher alone."""
    torch.manual_seed(0)
    student, teacher = model(name), model("yolo11s.yaml")
    keys, frozen = list(student.state_dict()), copy.deepcopy(teacher.state_dict())
    before = copy.deepcopy(student.state_dict())
    kd = Distiller(student, teacher, gk())
    optimizer = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=1e-3)
    teacher.train()  # somebody calls .train() on everything
    for seed in range(4):
        images = batch(scenes(seed=seed), side=96)
        loss, terms = step(student, (images,)), kd(images)
        assert set(terms) == {"kd_foreground", "kd_background", "kd_relation", "kd_logits"}
        assert all(v.isfinite() and v >= -1e-6 for v in terms.values())
        optimizer.zero_grad()
        (loss + len(images["img"]) * sum(terms.values())).backward()
        optimizer.step()
        assert not any(m.training for m in teacher.modules())
    assert terms["kd_relation"] > 0
    assert terms["kd_logits"] > 0
    assert kd.loss.rdm.activation == "sigmoid"
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in kd.parameters())
    assert all(torch.equal(v, frozen[k]) for k, v in teacher.state_dict().items())
    assert any(not torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert list(student.state_dict()) == keys
    buffer = io.BytesIO()
    torch.save(student.state_dict(), buffer)
    buffer.seek(0)
    model(name).load_state_dict(torch.load(buffer, weights_only=True))


@pytest.mark.parametrize(
    "name, family, strides",
    [
        ("yolov3-tiny.yaml", "DetectionModel", [16, 32]),  # names its levels in another order
        ("yolov5n.yaml", "DetectionModel", [8, 16, 32]),
        ("yolov6n.yaml", "DetectionModel", [8, 16, 32]),
        ("yolov8n.yaml", "DetectionModel", [8, 16, 32]),
        ("yolov8n-p2.yaml", "DetectionModel", [4, 8, 16, 32]),
        ("yolov8n-p6.yaml", "DetectionModel", [8, 16, 32, 64]),
        ("yolov9t.yaml", "DetectionModel", [8, 16, 32]),
        ("yolov10n.yaml", "DetectionModel", [8, 16, 32]),
        ("yolo11n.yaml", "DetectionModel", [8, 16, 32]),
        ("yolo12n.yaml", "DetectionModel", [8, 16, 32]),
        ("yolo26n.yaml", "DetectionModel", [8, 16, 32]),
        ("yolo11n-seg.yaml", "SegmentationModel", [8, 16, 32]),
        ("yolo26n-pose.yaml", "PoseModel", [8, 16, 32]),
        ("yolov8s-world.yaml", "WorldModel", [8, 16, 32]),  # writes into the list of its maps
        ("yoloe-11s.yaml", "YOLOEModel", [8, 16, 32]),
        ("rtdetr-resnet50.yaml", "RTDETRDetectionModel", [8, 16, 32]),
    ],
)
def test_the_maps_are_those_that_the_head_takes(name, family, strides):
    torch.manual_seed(0)
    network = model(name, family).eval()
    reader = UltralyticsDetector(network)
    taken = []
    network.model[-1].register_forward_pre_hook(  # YOLOE's takes a text embedding, too
        lambda m, args: taken.extend(x.clone() for x in args[0] if x.dim() == 4)
    )
    view = reader.example()
    view.images.uniform_()
    with torch.no_grad():
        network(view.images)
        maps = reader.look(view).maps
    assert [256 / x.shape[-1] for x in sorted(maps, key=lambda x: -x.shape[-1])] == strides
    assert len(taken) == len(maps)
    for mine, theirs in zip(maps, taken, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert reader.divisor == max(32, *strides)


def test_boxes_are_read_in_pixels_of_the_letterboxed_canvas():
    """A red rectangle in the second image: enlarged twice and moved down by the letterbox."""
    dark, empty = torch.full((3, 64, 32), 0.2), torch.zeros(0, 4)
    red = torch.full((3, 32, 64), 0.2)
    red[0, 8:24, 16:40] = 1
    nothing = Scene(dark, empty, torch.zeros(0, dtype=torch.int64))
    something = Scene(red, torch.tensor([[16.0, 8, 40, 24]]), torch.tensor([0]))
    images = batch([nothing, something], side=128)
    torch.manual_seed(0)
    student = model("yolov8n.yaml")
    kd = Distiller(student, model("yolov8n.yaml"), gk())
    truth, omega = kd.weigh(images)
    assert truth.boxes.tolist() == [[32, 48, 80, 80]]
    assert (truth.labels.tolist(), truth.image_index.tolist()) == ([0], [1])  # classes count from 0
    assert omega.shape == (3, 1)
    without = batch([nothing, Scene(torch.full((3, 32, 64), 0.2), empty, nothing.labels)], side=128)
    with torch.no_grad(), evaluating(student):
        seen, other = (kd._pair.student.observe(b, None) for b in (images, without))
    x = seen.look.view.images
    assert x[1, 0, 49:79, 33:79].min() == 1  # resizing blurs the outermost pixels only
    assert x[1, 1:, 49:79, 33:79].max() < 0.25
    outside = x[1, 0].clone()
    outside[47:81, 31:81] = 0
    assert outside.max() < 0.5
    pad = kd._pair.student.pixels.pad
    torch.testing.assert_close(x[0, :, :, :32], torch.full((3, 128, 32), pad))
    # The response of the finest map is where the box is.
    change = (seen.look.maps[0] - other.look.maps[0]).abs().mean(dim=1, keepdim=True)
    assert change[0].max() < 1e-6
    inside = pool_boxes(change, truth.boxes, truth.image_index, 8)
    assert inside.item() > 3 * change[1].mean().item()
    y, x = divmod(change[1, 0].argmax().item(), 16)
    assert 48 <= 8 * y + 4 <= 80
    assert 32 <= 8 * x + 4 <= 80


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolov10n.yaml"])
def test_a_student_that_is_its_teacher_loses_nothing(name):
    torch.manual_seed(0)
    student = model(name)
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):  # the teacher's are in eval mode
            module.eval()
    teacher = copy.deepcopy(student)
    kd = Distiller(student, teacher, gk(adapter="identity"))
    images = batch(scenes(), side=96)
    for _ in range(4):
        student(images)
        terms = kd(images)
    assert kd.loss.bank.valid.any()
    assert {k: pytest.approx(0, abs=1e-6) for k in terms} == {k: v.item() for k, v in terms.items()}
    assert set(terms) >= {"kd_relation", "kd_logits"}
    _, omega = kd.weigh(images)
    torch.testing.assert_close(omega, torch.ones_like(omega))


def recorded(kd):
    seen = {}
    kd.loss.rdm.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(targets=args[2], **kwargs), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo26n.yaml"])
def test_soft_labels_lie_on_the_points_that_the_criterion_trains_as_objects(name):
    torch.manual_seed(0)
    student, teacher = model(name), model("yolo11n.yaml")
    with torch.no_grad():  # both branches of a one-to-one head are equal at first
        for key, x in student.model[-1].named_parameters():
            if "one2one" in key:
                x.add_(torch.randn_like(x), alpha=0.1)
    kd = Distiller(student, teacher, gk(logits=1.0, robust=("imitation", "relation")))
    seen, heads, assigned = recorded(kd), [], []
    student.model[-1].register_forward_hook(lambda m, args, out: heads.append(out))
    images = batch(scenes(), side=96)
    student(images)
    criterion = getattr(student.criterion, "one2many", student.criterion)
    criterion.assigner.register_forward_hook(lambda m, args, out: assigned.append(out))
    student(images)
    terms = kd(images)
    (labels, _, _, mask, _), output = assigned[0], heads[-1].get("one2many", heads[-1])
    assert mask.sum() >= 6
    logits = output["scores"].transpose(1, 2)[mask]
    assert torch.equal(seen["student_logits"], logits)
    assert seen["student_logits"].requires_grad
    image, _ = mask.nonzero(as_tuple=True)
    assert torch.equal(seen["targets"].image_index[seen["logit_box"]], image)
    assert torch.equal(seen["targets"].labels[seen["logit_box"]], labels[mask])
    with torch.no_grad():
        whole = teacher.eval()(images["img"])[1]["scores"].transpose(1, 2)[mask]
    torch.testing.assert_close(seen["teacher_logits"], whole)
    assert not seen["teacher_logits"].requires_grad
    expected = logit_loss(logits, whole, activation="sigmoid")
    torch.testing.assert_close(terms["kd_logits"], expected)


def test_soft_labels_leave_out_levels_that_only_the_student_has():
    torch.manual_seed(0)
    student, teacher = model("yolov8n-p2.yaml"), model("yolov8n.yaml")
    kd = Distiller(student, teacher, gk())
    seen, assigned = recorded(kd), []
    # At first every box is 15 cells wide: these two are met best on strides 4 and 8.
    corners = torch.tensor([[10.0, 10, 70, 70], [2, 2, 122, 122]])
    images = batch([Scene(torch.rand(3, 128, 128), corners, torch.tensor([0, 1]))], side=128)
    student(images)
    student.criterion.assigner.register_forward_hook(lambda m, args, out: assigned.append(out[3]))
    student(images)
    kd(images)
    mask = assigned[0].clone()
    finest = 32 * 32
    assert mask[:, :finest].any()
    mask[:, :finest] = False
    assert len(seen["student_logits"]) == mask.sum() > 0
    with torch.no_grad():
        scores = teacher(images["img"])[1]["scores"].transpose(1, 2)
    torch.testing.assert_close(seen["teacher_logits"], scores[mask[:, finest:]])


def test_boxes_in_any_order_find_their_own_points():
    """The criterion counts boxes per image; the batch may list them as it likes."""
    torch.manual_seed(0)
    student = model("yolov8n.yaml")
    kd = Distiller(student, model("yolov8n.yaml"), gk())
    seen = recorded(kd)
    images = batch(scenes(), side=96)
    student(images)
    kd(images)
    first = seen["targets"].boxes[seen["logit_box"]]
    swapped = torch.tensor([2, 3, 0, 1, 4, 5])  # the images' boxes, not those within an image
    shuffled = images | {k: images[k][swapped] for k in ("cls", "bboxes", "batch_idx")}
    reader = kd._pair.student
    student(images)
    tapped = kd._tap.read()
    seen = reader.observe(shuffled, None)
    arguments = student.criterion, tapped["head"], reader._batch(images), seen.truth
    assigned = reader._yolo.assigned(*arguments, seen.look.maps)
    assert torch.equal(seen.truth.boxes[assigned[assigned >= 0]], first)


def test_batches_of_the_data_loader_are_read_as_they_come():
    """Bytes instead of numbers in [0, 1]: one pass for prototypes needs no trainer."""
    torch.manual_seed(0)
    student = model("yolov8n.yaml")
    kd = Distiller(student, model("yolov8n.yaml"), gk(refresh_every=None))
    images = batch(scenes(), side=96)
    raw = images | {"img": (images["img"] * 255).round().byte()}
    ours = kd._pair.student.observe(images, None)
    theirs = kd._pair.student.observe(raw, None)
    torch.testing.assert_close(ours.look.view.images, theirs.look.view.images)
    assert raw["img"].dtype == torch.uint8
    kd.refresh([raw, raw], progress=False)
    assert kd.loss.bank.valid.any()
    assert student.training


@pytest.mark.parametrize(
    "name, family, end2end",
    [
        ("yolov8n.yaml", "DetectionModel", False),
        ("yolo11n-seg.yaml", "SegmentationModel", False),  # with masks beside the boxes
        ("yolo26n.yaml", "DetectionModel", True),
        ("yolo26n-seg.yaml", "SegmentationModel", True),
    ],
)
def test_detections_are_in_pixels_of_the_view(name, family, end2end):
    """A head that says: at every cell of stride 32 a box two cells to each side, class 1."""
    network = model(name, family)
    network.end2end = end2end
    head = network.model[-1]
    if end2end:
        boxes, classes = head.one2one_cv2, head.one2one_cv3
    else:
        boxes, classes = head.cv2, head.cv3
    with torch.no_grad():
        for level in range(3):
            for last in (boxes[level][-1], classes[level][-1]):
                last.weight.zero_()
                last.bias.fill_(-20)
            if head.reg_max > 1:
                boxes[level][-1].bias.view(4, -1)[:, 2] = 20
            else:
                boxes[level][-1].bias.fill_(2)
        classes[2][-1].bias[1] = 2.0
    reader = UltralyticsDetector(network.train())
    found = reader.detections(reader.example())
    assert network.training
    assert len(found) == 1
    assert len(found[0].boxes) >= 9
    sides = found[0].boxes[:, 2:] - found[0].boxes[:, :2]
    torch.testing.assert_close(sides, torch.full_like(sides, 128), atol=0.01, rtol=0)
    centre = (found[0].boxes[:, 2:] + found[0].boxes[:, :2]) / 2
    torch.testing.assert_close(centre % 32, torch.full_like(centre, 16), atol=0.01, rtol=0)
    assert found[0].labels.unique().tolist() == [1]
    torch.testing.assert_close(found[0].scores, torch.full_like(found[0].scores, 2).sigmoid())


def test_losses_are_those_of_the_training_loop():
    torch.manual_seed(0)
    student = model("yolov8n.yaml")
    reader, images = UltralyticsDetector(student), batch(scenes(), side=96)
    torch.testing.assert_close(reader.losses(images, None), student(images)[0].sum())


def test_a_yolo_teaches_a_detector_of_another_framework():
    """It sees RGB in [0, 1], padded with its grey to a multiple of its largest stride."""
    torch.manual_seed(0)
    student, teacher = detector("retinanet"), model("yolov8n.yaml")
    kd = Distiller(student, teacher, GlobalKnowledgeLoss(4, total_steps=9, relation=5))
    assert kd.loss.rdm.strides == (8, 16)
    images, targets = torchvision_scenes()
    got = []
    teacher.model[0].register_forward_pre_hook(lambda module, args: got.append(args[0]))
    student(images, targets)
    assert set(kd(images, targets)) == {"kd_foreground", "kd_background", "kd_relation"}
    sent, _ = student.transform(images)
    source = kd._pair.student.pixels
    height, width = got[0].shape[-2:]
    assert height % 32 == width % 32 == 0
    for i, (h, w) in enumerate(sent.image_sizes):
        plain = source.convert(sent.tensors[i : i + 1, :, :h, :w], Pixels())[0]
        torch.testing.assert_close(got[0][i, :, :h, :w], plain, atol=1e-5, rtol=1e-5)
        assert torch.all((got[0][i, :, h:] - 114 / 255).abs() < 1e-6)
        assert torch.all((got[0][i, :, :, w:] - 114 / 255).abs() < 1e-6)


def test_what_does_not_fit_is_named():
    from ultralytics import YOLO

    student, teacher = model("yolov8n.yaml"), model("yolov8n.yaml")
    whole = YOLO("yolov8n.yaml")
    for pair in ((whole, teacher), (student, whole)):
        with pytest.raises(ValueError, match=r"got YOLO\(\.\.\.\), which trains a copy.*\.model"):
            Distiller(*pair, gk())
    Distiller(whole.model, teacher, gk(logits=0))
    for name, family, head in (
        ("yolo11n-obb.yaml", "OBBModel", "OBB"),
        ("yolo11n-cls.yaml", "ClassificationModel", "Classify"),
    ):
        with pytest.raises(ValueError, match=f"but got {family} with {head}; name its pyramid"):
            Distiller(student, model(name, family), gk())
    kd = Distiller(student, teacher, gk())
    images = batch(scenes(), side=96)
    with pytest.raises(ValueError, match="never fired; run this .* itself first"):
        kd(images)
    student(images)
    with pytest.raises(ValueError, match="with img, cls, bboxes, batch_idx, but got Tensor"):
        kd(images["img"])
    student(images)
    with pytest.raises(ValueError, match=r"but got \['batch_idx', 'cls', 'img'\]"):
        kd({k: v for k, v in images.items() if k != "bboxes"})
    with pytest.raises(ValueError, match="expected 3 class logits like the student's, but got 7"):
        Distiller(student, model("yolov8n.yaml", nc=7), gk())


def test_the_loop_of_the_documentation():
    page = (EXAMPLES.parent / "docs" / "ultralytics.md").read_text(encoding="utf-8")
    namespace = {}
    exec(next(blocks_of(page)).source, namespace)
    assert set(namespace["terms"]) >= {"kd_foreground", "kd_background", "kd_logits"}


@pytest.fixture
def data_set(tmp_path, monkeypatch):
    """Eight images with one rectangle each, in Ultralytics' format."""
    from PIL import Image

    monkeypatch.setattr("ultralytics.data.utils.check_font", lambda *args: None)
    monkeypatch.syspath_prepend(EXAMPLES)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for i, scene in enumerate(scenes(sizes=((64, 96), (96, 64)) * 4, seed=1)):
        pixels = (scene.image.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
        h, w = scene.image.shape[1:]
        lines = [
            f"{label} {(x1 + x2) / 2 / w} {(y1 + y2) / 2 / h} {(x2 - x1) / w} {(y2 - y1) / h}"
            for label, (x1, y1, x2, y2) in zip(scene.labels.tolist(), scene.boxes.tolist())
        ]
        (tmp_path / "labels" / f"{i}.txt").write_text("\n".join(lines))
    (tmp_path / "data.yaml").write_text(
        f"path: {tmp_path}\ntrain: images\nval: images\nnames: {{0: a, 1: b, 2: c}}\n"
    )
    torch.save({"model": model("yolo11s.yaml"), "train_args": {}}, tmp_path / "teacher.pt")
    return tmp_path


@pytest.mark.slow
def test_the_trainer_of_the_documentation(data_set):
    """Trains, is cut off, goes on, and leaves checkpoints that need nothing of this package."""
    from ultralytics import YOLO

    from global_kd.trainers.ultralytics import DistillationTrainer

    settings = {
        "data": str(data_set / "data.yaml"),
        "epochs": 2,
        "imgsz": 64,
        "batch": 4,
        "nbs": 4,  # no accumulation: a step per batch
        "device": "cpu",
        "plots": False,
        "project": str(data_set / "runs"),
        "name": "student",
        "warmup_epochs": 0,
    }
    steps, moved, copies = [], [], []

    class Trainer(DistillationTrainer):
        teacher = str(data_set / "teacher.pt")
        share = 0.3

        @staticmethod
        def losses():
            return GlobalKnowledgeLoss(3, min_side=4, refresh_every=1)

        def optimizer_step(self):
            before = [p.detach().clone() for p in self.kd.parameters()]
            super().optimizer_step()
            moved.append(any(not torch.equal(p, q) for p, q in zip(self.kd.parameters(), before)))
            steps.append(self.kd.loss.step)
            assert {"box_loss", "kd_foreground", "kd_logits"} <= set(self.loss_items)

    class CutOff(Exception):
        pass

    def cut_off(trainer):
        copies.append([p.detach().clone() for p in trainer.kd.parameters()])
        raise CutOff

    yolo = YOLO("yolo11n.yaml")
    yolo.add_callback("on_model_save", cut_off)
    with pytest.raises(CutOff):
        yolo.train(trainer=Trainer, **settings)
    last = data_set / "runs" / "student" / "weights" / "last.pt"
    loads_alone(last)

    done = len(steps)
    assert done >= 1
    yolo = YOLO(last)
    yolo.add_callback(
        "on_train_start", lambda t: copies.append([p.detach().clone() for p in t.kd.parameters()])
    )
    yolo.train(trainer=Trainer, resume=True)
    assert all(torch.equal(p, q) for p, q in zip(*copies))  # the adapters came back
    assert steps == sorted(set(steps))
    assert len(steps) > done
    assert all(moved)
    assert yolo.trainer.kd.loss.progress == 1
    assert {"foreground", "background", "logits"} <= yolo.trainer.kd.loss.calibrated
    loads_alone(last)
    header = (last.parents[1] / "results.csv").read_text().splitlines()[0]
    assert "train/kd_foreground" in header


def test_the_progress_header_has_a_column_for_each_term():
    from global_kd.trainers.ultralytics import DistillationTrainer

    trainer = object.__new__(DistillationTrainer)
    trainer.loss_names = names = ("box_loss", "kd_foreground", "kd_background", "kd_logits")
    header = trainer.progress_string().split()
    assert header[2:-2] == ["box_loss", "foreground", "background", "kd_logits"]
    assert trainer.loss_names == names


def loads_alone(checkpoint):
    """In a process that has neither this package nor the example."""
    code = (
        "import sys; sys.modules['global_kd'] = None\n"
        "import numpy, ultralytics\n"
        f"student = ultralytics.YOLO({str(checkpoint)!r})\n"
        "assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())\n"
        "student.predict(numpy.zeros((64, 64, 3), dtype='uint8'), imgsz=64, verbose=False)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=checkpoint.parent, timeout=300)


def test_another_batch_than_the_students_is_refused():
    student, teacher = model("yolov8n.yaml"), model("yolo11n.yaml")
    kd = Distiller(student, teacher, gk())
    images = batch(scenes(), side=96)
    half = {"img": images["img"][:1], **{k: images[k] for k in ("cls", "bboxes", "batch_idx")}}
    parts = [{key: images[key] * 0.5} for key in ("img", "cls", "bboxes", "batch_idx")]
    order, strangers = images["img"].flip(0), images["batch_idx"] + 2
    for changed in (half, {"img": order}, {"batch_idx": strangers}, *parts):
        step(student, (images,))
        with pytest.raises(ValueError, match="^(img|cls|bboxes|batch_idx|images)"):
            kd({**images, **changed})
    step(student, (images,))
    assert kd({key: x.clone() for key, x in images.items()})


def test_boxes_of_images_that_there_are_not():
    """A loop that computes the loss outside of the model: only the images were given to it."""
    student, teacher = model("yolov8n.yaml"), model("yolo11n.yaml")
    kd = Distiller(student, teacher, gk(logits=0))
    images = batch(scenes(), side=96)
    student(images["img"])
    assert kd(images)
    student(images["img"])
    with pytest.raises(ValueError, match="targets: expected boxes of the 4 images"):
        kd({**images, "batch_idx": images["batch_idx"] + 4})


def test_teachers_of_random_weights_destroy_no_student():
    """As the page has them: from YAML, maps of a variance of 1e-17, the default loss."""
    torch.manual_seed(0)
    student, teacher = model("yolo11n.yaml"), model("yolo11s.yaml")
    kd = Distiller(student, teacher, GlobalKnowledgeLoss(NUM_CLASSES, total_steps=50))
    optimizer = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=0.01)
    images = batch(scenes(), side=96)
    for _ in range(5):
        loss, terms = step(student, (images,)), kd(images)
        assert loss.isfinite() and all(x.isfinite() and x <= 20 for x in terms.values())
        optimizer.zero_grad()
        (loss + sum(terms.values())).backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in student.parameters())
