"""What Ultralytics' heads say at every location, held against the models' own outputs."""

import copy
import os
import tempfile
from dataclasses import replace

import pytest
import torch
from torch import nn

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

from global_kd import Distiller
from global_kd.detectors import View
from global_kd.detectors.pixels import translate
from global_kd.detectors.protocol import Sampled
from global_kd.detectors.ultralytics import UltralyticsDetector
from global_kd.hooks import FeatureTap, evaluating

from ..small_loss import small_loss
from .cases import scenes
from .cases_ultralytics import NUM_CLASSES, batch, model

ALL = frozenset({"dense", "boxes", "bins", "priors", "assigned", "positives"})
YOLOS = {
    "yolov3-tiny.yaml": "DetectionModel",
    "coarsest first": "DetectionModel",
    "yolov5n.yaml": "DetectionModel",
    "yolov8n.yaml": "DetectionModel",
    "yolov9t.yaml": "DetectionModel",
    "yolov10n.yaml": "DetectionModel",
    "yolo11n.yaml": "DetectionModel",
    "yolo12n.yaml": "DetectionModel",
    "yolo26n.yaml": "DetectionModel",  # no bins
    "yolo11n-seg.yaml": "SegmentationModel",
    "yolov8s-world.yaml": "WorldModel",  # writes into the list of its maps
    "yoloe-11s.yaml": "YOLOEModel",
}
TRAINED = [name for name, family in YOLOS.items() if family == "DetectionModel"]


def network(name, family=None, **options):
    """Its head does not say the same everywhere, as one of initial weights does."""
    torch.manual_seed(0)
    family = family or YOLOS.get(str(name), "DetectionModel")
    made = model(coarsest_first() if name == "coarsest first" else name, family, **options)
    with torch.no_grad():
        for key, x in made.model[-1].named_parameters():
            encoder = "enc_" in key and x.dim() == 2
            if encoder or (x.dim() == 4 and "dfl" not in key):  # those are the bins' numbers
                x.add_(torch.randn_like(x), alpha=0.1)
    return made


def coarsest_first():
    """A head that names its levels in this order."""
    from ultralytics.nn.tasks import yaml_model_load

    plan = yaml_model_load("yolov3-tiny.yaml")
    plan["head"][-1][0].sort()
    return plan


def rt_detr(**options):
    """A shallow and narrow one."""
    from ultralytics.nn.tasks import yaml_model_load

    plan = yaml_model_load("rtdetr-resnet50.yaml")
    for layer in plan["backbone"]:
        inward, outward, stride, first, _ = layer[3]
        layer[3] = [inward if inward == 3 else inward // 4, outward // 4, stride, first, 1]
    return network(plan, "RTDETRDetectionModel", **options)


def trained_forward(student, images, facts=ALL):
    """What its training forward leaves for the reader."""
    reader = UltralyticsDetector(student)
    paths = reader.taps | reader.taps_for(facts)
    with FeatureTap(student, paths, inputs=reader.inputs) as tap:
        loss, _ = student(images)
        return reader, reader.read(tap.read(), images, None, facts), loss


def frozen_statistics(student):
    """Batch norms as in a teacher, in eval mode."""
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return student


def in_order(grids, strides):
    """Rows of a head whose levels have these strides, as in grids: finest first."""
    counts = {g.stride: g.rows for g in grids}
    first = {s: sum(counts[t] for t in strides[:i]) for i, s in enumerate(strides)}
    return torch.cat([torch.arange(g.rows) + first[g.stride] for g in grids])


@pytest.mark.parametrize("name", YOLOS)
def test_the_dense_head_says_what_post_processing_starts_from(name):
    teacher = network(name).eval()
    if getattr(teacher.model[-1], "one2one_cv2", None) is not None:
        teacher.end2end = False  # the branch that is trained on many points a box
    reader = UltralyticsDetector(teacher)
    assert reader.kind == "ultralytics"
    x = torch.rand(2, 3, 96, 128)
    with torch.no_grad():
        found = teacher(x)
        found, raw = (found[0][0], found[1]) if isinstance(found[0], tuple) else found
        dense = reader.dense(reader.look(View(x)), ALL)
    raw = raw.get("one2many", raw)
    strides = teacher.model[-1].stride.tolist()
    assert [g.stride for g in dense.grids] == sorted(strides)
    rows = in_order(dense.grids, strides)
    assert torch.equal(dense.logits, raw["scores"].transpose(1, 2)[:, rows])
    centre, half = found[:, :2], found[:, 2:4] / 2
    boxes = torch.cat([centre - half, centre + half], dim=1).transpose(1, 2)[:, rows]
    torch.testing.assert_close(dense.boxes, boxes, rtol=1e-5, atol=1e-3)
    scores = found[:, 4 : 4 + dense.logits.shape[2]].transpose(1, 2)[:, rows]
    torch.testing.assert_close(dense.probabilities(), scores)
    assert dense.boxes.std(dim=1).min() > 1
    middle = (dense.priors[:, :2] + dense.priors[:, 2:]) / 2
    points, per_point = teacher.model[-1].anchors.T, teacher.model[-1].strides.T
    torch.testing.assert_close(middle, (points * per_point)[rows])
    assert torch.equal(dense.priors[:, 2:] - dense.priors[:, :2], per_point[rows].repeat(1, 2))
    if "26" in name:
        assert dense.bins is None
        assert "bins" not in reader.gives
    else:
        bins = raw["boxes"].transpose(1, 2)[:, rows].unflatten(2, (4, 16))
        assert torch.equal(dense.bins, bins)
        assert "bins" in reader.gives


@pytest.mark.parametrize("name", TRAINED)
def test_a_student_is_read_from_its_own_training_forward(name):
    """As if the head ran once more on the maps, with gradients into the whole network."""
    student = network(name)
    reader, seen, _ = trained_forward(student, batch(scenes(), side=64))
    tapped = reader.dense(seen.look, ALL)
    again = reader.dense(replace(seen.look, tapped=None), ALL)
    assert tapped.grids == again.grids
    for part in ("logits", "boxes", "bins", "priors"):
        mine, theirs = getattr(tapped, part), getattr(again, part)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs)
    first = next(p for p in student.parameters() if p.dim() == 4)
    for part in (tapped.logits, tapped.boxes):
        (gradient,) = torch.autograd.grad(part.sum(), first, retain_graph=True)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", ["yolov8s-world.yaml", "yoloe-11s.yaml"])
