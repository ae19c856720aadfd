"""Real torchvision detectors: boxes in network-input pixels, soft labels, promises 1 to 4."""

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models.detection import retinanet_resnet50_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.ops import box_iou

from global_kd import Distiller, GlobalKnowledgeLoss
from global_kd.detectors import View, detector_of
from global_kd.functional import logit_loss, pool_boxes
from tests.small_loss import small_loss

from .detectors import KINDS, NUM_CLASSES, detector, scenes

BOTH = ("proposals", "ground_truth")


gk = partial(small_loss, NUM_CLASSES)


def train_step(student, kd, optimizer, images, targets):
    losses = student(images, targets)
    terms = kd(images, targets)
    optimizer.zero_grad()
    (sum(losses.values()) + sum(terms.values())).backward()
    optimizer.step()
    return losses, terms


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("boxes", BOTH)
def test_a_few_steps_of_training(kind, boxes):
    """All terms appear, are finite, move the student, and leave the teacher alone."""
    torch.manual_seed(0)
    student, teacher = detector(kind, 8), detector(kind, 12)
    keys, frozen = list(student.state_dict()), copy.deepcopy(teacher.state_dict())
    kd = Distiller(student, teacher, gk(boxes=boxes))
    optimizer = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=1e-3)
    teacher.train()  # somebody calls .train() on everything
    for step in range(4):
        _, terms = train_step(student, kd, optimizer, *scenes(seed=step))
        assert set(terms) == {"kd_foreground", "kd_background", "kd_relation", "kd_logits"}
        # A divergence of almost equal distributions may round to just below 0.
        assert all(v.isfinite() and v >= -1e-6 for v in terms.values())
        assert not any(m.training for m in teacher.modules())
    assert terms["kd_relation"] > 0
    assert terms["kd_logits"] != 0
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, frozen[k]) for k, v in teacher.state_dict().items())
    assert list(student.state_dict()) == keys
    assert {k.split(".")[0] for k in kd.state_dict()} == {"losses", "_extra_state"}
    buffer = io.BytesIO()
    torch.save(student.state_dict(), buffer)
    buffer.seek(0)
    bare = detector(kind, 8)
    bare.load_state_dict(torch.load(buffer, weights_only=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("boxes", BOTH)
def test_a_student_that_is_its_teacher_loses_nothing(kind, boxes):
    """Same network, identity adapters: every term is 0 and every robust weight 1."""
    torch.manual_seed(0)
    student = detector(kind)
    teacher = copy.deepcopy(student)
    kd = Distiller(student, teacher, gk(adapter="identity", boxes=boxes))
    images, targets = scenes()
    for _ in range(4):
        student(images, targets)
        terms = kd(images, targets)
    assert kd.loss.bank.valid.any()
    assert {k: pytest.approx(0, abs=1e-6) for k in terms} == {k: v.item() for k, v in terms.items()}
    _, omega = kd.weigh(images, targets)
    torch.testing.assert_close(omega, torch.ones(3, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_are_read_in_pixels_of_the_network_input(kind):
    """A bright square in the image: exactly the cells that see it are pooled, after the resize."""
    student, teacher = detector(kind, 3), detector(kind, 3)
    with torch.no_grad():  # the finest level is the brightness of each 4x4 patch
        student.backbone.stem.weight.fill_(1 / 48)
        student.backbone.stem.bias.zero_()
    mean, std = (torch.tensor(getattr(student.transform, n)) for n in ("image_mean", "image_std"))
    kd = Distiller(student, teacher, gk())
    # 32x48 -> 64x96: the square of 8..24 x 16..40 becomes 16..48 x 32..80. The second image pads.
    dark = mean[:, None, None].expand(3, 32, 48)
    bright = dark.clone()
    bright[:, 8:24, 16:40] += 1
    targets = [{"boxes": torch.tensor([[16.0, 8, 40, 24]]), "labels": torch.tensor([1])}]
    images = [bright, dark[:, :, :32].contiguous()]
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    packed, _ = kd.weigh(
        images,
        [targets[0], empty],
    )
    assert packed.boxes.tolist() == [[32, 16, 80, 48]]
    assert packed.image_index.tolist() == [0]
    with torch.no_grad():
        seen = student.backbone(student.transform(images)[0].tensors)["0"]
    full = (1 / std).mean().item()  # brightness + 1, normalised, averaged over the patch
    inside = pool_boxes(seen, packed.boxes + torch.tensor([4, 4, -4, -4]), packed.image_index, 4)
    assert inside.tolist()[0] == pytest.approx([full] * inside.shape[1], rel=1e-5)
    around = pool_boxes(seen, packed.boxes, packed.image_index, 4)
    assert around[0, 0] > 0.8 * full  # bilinear resizing blurs the outermost cells only
    rest = seen[0, 0].clone()
    rest[3:13, 7:21] = 0  # the square and its blur
    assert rest.abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_detections_are_the_models_own_in_pixels_of_the_view(kind):
    torch.manual_seed(0)
    model = detector(kind, score_thresh=0.0) if kind != "faster_rcnn" else detector(kind)
    if kind == "faster_rcnn":
        model.roi_heads.score_thresh = 0.0
    reader = detector_of(model)
    images = [torch.rand(3, 32, 48), torch.rand(3, 32, 32)]  # both are resized inside
    model.eval()
    transformed = model.transform(images)[0]
    found = reader.detections(View(transformed.tensors, transformed.image_sizes))
    expected = model(images)
    sizes = transformed.image_sizes
    for mine, theirs, image, (h, w) in zip(found, expected, images, sizes, strict=True):
        assert len(theirs["boxes"]) > 0
        scale = torch.tensor([w / image.shape[2], h / image.shape[1]]).repeat(2)
        torch.testing.assert_close(mine.boxes, theirs["boxes"] * scale, rtol=1e-4, atol=1e-3)
        assert torch.equal(mine.scores, theirs["scores"])
        assert torch.equal(mine.labels, theirs["labels"])


def test_a_teacher_with_masks_for_a_student_without():
    """Mask R-CNN has no loss on targets without masks; everything else goes on."""
    torch.manual_seed(0)
    student, teacher = detector("faster_rcnn"), detector("faster_rcnn", 12)
    teacher.roi_heads.mask_roi_pool = teacher.roi_heads.box_roi_pool
    teacher.roi_heads.mask_head = nn.Conv2d(12, 12, 1)
    teacher.roi_heads.mask_predictor = nn.Conv2d(12, NUM_CLASSES, 1)
    kd = Distiller(student, teacher, gk())
    images, targets = scenes()
    student(images, targets)
    assert "kd_logits" in kd(images, targets)
    assert kd._pair.teacher.losses(images, targets) is None
    report = kd.check(images, targets, verbose=False)
    assert not any("detection loss:" in x for x in report.facts)


def test_soft_labels_of_dense_detectors_with_unlike_levels():
    """Only locations on grids that both have are compared, each with its own twin."""
    torch.manual_seed(0)
    student, teacher = detector("retinanet"), detector("retinanet")
    # A teacher without the finest level, and with anchors for what it has.
    forward = teacher.backbone.forward
    teacher.backbone.forward = lambda x: dict(list(forward(x).items())[1:])
    seen, seen_targets = {}, []
    kd = Distiller(student, teacher, gk())
    assert kd.loss.rdm.strides == (8, 16)
    kd.loss.rdm.register_forward_pre_hook(
        lambda module, args, kwargs: (
            (seen.update(kwargs), seen_targets.append(args[2]))[:0] or None
        ),
        with_kwargs=True,
    )
    images, targets = scenes()
    small = torch.tensor([[8.0, 8, 15, 15]])  # an object of the level that the teacher lacks
    targets[0] = {
        k: torch.cat([small.to(v) if k == "boxes" else v[:1], v]) for k, v in targets[0].items()
    }
    recorded = {}
    student.head.classification_head.register_forward_hook(
        lambda m, args, out: recorded.update(student=out)
    )
    compute = student.head.compute_loss

    def count(truth, outputs, anchors, matched):
        recorded["positives"] = sum(int((m >= 0).sum()) for m in matched)
        return compute(truth, outputs, anchors, matched)

    student.head.compute_loss = count
    student(images, targets)
    kd(images, targets)
    with torch.no_grad():
        batch = student.transform(images, targets)
        theirs = teacher.head.classification_head(list(teacher.backbone(batch[0].tensors).values()))
    finest = batch[0].tensors.shape[2] // 4 * (batch[0].tensors.shape[3] // 4)
    mine = recorded["student"][:, finest:]
    assert mine.shape == theirs.shape
    rows, boxes = seen["student_logits"].detach(), seen["logit_box"]
    assert 0 < len(rows) < recorded["positives"]  # those on the finest level are left out
    assert len(rows) == len(boxes)
    images_of_boxes = seen_targets[0].image_index[boxes].tolist()
    for image, row, twin in zip(images_of_boxes, rows, seen["teacher_logits"], strict=True):
        places = (mine[image] == row).all(dim=1).nonzero()[:, 0]
        assert len(places) > 0  # the row is of the image of its box
        assert any(torch.allclose(twin, theirs[image, place]) for place in places)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_teacher_at_another_scale_gives_no_soft_labels(scale):
    torch.manual_seed(0)
    student, teacher = detector("retinanet"), detector("retinanet")
    kd = Distiller(student, teacher, gk(), teacher_scale=scale)
    images, targets = scenes()
    student(images, targets)
    assert ("kd_logits" in kd(images, targets)) == (scale == 1)


def test_proposals_are_the_students_positives_with_their_labels():
    torch.manual_seed(0)
    student, teacher = detector("faster_rcnn"), detector("faster_rcnn")
    seen = {}
    loss = gk()
    kd = Distiller(student, teacher, loss)
    images, targets = scenes()
    sampled = []
    select = student.roi_heads.select_training_samples

    def spy(proposals, truth):
        result = select(proposals, truth)
        sampled.append(result)
        return result

    student.roi_heads.select_training_samples = spy
    loss.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(
            instances=args[2], targets=kwargs["positives"].proposals
        ),
        with_kwargs=True,
    )
    student(images, targets)
    kd(images, targets)
    proposals, matched, labels, _ = sampled[0]
    positive = [x > 0 for x in labels]
    assert sum(int(p.sum()) for p in positive) >= 2
    torch.testing.assert_close(
        seen["targets"].boxes, torch.cat([p[m] for p, m in zip(proposals, positive, strict=True)])
    )
    assert torch.equal(
        seen["targets"].labels, torch.cat([x[m] for x, m in zip(labels, positive, strict=True)])
    )
    _, truth = student.transform(images, targets)
    for i in range(3):
        mine = seen["targets"].boxes[seen["targets"].image_index == i]
        if len(mine):
            assert (box_iou(mine, truth[i]["boxes"]).amax(dim=1) >= 0.5).all()
    assert len(seen["instances"]) == 4  # prototypes are made of the ground truth


@pytest.mark.parametrize("boxes", BOTH)
def test_two_stage_soft_labels_compare_both_heads_on_the_same_proposals(boxes):
    torch.manual_seed(0)
    student, teacher = detector("faster_rcnn"), detector("faster_rcnn")
    kd = Distiller(student, teacher, gk(logits=1.0, robust=("imitation", "relation"), boxes=boxes))
    images, targets = scenes()
    recorded = {}
    student.roi_heads.box_roi_pool.register_forward_hook(
        lambda m, args, out: recorded.update(proposals=args[1], sizes=args[2])
    )
    student.roi_heads.box_predictor.register_forward_hook(
        lambda m, args, out: recorded.update(logits=out[0])
    )
    student(images, targets)
    terms = kd(images, targets)
    truth = student.transform(images, targets)[1]
    _, labels = student.roi_heads.assign_targets_to_proposals(
        recorded["proposals"], [t["boxes"] for t in truth], [t["labels"] for t in truth]
    )
    with torch.no_grad():  # the teacher's head on all proposals, its own way
        tensors = student.transform(images)[0].tensors
        heads = teacher.roi_heads
        features = teacher.backbone(tensors)
        pooled = heads.box_roi_pool(features, recorded["proposals"], recorded["sizes"])
        teacher_logits = heads.box_predictor(heads.box_head(pooled))[0]
    positive = torch.cat(labels) > 0
    expected = logit_loss(recorded["logits"][positive], teacher_logits[positive])
    torch.testing.assert_close(terms["kd_logits"], expected)


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_dense_soft_labels_lie_on_the_locations_the_detector_trains_as_positive(kind):
    torch.manual_seed(0)
    student, teacher = detector(kind), detector(kind)
    kd = Distiller(student, teacher, gk())
    seen = {}
    kd.loss.rdm.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(targets=args[2], **kwargs), with_kwargs=True
    )
    images, targets = scenes()
    assigned = []
    original = student.head.compute_loss

    def spy(truth, outputs, anchors, matched):
        assigned.append((outputs["cls_logits"], matched))
        return original(truth, outputs, anchors, matched)

    student.head.compute_loss = spy
    student(images, targets)
    kd(images, targets)
    logits, matched = assigned[0]  # a second call would be the reader's, which must not happen
    assert len(assigned) == 1
    positive = torch.stack(matched) >= 0
    assert positive.any()
    assert torch.equal(seen["student_logits"], logits[positive])
    assert seen["teacher_logits"].shape == seen["student_logits"].shape
    assert not seen["teacher_logits"].requires_grad
    image_of_row = positive.nonzero()[:, 0]
    assert torch.equal(seen["targets"].image_index[seen["logit_box"]], image_of_row)
    assert kd.loss.rdm.activation == "sigmoid"


@pytest.mark.parametrize("kind", KINDS)
def test_all_weights_zero_trains_bit_identically_to_no_distillation(kind):
    def run(distil):
        torch.manual_seed(0)
        student = detector(kind)
        teacher = copy.deepcopy(student)
        kd = None
        if distil:
            kd = Distiller(student, teacher, gk(foreground=0, background=0, relation=0, logits=0))
        optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)
        for step in range(3):
            images, targets = scenes(seed=step)
            losses = student(images, targets)
            if kd is not None:
                losses |= kd(images, targets)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
        return student.state_dict(), torch.get_rng_state()

    (plain, random), (distilled, other) = run(False), run(True)
    assert all(torch.equal(v, distilled[k]) for k, v in plain.items())
    assert torch.equal(random, other)


def test_distilling_does_not_disturb_the_students_own_randomness():
    """With terms on, the sampler still draws what it would have drawn."""
    states = []
    for distil in (False, True):
        torch.manual_seed(0)
        student, teacher = detector("faster_rcnn"), detector("faster_rcnn", 12)
        kd = Distiller(student, teacher, gk()) if distil else None
        images, targets = scenes()
        for _ in range(3):
            student(images, targets)
            if kd is not None:
                kd(images, targets)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_detach_leaves_no_trace():
    student, teacher = detector("faster_rcnn"), detector("faster_rcnn")
    kd = Distiller(student, teacher, gk())
    kd.detach()
    for module in (*student.modules(), *teacher.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    images, targets = scenes()
    student(images, targets)
    with pytest.raises(RuntimeError, match="after detach"):
        kd(images, targets)


def test_resume_is_bit_identical():
    def start():
        torch.manual_seed(0)
        student, teacher = detector("faster_rcnn"), detector("faster_rcnn", 12)
        kd = Distiller(student, teacher, gk(total_steps=6))
        parameters = [*student.parameters(), *kd.parameters()]
        return student, kd, torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

    def run(student, kd, optimizer, steps):
        for step in steps:
            train_step(student, kd, optimizer, *scenes(seed=step))

    whole = start()
    run(*whole, range(6))
    for cut in (1, 3):
        parts = start()
        run(*parts, range(cut))
        buffer = io.BytesIO()
        torch.save([*(x.state_dict() for x in parts), torch.get_rng_state()], buffer)
        buffer.seek(0)
        *saved, random = torch.load(buffer, weights_only=True)
        parts = start()
        for x, state in zip(parts, saved, strict=True):
            x.load_state_dict(state)
        torch.set_rng_state(random)
        run(*parts, range(cut, 6))
        for a, b in zip(whole[:2], parts[:2], strict=True):
            for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
                same = torch.equal(x, y) if isinstance(x, torch.Tensor) else str(x) == str(y)
                assert same, name


def test_refresh_is_one_pass_in_eval_mode_that_finds_instances_by_id():
    torch.manual_seed(0)
    student, teacher = detector("faster_rcnn"), detector("faster_rcnn", 12)
    student.train()
    kd = Distiller(student, teacher, gk(refresh_every=None))
    loader, start = [], 0
    for seed in range(3):
        images, targets = scenes(seed=seed)
        for t in targets:
            t["ids"] = torch.arange(start, start + len(t["boxes"]))
            start += len(t["boxes"])
        loader.append((images, targets))
    kd.refresh(loader, progress=False)
    assert student.training  # its mode came back
    bank = kd.loss.bank
    assert bank.valid.any()
    kept = bank.ids[bank.valid]
    assert ((kept >= 0) & (kept < start)).all()
    # The prototype of an id is that box, pooled from the network in eval mode.
    level, label, slot = bank.valid.nonzero()[0].tolist()
    wanted = bank.ids[level, label, slot]
    for images, targets in loader:
        student.eval()
        transformed, truth = student.transform(images, targets)
        for i, t in enumerate(truth):
            for box, number in zip(t["boxes"], t["ids"], strict=True):
                if number == wanted:
                    with torch.no_grad():
                        maps = list(student.backbone(transformed.tensors).values())
                    index = torch.tensor([i])
                    row = pool_boxes(maps[level], box[None], index, kd.loss.rdm.strides[level])[0]
        student.train()
    torch.testing.assert_close(bank.student[level, label, slot], row)


def test_another_normalisation_of_the_teacher_is_respected():
    """The teacher gets its own mean and scale; its padding stays zero."""
    student = detector("retinanet")
    teacher = detector("retinanet", image_mean=[0, 0, 0], image_std=[1, 1, 1])
    kd = Distiller(student, teacher, gk())
    images, targets = scenes()
    expected = teacher.transform(images)[0]
    got = []
    teacher.backbone.register_forward_pre_hook(lambda module, args: got.append(args[0]))
    student(images, targets)
    kd(images, targets)
    torch.testing.assert_close(got[0], expected.tensors, atol=1e-6, rtol=1e-5)


def test_unlike_detectors_share_features_but_no_logits():
    torch.manual_seed(0)
    student, teacher = detector("retinanet"), detector("faster_rcnn", 12)
    kd = Distiller(student, teacher, gk())
    images, targets = scenes()
    student(images, targets)
    assert set(kd(images, targets)) == {"kd_foreground", "kd_background", "kd_relation"}


def test_what_does_not_fit_is_named():
    images, targets = scenes()
    student = detector("faster_rcnn")
    with pytest.raises(ValueError, match="expected 4 class logits like the student's, but got 7"):
        Distiller(student, detector("faster_rcnn", num_classes=7), gk())
    kd = Distiller(student, detector("faster_rcnn"), gk())
    with pytest.raises(ValueError, match="never fired; run this .* itself first"):
        kd(images, targets)
    student.eval()
    student(images)
    with pytest.raises(ValueError, match="in train mode"):
        kd(images, targets)
    student.train()
    few = GlobalKnowledgeLoss(2, total_steps=9)
    kd = Distiller(student, detector("faster_rcnn"), few)
    above = [dict(t, labels=t["labels"].clamp(min=3)) for t in targets]
    student(images, above)
    with pytest.raises(ValueError, match="labels: expected values below 2, but got 3"):
        kd(images, above)
    with pytest.raises(ValueError, match="boxes: expected one of 'proposals', 'ground_truth'"):
        Distiller(student, student, gk(boxes="anchors"))
    with pytest.raises(ValueError, match="Conv2d is not a detector of a framework known here"):
        Distiller(nn.Conv2d(3, 3, 1), detector("fcos"), gk())
    kd = Distiller(student, detector("faster_rcnn"), gk(total_steps=None))
    student(images, targets)
    with pytest.warns(UserWarning, match="total_steps"):
        kd(images, targets)


def test_adapters_forgotten_in_the_optimizer_are_reported():
    student, teacher = detector("retinanet", 4), detector("retinanet", 4)
    kd = Distiller(student, teacher, gk(relation=0, logits=0, robust=False, total_steps=64))
    images, targets = scenes(sizes=((32, 32), (32, 32)))
    with pytest.warns(UserWarning, match=r"give\s+kd.parameters\(\) to the optimizer"):
        for _ in range(64):
            student(images, targets)
            kd(images, targets)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_between_steps_or_forward_and_kd_is_no_trouble(kind):
    torch.manual_seed(0)
    student, teacher = detector(kind), detector(kind)
    kd = Distiller(student, teacher, gk())
    images, targets = scenes()
    other = [x.flip(2) for x in images[:2]]

    def run(evaluate):
        torch.manual_seed(1)
        kd.loss.step = 0
        student(images, targets)
        evaluate()
        terms = kd(images, targets)
        evaluate()
        return {name: x.item() for name, x in terms.items()}

    def evaluate():
        student.eval()
        with torch.no_grad():
            student(other)
        student.train()

    plain = run(lambda: None)
    assert len(plain) == 4
    assert run(evaluate) == plain


@pytest.mark.slow
def test_published_models_with_resnet_and_fpn():
    """Five levels with the pooled one, frozen batch norm, 91 classes, unlike backbones."""
    torch.manual_seed(0)
    images, targets = scenes()

    def faster(name):
        backbone = resnet_fpn_backbone(backbone_name=name, weights=None, trainable_layers=5)
        return FasterRCNN(backbone, 91, min_size=64, max_size=96)

    student = faster("resnet18")
    kd = Distiller(student, faster("resnet34"), GlobalKnowledgeLoss(91, total_steps=2))
    assert kd.loss.rdm.strides == (4, 8, 16, 32, 64)
    student(images, targets)
    sum(kd(images, targets).values()).backward()
    student = retinanet_resnet50_fpn(weights=None, weights_backbone=None, min_size=64, max_size=96)
    kd = Distiller(student, faster("resnet18"), GlobalKnowledgeLoss(91, total_steps=2))
    assert kd.loss.rdm.strides == (8, 16, 32, 64)  # P3 to P6; P2 and P7 have no partner
    student(images, targets)
    sum(kd(images, targets).values()).backward()
    assert all(p.grad is not None for p in kd.parameters())


def test_soft_labels_alone_are_fine_in_a_batch_without_boxes(recwarn):
    torch.manual_seed(0)
    student, teacher = detector("retinanet", 4), detector("retinanet", 4)
    kd = Distiller(student, teacher, gk(foreground=0, background=0, relation=0, logits=5))
    images, targets = scenes()
    empty = [{name: x[:0] for name, x in t.items()} for t in targets]
    student(images, empty)
    terms = kd(images, empty)
    assert not any(float(x) for x in terms.values())
    assert not [x for x in recwarn if "nothing is distilled" in str(x.message)]