def test_a_student_whose_classes_are_texts_has_no_soft_labels(name):
    """They may be others in each batch, and are not its teacher's."""
    student = network(name)
    images, classes = batch(scenes(), side=64), student.model[-1].nc
    images["txt_feats"] = torch.randn(1, classes, 512).expand(len(images["img"]), -1, -1)
    reader, seen, _ = trained_forward(student, images)
    tapped = reader.dense(seen.look, ALL)
    output = seen.look.tapped["head"]
    assert torch.equal(tapped.logits, output["scores"].transpose(1, 2))
    assert torch.equal(tapped.bins.flatten(2), output["boxes"].transpose(1, 2))
    assert (seen.assigned >= 0).sum() >= 6
    assert seen.sampled is None


def test_a_teacher_whose_classes_are_texts_has_soft_labels():
    student, teacher = network("yolov8n.yaml"), network("yolov8s-world.yaml").eval()
    _, seen, _ = trained_forward(student, batch(scenes(), side=64))
    reader, (image, location, _) = UltralyticsDetector(teacher), seen.sampled.raw
    with torch.no_grad():
        soft, rows = reader.soft_labels(reader.look(seen.look.view), seen.sampled)
        scores = teacher(seen.look.view.images)[1]["scores"].transpose(1, 2)
    assert rows is None
    assert torch.equal(soft, scores[image, location])


@pytest.mark.parametrize("name", TRAINED)
def test_the_assigned_locations_are_the_criterions(name):
    student, images = network(name), batch(scenes(), side=96)
    student(images)
    criterion, found = getattr(student.criterion, "one2many", student.criterion), []
    criterion.assigner.register_forward_hook(lambda m, args, out: found.append((args, out)))
    reader, seen, _ = trained_forward(student, images)
    boxes, (_, _, _, mask, index) = found[0][0][4], found[0][1]
    rows = in_order(reader.dense(seen.look).grids, student.model[-1].stride.tolist())
    assert seen.assigned.dtype == torch.int64
    assert mask.sum() >= 6
    assert torch.equal(seen.assigned >= 0, mask[:, rows].bool())
    for image in range(len(mask)):
        at = (seen.assigned[image] >= 0).nonzero()[:, 0]
        mine = seen.assigned[image, at]
        assert (seen.truth.image_index[mine] == image).all()
        theirs = boxes[image, index[image, rows[at]].long()]
        torch.testing.assert_close(seen.truth.boxes[mine], theirs)
    # Positives are the same, one row each.
    image, location = (seen.assigned >= 0).nonzero(as_tuple=True)
    assert torch.equal(seen.sampled.box, seen.assigned[image, location])
    assert torch.equal(seen.sampled.logits, reader.dense(seen.look).logits[image, location])


def test_without_boxes_no_location_is_assigned():
    student, images = network("yolov8n.yaml"), batch(scenes(), side=64)
    images |= {k: images[k][:0] for k in ("cls", "bboxes", "batch_idx")}
    _, seen, _ = trained_forward(student, images)
    assert torch.equal(seen.assigned, torch.full_like(seen.assigned, -1))
    assert seen.sampled.logits.shape == (0, NUM_CLASSES)


@pytest.mark.parametrize(
    "facts, taps",
    [
        (set(), set()),
        ({"targets", "images"}, set()),
        ({"assigned"}, {"head"}),
        ({"dense"}, {"logits"}),
        ({"dense", "bins"}, {"logits", "sides"}),
        ({"positives"}, {"head", "logits"}),
    ],
)
def test_no_more_is_recorded_than_the_facts_need(facts, taps):
    reader = UltralyticsDetector(network("yolov8n.yaml"))
    assert {name.split()[0] for name in reader.taps_for(frozenset(facts))} == taps


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolov10n.yaml", "yolo26n.yaml"])
def test_a_copy_gives_the_soft_labels_of_its_student(name):
    student = frozen_statistics(network(name))
    teacher = UltralyticsDetector(copy.deepcopy(student).eval())
    _, seen, _ = trained_forward(student, batch(scenes(), side=96))
    with torch.no_grad():
        soft, rows = teacher.soft_labels(teacher.look(seen.look.view), seen.sampled)
    assert rows is None
    assert len(soft) >= 6
    torch.testing.assert_close(soft, seen.sampled.logits, atol=1e-5, rtol=1e-5)
    assert seen.sampled.logits.requires_grad


@pytest.mark.parametrize("name", ["yolo11s.yaml", "yolov8n-p6.yaml"])
def test_soft_labels_of_another_model_are_of_the_same_cells(name):
    """Also where it is padded to multiples of 64 pixels and its grids are larger."""
    student, teacher = network("yolov8n.yaml"), UltralyticsDetector(network(name).eval())
    reader, seen, _ = trained_forward(student, batch(scenes(), side=96))
    view = translate(seen.look.view, reader.pixels, teacher)
    assert view.size == ((128, 128) if "p6" in name else (96, 96))
    everywhere = all_locations(reader.dense(seen.look))
    with torch.no_grad():
        look = teacher.look(view)
        soft, rows = teacher.soft_labels(look, everywhere)
        dense = teacher.dense(look)
    assert rows is None
    first = 0
    for mine, theirs, level in zip(everywhere.raw[2], dense.grids, split(soft, everywhere)):
        assert mine.stride == theirs.stride
        whole = dense.logits[:, first : first + theirs.rows]
        whole = whole.unflatten(1, (theirs.height, theirs.width))
        assert torch.equal(level, whole[:, : mine.height, : mine.width].flatten(1, 2))
        first += theirs.rows
    assert len(teacher.soft_labels(look, seen.sampled)[0]) == len(seen.sampled.logits) >= 6


def all_locations(dense):
    """As if the student's loss trained every location of every image."""
    image, location = torch.ones(dense.logits.shape[:2]).nonzero(as_tuple=True)
    return Sampled(None, torch.zeros_like(image), raw=(image, location, dense.grids))


def split(logits, sampled):
    """By level, ``(B, rows, K)``."""
    rows = [g.rows for g in sampled.raw[2]]
    return logits.view(-1, sum(rows), logits.shape[1]).split(rows, dim=1)


def test_levels_that_only_the_student_has_are_left_out():
    student, teacher = (network(x) for x in ("yolov8n-p2.yaml", "yolov8n.yaml"))
    reader, seen, _ = trained_forward(student, batch(scenes(), side=64))
    theirs, everywhere = UltralyticsDetector(teacher.eval()), all_locations(reader.dense(seen.look))
    finest = everywhere.raw[2][0].rows
    with torch.no_grad():
        look = theirs.look(seen.look.view)
        soft, rows = theirs.soft_labels(look, everywhere)
        dense = theirs.dense(look)
    assert torch.equal(rows, (everywhere.raw[1] >= finest).nonzero()[:, 0])
    assert torch.equal(soft, dense.logits.flatten(0, 1))


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo26n.yaml", "yolov8s-world.yaml"])
def test_the_head_runs_on_maps_and_gives_them_gradients(name):
    teacher = network(name).eval().requires_grad_(False)
    reader = UltralyticsDetector(teacher)
    with torch.no_grad():
        look = reader.look(View(torch.rand(2, 3, 64, 96)))
        own = reader.dense(look, ALL)
    maps = [x.clone().requires_grad_() for x in look.maps]
    dense = reader.head(maps, look, ALL)
    assert torch.equal(dense.logits, own.logits)
    assert torch.equal(dense.boxes, own.boxes)
    for part in (dense.logits, dense.boxes):
        for gradient in torch.autograd.grad(part.square().sum(), maps, retain_graph=True):
            assert gradient.abs().max() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_rt_detr_says_something_of_every_cell():
    """Its own queries are the cells with the best scores."""
    teacher = rt_detr(nc=NUM_CLASSES).eval()
    teacher.model[-1].num_queries = 20
    reader, scored = UltralyticsDetector(teacher), []
    teacher.model[-1].enc_score_head.register_forward_hook(lambda m, args, out: scored.append(out))
    x = torch.rand(2, 3, 64, 416)
    with torch.no_grad():
        _, (_, _, best_boxes, best_scores, _) = teacher(x)
        dense = reader.dense(reader.look(View(x)), ALL)
    assert [(g.stride, g.height, g.width) for g in dense.grids] == [
        (8, 8, 52),
        (16, 4, 26),
        (32, 2, 13),
    ]
    torch.testing.assert_close(dense.logits, scored[0])
    # 0.5 / 52 of the image is nearer to the border than Ultralytics allows.
    column = torch.arange(8 * 52) % 52
    assert torch.equal(dense.valid[: 8 * 52], (column > 0) & (column < 51))
    assert dense.valid[8 * 52 :].all()
    assert dense.boxes.isfinite().all()
    best = dense.logits.amax(dim=2).topk(20, dim=1).indices
    rows = torch.arange(2)[:, None]
    torch.testing.assert_close(dense.logits[rows, best], best_scores)
    canvas = torch.tensor([416.0, 64, 416, 64])
    centre, half = best_boxes[..., :2], best_boxes[..., 2:] / 2
    theirs = torch.cat([centre - half, centre + half], dim=2) * canvas
    known = dense.valid[best]
    assert known.float().mean() > 0.5
    torch.testing.assert_close(dense.boxes[rows, best][known], theirs[known], rtol=1e-5, atol=1e-3)
    assert dense.boxes.std(dim=1).min() > 1


def test_the_queries_of_rt_detr_are_those_of_its_forward():
    teacher = rt_detr(nc=NUM_CLASSES)
    teacher.model[-1].num_queries = 20
    reader, view = UltralyticsDetector(teacher), View(torch.rand(2, 3, 64, 96))
    layer, last = teacher.model[-1].decoder.layers[-1], []
    with torch.no_grad():
        with evaluating(teacher):
            look = reader.look(view)
        queries = reader.queries(look)  # in eval mode, whatever the model is in
        assert teacher.training and teacher.model[-1].training
        assert not layer._forward_hooks
        layer.register_forward_hook(lambda m, args, out: last.append(out))
        _, (boxes, logits, *_) = teacher.eval()(view.images)
    assert "queries" in reader.gives
    assert torch.equal(queries.logits, logits[-1])
    assert torch.equal(queries.embeddings, last[0])
    assert queries.embeddings.shape == (2, 20, look.maps[0].shape[1])
    centre, half = boxes[-1, ..., :2], boxes[-1, ..., 2:] / 2
    theirs = torch.cat([centre - half, centre + half], dim=2) * torch.tensor([96.0, 64, 96, 64])
    torch.testing.assert_close(queries.boxes, theirs)
    assert queries.activation == "sigmoid" and queries.bins is None


def test_a_yolo_has_no_queries():
    reader = UltralyticsDetector(network("yolov8n.yaml").eval())
    assert "queries" not in reader.gives
    with pytest.raises(NotImplementedError, match="DetectionModel gives no queries"):
        reader.queries(reader.look(reader.example()))


def test_an_rt_detr_is_read_from_its_training_forward_and_its_copy_agrees():
    student = frozen_statistics(rt_detr(nc=NUM_CLASSES))
    teacher = UltralyticsDetector(copy.deepcopy(student).eval())
    reader, seen, _ = trained_forward(student, batch(scenes(), side=96))
    facts = frozenset({"dense", "boxes", "priors"})
    tapped = reader.dense(seen.look, facts)
    again = reader.dense(replace(seen.look, tapped=None), facts)
    assert tapped.grids == again.grids
    for part in ("logits", "priors", "valid"):
        torch.testing.assert_close(getattr(tapped, part), getattr(again, part))
    torch.testing.assert_close(tapped.boxes, again.boxes, rtol=1e-5, atol=1e-3)  # pixels
    first = next(p for p in student.parameters() if p.dim() == 4)
    (gradient,) = torch.autograd.grad(tapped.boxes.sum(), first, retain_graph=True)
    assert gradient.abs().max() > 0
    assert len(seen.sampled.logits) == 9 * len(seen.truth) == 54
    with torch.no_grad():
        soft, rows = teacher.soft_labels(teacher.look(seen.look.view), seen.sampled)
    assert rows is None
    torch.testing.assert_close(soft, seen.sampled.logits, atol=1e-4, rtol=1e-4)


def test_the_example_has_as_many_channels_as_the_model_takes():
    from ultralytics.nn.tasks import DetectionModel

    grey = DetectionModel("yolov8n.yaml", ch=1, nc=3, verbose=False)
    reader = UltralyticsDetector(grey)
    assert reader.example().images.shape[1] == 1
    assert len(reader.look(reader.example()).maps) == 3


class Namespace:
    """Settings without the gains, as older trainers left them."""

    data = "coco.yaml"


@pytest.mark.parametrize("settings", [None, {"box": 30.0, "imgsz": 640}, {}, Namespace()])
@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo26n.yaml"])
def test_losses_need_no_settings_and_leave_none(name, settings):
    """Models from YAML have none, those in checkpoints a dictionary."""
    trained, student = network(name), network(name)
    del student.args
    if settings is not None:
        student.args = settings
    if isinstance(settings, dict):
        trained.args.box = settings.get("box", trained.args.box)
    images, before = batch(scenes(), side=64), dict(vars(student))
    facts = frozenset({"positives"})
    reader = UltralyticsDetector(student)
    with FeatureTap(student, reader.taps | reader.taps_for(facts)) as tap:
        loss = reader.losses(images, None)
        torch.testing.assert_close(loss, trained(images)[0].sum())
        assert loss.requires_grad
        seen = reader.read(tap.read(), images, None, facts)
        assert len(seen.sampled.logits) >= 6  # although the model has no criterion
        assert vars(student).keys() == before.keys()
        assert all(vars(student)[k] is before[k] for k in ("args", "criterion") if k in before)
    if settings is None:
        assert not hasattr(student, "args")


def test_a_criterion_of_the_users_own_stays_unread():
    student, images = network("yolov8n.yaml"), batch(scenes(), side=64)
    reader = UltralyticsDetector(student)
    with FeatureTap(student, reader.taps | reader.taps_for(ALL)) as tap:
        student(images["img"])
        seen = reader.read(tap.read(), images, None, ALL)
    assert seen.sampled is None
    assert seen.assigned is None


def test_a_teacher_in_half_precision_takes_its_students_numbers():
    teacher = network("yolov8n.yaml").bfloat16().eval()
    reader = UltralyticsDetector(teacher)
    view = View(torch.rand(2, 3, 64, 64))
    assert len(reader.detections(view)) == 2
    dense = reader.dense(reader.look(view), ALL)
    assert dense.logits.dtype == torch.bfloat16
    assert dense.boxes.dtype == torch.float32
    whole = UltralyticsDetector(network("yolov8n.yaml").eval())
    expected = whole.dense(whole.look(view), ALL).boxes
    assert (dense.boxes - expected).abs().mean() < 1


def test_bytes_are_taken_as_the_numbers_they_stand_for():
    reader = UltralyticsDetector(network("yolov8n.yaml").eval())
    raw = (torch.rand(2, 3, 64, 64) * 255).round().byte()
    bytes_, numbers = View(raw), View(raw.float() / 255)
    with torch.no_grad():
        for a, b in zip(reader.look(bytes_).maps, reader.look(numbers).maps):
            assert torch.equal(a, b)
        for a, b in zip(reader.detections(bytes_), reader.detections(numbers)):
            assert torch.equal(a.boxes, b.boxes)


@pytest.mark.parametrize("settings", [None, {"imgsz": 640}])
def test_an_rt_detr_that_no_trainer_has_set_up_is_checked(settings):
    """Its loss reads ``model.nc``, which the trainer writes."""
    student, teacher = rt_detr(nc=NUM_CLASSES), rt_detr(nc=NUM_CLASSES)
    for network_ in (student, teacher):
        del network_.args, network_.nc
        if settings is not None:
            network_.args = settings
    kd = Distiller(student, teacher, small_loss(NUM_CLASSES, standardize=False))
    report = kd.check(batch(scenes(), side=64), verbose=False)
    assert report.terms["detection"].value > 0
    assert not [x for x in report.unchecked if "fails" in x]
    assert not hasattr(student, "nc")
    assert getattr(student, "args", None) is settings
