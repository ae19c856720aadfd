"""Real, narrow Detectron2 detectors: boxes in network-input pixels, soft labels, promises 1-4."""

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks.detector_waits import places
from benchmarks.waits import makes_wait
from global_kd import Distiller, GlobalKnowledgeLoss, Pixels
from global_kd.functional import logit_loss
from tests.small_loss import small_loss

from .cases import Scene, scenes
from .cases_detectron2 import NUM_CLASSES, build, config, mapped, step, tame

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.structures import Instances, RotatedBoxes  # noqa: E402
from detectron2.utils.events import EventStorage  # noqa: E402

from global_kd.detectors.detectron2 import Detectron2Detector  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

ZOO = {
    "faster": "faster_rcnn_R_50_FPN_1x",
    "mask": "faster_rcnn_R_50_FPN_1x",
    "cascade": "faster_rcnn_R_50_FPN_1x",
    "dc5": "faster_rcnn_R_50_DC5_1x",
    "c4": "faster_rcnn_R_50_C4_1x",
    "retinanet": "retinanet_R_50_FPN_1x",
    "fcos": "retinanet_R_50_FPN_1x",
}
KINDS = tuple(ZOO)
TWO_STAGE = KINDS[:5]
DENSE = KINDS[5:]
SIZES = ((64, 96), (96, 64), (64, 64))


def tiny_config(kind, width=2, num_classes=NUM_CLASSES):
    cfg = config(ZOO[kind], num_classes, side=64)
    cfg.INPUT.MAX_SIZE_TRAIN = 96
    resnet = cfg.MODEL.RESNETS
    resnet.STEM_OUT_CHANNELS = resnet.WIDTH_PER_GROUP = width
    resnet.RES2_OUT_CHANNELS = 4 * width
    cfg.MODEL.FPN.OUT_CHANNELS = 8 * width
    cfg.MODEL.RETINANET.NUM_CONVS = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM, cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 16, 4
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV, cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 1, 8
    cfg.MODEL.RPN.CONV_DIMS = [8]
    cfg.MODEL.MASK_ON = kind == "mask"
    if kind == "cascade":
        cfg.MODEL.ROI_HEADS.NAME = "CascadeROIHeads"
        cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    return cfg


def fcos(cfg):
    from detectron2.modeling.backbone import build_backbone
    from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead

    backbone = build_backbone(cfg)
    shapes = [backbone.output_shape()[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
    classes = cfg.MODEL.RETINANET.NUM_CLASSES
    return FCOS(
        backbone=backbone,
        head=FCOSHead(input_shape=shapes, num_classes=classes, conv_dims=[32], norm="GN"),
        head_in_features=cfg.MODEL.RETINANET.IN_FEATURES,
        num_classes=classes,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )


def detector(kind, width=2, num_classes=NUM_CLASSES):
    """A narrow detector whose class logits say something before any training."""
    cfg = tiny_config(kind, width, num_classes)
    if kind == "fcos":
        model = tame(fcos(cfg))
        nn.init.normal_(model.head.cls_score.weight, std=0.1)
        return model.train()
    model = build(cfg)
    for name, parameter in model.named_parameters():
        if "cls_score" in name and name.endswith("weight"):
            nn.init.normal_(parameter, std=0.1)
    return model


def batch(kind="faster", seed=0, sizes=SIZES):
    return mapped(tiny_config(kind), scenes(sizes, NUM_CLASSES, seed))


gk = partial(small_loss, NUM_CLASSES, finest_scale=24)


def train_step(student, kd, optimizer, images):
    losses, terms = step(student, (images,)), kd(images)
    optimizer.zero_grad()
    (losses + sum(terms.values())).backward()
    optimizer.step()
    return terms


def spy(module):
    """What a module is called with from now on, as (args, kwargs)."""
    calls = []
    module.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_steps_of_training(kind):
    """All terms appear, are finite, move the student, and leave the teacher alone."""
    torch.manual_seed(0)
    student, teacher = detector(kind), detector(kind, 4)
    keys, frozen = list(student.state_dict()), copy.deepcopy(teacher.state_dict())
    before = copy.deepcopy(student.state_dict())
    kd = Distiller(student, teacher, gk())
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([*parameters, *kd.parameters()], lr=1e-5)
    teacher.train()  # somebody calls .train() on everything
    for i in range(3):
        terms = train_step(student, kd, optimizer, batch(kind, seed=i))
        assert set(terms) == {"kd_foreground", "kd_background", "kd_relation", "kd_logits"}
        assert all(v.isfinite() and v >= -1e-6 for v in terms.values())
        assert not any(m.training for m in teacher.modules())
    assert terms["kd_relation"] > 0
    assert terms["kd_logits"] > 0
    assert any(not torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, frozen[k]) for k, v in teacher.state_dict().items())
    assert list(student.state_dict()) == keys
    assert {k.split(".")[0] for k in kd.state_dict()} == {"losses", "_extra_state"}
    buffer = io.BytesIO()
    torch.save(student.state_dict(), buffer)
    buffer.seek(0)
    detector(kind).load_state_dict(torch.load(buffer, weights_only=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("boxes", ["proposals", "ground_truth"])
def test_a_student_that_is_its_teacher_loses_nothing(kind, boxes):
    """Same network, identity adapters: every term is 0 and every robust weight 1."""
    torch.manual_seed(0)
    student = detector(kind)
    kd = Distiller(student, copy.deepcopy(student), gk(adapter="identity", boxes=boxes))
    images = batch(kind)
    for _ in range(3):
        step(student, (images,))
        terms = kd(images)
    assert kd.loss.bank.valid.any()
    assert {k: pytest.approx(0, abs=1e-6) for k in terms} == {k: v.item() for k, v in terms.items()}
    packed, omega = kd.weigh(images)
    assert len(packed) == 4
    torch.testing.assert_close(omega, torch.ones_like(omega))


@pytest.mark.parametrize("kind", ["faster", "retinanet", "fcos"])
def test_a_step_asks_once_how_many_objects_there_are(kind):
    """Whatever else would make a GPU's host wait is in Detectron2's own code."""
    torch.manual_seed(0)
    student = detector(kind)
    kd = Distiller(student, detector(kind, 4), gk(refresh_every=None))
    images = batch(kind)
    for _ in range(2):  # the first step looks at values on any device
        step(student, (images,))
        seen = places(partial(kd, images), makes_wait)
    ours = {place: n for place, n in seen.items() if place.startswith("global_kd")}
    assert ours == {"global_kd/detectors/detectron2.py": 1}


def squares():
    """Two dark images of unlike sizes; a bright square in the first, two in the second."""
    first, second = torch.full((3, 40, 60), 0.1), torch.full((3, 50, 40), 0.1)
    first[:, 10:30, 20:50] = 0.9
    second[:, 0:20, 5:25] = 0.9
    second[:, 30:45, 15:40] = 0.9
    return [
        Scene(first, torch.tensor([[20.0, 10, 50, 30]]), torch.tensor([2])),
        Scene(
            second,
            torch.tensor([[5.0, 0, 25, 20], [15, 30, 40, 45]]),
            torch.tensor([0, 1]),
        ),
    ]


@pytest.mark.parametrize("kind", ["faster", "retinanet", "c4"])
@pytest.mark.parametrize("training", [True, False])
def test_boxes_are_in_pixels_of_the_network_input(kind, training, monkeypatch):
    """Bright squares in the files, resized by the mapper, padded by the model: inside is bright."""
    student = detector(kind)
    kd = Distiller(student, detector(kind), gk())
    # 40 x 60 -> 64 x 96, 50 x 40 -> 80 x 64, both padded to 96 x 96 by pyramids.
    images = mapped(tiny_config(kind), squares())
    seen = []
    for name in ("read", "observe"):
        method = getattr(kd._pair.student, name)
        monkeypatch.setattr(
            kd._pair.student, name, lambda *a, method=method: seen.append(method(*a)) or seen[-1]
        )
    if training:
        step(student, (images,))
        kd(images)
    else:
        packed, _ = kd.weigh(images)
        assert packed is seen[0].truth
    [(look, truth)] = [(s.look, s.truth) for s in seen]
    assert look.view.size == ((96, 96) if kind != "c4" else (80, 96))
    assert torch.as_tensor(look.view.sizes).tolist() == [[64, 96], [80, 64]]
    assert truth.boxes.tolist() == [[32, 16, 80, 48], [8, 0, 40, 32], [24, 48, 64, 72]]
    assert truth.image_index.tolist() == [0, 1, 1]
    assert truth.labels.tolist() == [2, 0, 1]  # as annotated: no background in front
    pixels = look.view.images + student.pixel_mean  # std is 1
    dark = torch.ones(2, *look.view.size, dtype=torch.bool)
    for image, (x1, y1, x2, y2) in zip(truth.image_index, truth.boxes.int().tolist()):
        square = pixels[image, :, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2]  # but for the resize's blur
        torch.testing.assert_close(square, torch.full_like(square, 230.0))
        dark[image, max(0, y1 - 2) : y2 + 2, max(0, x1 - 2) : x2 + 2] = False
    inside = look.view.inside()
    rest = pixels.transpose(0, 1)[:, dark & inside]
    torch.testing.assert_close(rest, torch.full_like(rest, 26.0))
    assert (look.view.images.transpose(0, 1)[:, ~inside] == 0).all()


@pytest.mark.parametrize(
    ("kind", "strides", "channels"),
    [
        ("faster", (4, 8, 16, 32, 64), [16] * 5),
        ("retinanet", (8, 16, 32, 64, 128), [16] * 5),
        ("dc5", (16,), [64]),
        ("c4", (16,), [32]),
    ],
)
def test_levels_go_from_fine_to_coarse_whatever_the_order_of_the_backbone(kind, strides, channels):
    student, teacher = detector(kind), detector(kind, 4)
    for model in (student, teacher):
        model.backbone.register_forward_hook(lambda m, a, out: dict(reversed(out.items())))
    kd = Distiller(student, teacher, gk())
    assert kd.loss.rdm.strides == strides
    maps = kd._pair.student.observe(batch(kind), None).look.maps
    assert [x.shape[1] for x in maps] == channels
    # 96 x 96 after padding
    assert [x.shape[-1] for x in maps] == [-(-96 // s) for s in strides]


def test_a_square_moves_its_own_cells_most():
    """The map's axes are the image's: what a bright square changes lies in its box."""
    torch.manual_seed(0)
    reader = Detectron2Detector(detector("faster").eval())
    images = mapped(tiny_config("faster"), squares())
    dark = [{**x, "image": torch.full_like(x["image"], 26)} for x in images]
    with torch.no_grad():
        seen, without = reader.observe(images, None), reader.observe(dark, None)
    change = (seen.look.maps[0] - without.look.maps[0]).abs().sum(dim=1)
    x1, y1, x2, y2 = (seen.truth.boxes[0] / 4).int().tolist()
    mask = torch.zeros_like(change[0], dtype=torch.bool)
    mask[y1:y2, x1:x2] = True
    assert change[0][mask].mean() > 2 * change[0][~mask].mean()


@pytest.mark.parametrize("kind", TWO_STAGE)
def test_proposals_and_soft_labels_are_those_the_student_trains_on(kind):
    torch.manual_seed(0)
    student, teacher = detector(kind), detector(kind)
    kd = Distiller(student, teacher, gk(robust=("imitation", "relation")))
    sampled, recorded = [], {}
    sample = student.roi_heads.label_and_sample_proposals

    def record(proposals, truth):
        sampled.extend(sample(proposals, truth))
        return sampled

    student.roi_heads.label_and_sample_proposals = record
    stages = student.roi_heads.box_predictor
    predictor = stages[0] if kind == "cascade" else stages
    predictor.register_forward_hook(lambda m, a, out: recorded.update(logits=out[0]))
    calls, outer = spy(kd.loss.rdm), spy(kd.loss)
    images = batch(kind)
    step(student, (images,))
    terms = kd(images)
    [(args, kwargs)] = calls
    labels = torch.cat([x.gt_classes for x in sampled])
    positive = labels < NUM_CLASSES
    assert positive.sum() >= 4 and not positive.all()
    corners = torch.cat([x.proposal_boxes.tensor for x in sampled])
    torch.testing.assert_close(args[2].boxes, corners[positive])
    assert torch.equal(args[2].labels, labels[positive])
    image = torch.cat([torch.full_like(x.gt_classes, i) for i, x in enumerate(sampled)])
    assert torch.equal(args[2].image_index, image[positive])
    assert outer[0][0][2].boxes.shape == (4, 4)  # prototypes are made of the ground truth
    assert torch.equal(kwargs["student_logits"], recorded["logits"][positive])
    # The teacher's own forward on all the sampled proposals.
    teacher_logits = []
    stages = teacher.roi_heads.box_predictor
    predictor = stages[0] if kind == "cascade" else stages
    predictor.register_forward_hook(lambda m, a, out: teacher_logits.append(out[0]))
    with torch.no_grad():
        padded = teacher.preprocess_image(images)
        given = [Instances(x.image_size, proposal_boxes=x.proposal_boxes) for x in sampled]
        for x in given:
            x.objectness_logits = torch.zeros(len(x))
        teacher.roi_heads(padded, teacher.backbone(padded.tensor), given)
    assert kwargs["teacher_logits"].shape[1] == NUM_CLASSES + 1  # the last is the background
    torch.testing.assert_close(kwargs["teacher_logits"], teacher_logits[0][positive])
    expected = logit_loss(recorded["logits"][positive], teacher_logits[0][positive])
    torch.testing.assert_close(terms["kd_logits"], kd.loss.rdm.logits * expected)


@pytest.mark.parametrize("kind", TWO_STAGE)
def test_each_proposal_knows_its_box(kind):
    torch.manual_seed(0)
    student = detector(kind)
    kd = Distiller(student, detector(kind), gk(boxes="ground_truth"))
    calls = spy(kd.loss.rdm)
    images = batch(kind)
    step(student, (images,))
    positives = kd._pair.student.read(
        kd._tap.read(), images, None, frozenset({"positives"})
    ).sampled
    step(student, (images,))
    kd(images)
    [(args, kwargs)] = calls
    truth = args[2]
    assert len(truth) == 4
    mine = positives.proposals
    assert torch.equal(truth.labels[positives.box], mine.labels)
    assert torch.equal(truth.image_index[positives.box], mine.image_index)
    for box, proposal in zip(truth.boxes[positives.box], mine.boxes):
        corner, end = torch.maximum(box[:2], proposal[:2]), torch.minimum(box[2:], proposal[2:])
        inter = (end - corner).clamp(min=0).prod()
        areas = (box[2:] - box[:2]).prod() + (proposal[2:] - proposal[:2]).prod()
        assert inter / (areas - inter) >= 0.5


def by_anchor(model, images):
    """Class logits (B, anchors, K) of all levels and the anchors, by Detectron2's own helpers."""
    with torch.no_grad():
        features = model.backbone(model.preprocess_image(images).tensor)
        maps = [features[name] for name in model.head_in_features]
        [levels] = model._transpose_dense_predictions([model.head(maps)[0]], [NUM_CLASSES])
        return torch.cat(levels, dim=1), model.anchor_generator(maps)


@pytest.mark.parametrize("kind", DENSE)
def test_dense_soft_labels_lie_on_the_anchors_the_detector_trains_as_objects(kind):
    torch.manual_seed(0)
    student, teacher = detector(kind), detector(kind)
    kd = Distiller(student, teacher, gk())
    assert kd.loss.rdm.activation == "sigmoid"
    calls = spy(kd.loss.rdm)
    images = batch(kind)
    step(student, (images,))
    kd(images)
    [(args, kwargs)] = calls

    (mine, anchors), (theirs, _) = by_anchor(student, images), by_anchor(teacher, images)
    labels, boxes = student.label_anchors(anchors, [x["instances"] for x in images])
    labels, boxes = torch.stack(labels), torch.stack(boxes)
    positive = (labels >= 0) & (labels < NUM_CLASSES)
    assert positive.sum() >= 4
    torch.testing.assert_close(kwargs["student_logits"], mine[positive])
    torch.testing.assert_close(kwargs["teacher_logits"], theirs[positive])
    assert kwargs["student_logits"].requires_grad and not kwargs["teacher_logits"].requires_grad
    truth, box = args[2], kwargs["logit_box"]
    torch.testing.assert_close(truth.boxes[box], boxes[positive])
    assert torch.equal(truth.labels[box], labels[positive])
    assert torch.equal(truth.image_index[box], positive.nonzero()[:, 0])


def test_dense_levels_that_only_one_side_has_are_left_out():
    """Levels pair by stride; the rest of the positives has no soft label."""
    torch.manual_seed(0)
    cfg = tiny_config("retinanet")
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p7"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = cfg.MODEL.ANCHOR_GENERATOR.SIZES[::4]
    student, teacher = detector("retinanet"), build(cfg)
    kd = Distiller(student, teacher, gk())
    calls = spy(kd.loss.rdm)
    boxes = torch.tensor([[4.0, 4, 36, 36], [0, 0, 96, 96]])
    images = mapped(
        tiny_config("retinanet"), [Scene(torch.rand(3, 96, 96), boxes, torch.tensor([0, 1]))]
    )
    step(student, (images,))
    positives = kd._pair.student.read(
        kd._tap.read(), images, None, frozenset({"positives"})
    ).sampled
    step(student, (images,))
    kd(images)
    [(_, kwargs)] = calls
    mask, grids = positives.raw
    # 64 px: P6 and P7 have one cell each, and only the latter is the teacher's, too.
    cells = [(g.stride, g.height, g.width, g.anchors) for g in grids]
    assert cells == [(8, 8, 8, 9), (16, 4, 4, 9), (32, 2, 2, 9), (64, 1, 1, 9), (128, 1, 1, 9)]
    known = torch.cat([torch.full((g.rows,), g.stride in (8, 128)) for g in grids])
    rows = known.expand_as(mask)[mask]
    assert not rows.all() and rows.any()
    assert torch.equal(kwargs["student_logits"], positives.logits[rows])
    theirs, _ = by_anchor(teacher, images)
    torch.testing.assert_close(kwargs["teacher_logits"], theirs[mask[:, known]])


def test_box_heads_with_sigmoids_compare_only_the_foreground():
    torch.manual_seed(0)

    def model():
        cfg = tiny_config("faster")
        cfg.MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE = True
        return build(cfg)

    student = model()
    kd = Distiller(student, model(), gk())
    assert kd.loss.rdm.activation == "sigmoid"
    images = batch()
    step(student, (images,))
    positives = kd._pair.student.read(
        kd._tap.read(), images, None, frozenset({"positives"})
    ).sampled
    recorded = []
    predictor = student.roi_heads.box_predictor
    predictor.register_forward_hook(lambda m, args, out: recorded.append(out[0]))
    look = kd._pair.student.look(kd._pair.student.observe(images, None).look.view)
    soft, _ = kd._pair.student.soft_labels(look, positives)
    torch.testing.assert_close(soft, recorded[0][:, :NUM_CLASSES])
    torch.testing.assert_close(soft, positives.logits)  # its own teacher
    unlike = Distiller(student, detector("faster"), gk())
    assert "positives" in unlike._pair.refusals


@pytest.mark.parametrize(
    ("student", "teacher", "strides"),
    [
        ("faster", "cascade", (4, 8, 16, 32, 64)),
        ("c4", "faster", (16,)),
        ("faster", "c4", (16,)),
    ],
)
def test_two_stage_detectors_of_unlike_box_heads_share_soft_labels(student, teacher, strides):
    torch.manual_seed(0)
    kind, student = student, detector(student)
    kd = Distiller(student, detector(teacher), gk())
    assert kd.loss.rdm.strides == strides
    images = batch(kind)
    step(student, (images,))
    assert kd(images)["kd_logits"] > 0


def test_unlike_detectors_share_features_but_no_logits():
    torch.manual_seed(0)
    student = detector("retinanet")
    kd = Distiller(student, detector("faster", 4), gk())
    assert kd.loss.rdm.strides == (8, 16, 32, 64)
    images = batch("retinanet")
    step(student, (images,))
    assert set(kd(images)) == {"kd_foreground", "kd_background", "kd_relation"}


def test_the_teacher_gets_its_own_channel_order_and_mean():
    """What a teacher trained on RGB is shown is what its own pipeline would have shown it."""
    student, cfg = detector("retinanet"), tiny_config("retinanet")
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [123.675, 116.28, 103.53], [58.4, 57.1, 57.4]
    teacher = build(cfg)
    kd = Distiller(student, teacher, gk())
    made = scenes(SIZES, NUM_CLASSES)
    for scene in made:
        scene.image[0] *= 0.3  # so that swapped channels show
    expected = teacher.preprocess_image(mapped(cfg, made)).tensor
    images = mapped(tiny_config("retinanet"), made)
    calls = spy(teacher.backbone)
    step(student, (images,))
    kd(images)
    torch.testing.assert_close(calls[0][0][0], expected, atol=1e-4, rtol=1e-4)
    rgb = kd._pair.student.pixels.convert(student.preprocess_image(images[:1]).tensor, Pixels())[0]
    assert made[0].image.mean(dim=(1, 2)).argmin() == 0  # little red
    assert rgb.mean(dim=(1, 2)).argmin() == 0
    assert rgb.min() >= 0 and rgb.max() <= 1


@pytest.mark.parametrize("kind", ["faster", "retinanet"])
def test_all_weights_zero_trains_bit_identically_to_no_distillation(kind):
    def run(distil, **weights):
        torch.manual_seed(0)
        student = detector(kind)
        teacher = copy.deepcopy(student)
        kd = Distiller(student, teacher, gk(**weights)) if distil else None
        parameters = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=1e-5, momentum=0.9)
        for i in range(2):
            images = batch(kind, seed=i)
            loss = step(student, (images,))
            if kd is not None:
                loss = loss + sum(kd(images).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return student.state_dict(), torch.get_rng_state()

    plain, random = run(False)
    distilled, other = run(True, foreground=0, background=0, relation=0, logits=0)
    assert all(torch.equal(v, distilled[k]) for k, v in plain.items())
    assert torch.equal(random, other)
    # With terms on, the samplers still draw what they would have drawn.
    assert torch.equal(random, run(True)[1])


def test_a_batch_without_any_object_is_a_normal_day():
    for kind in ("faster", "c4", "retinanet"):
        student = detector(kind)
        kd = Distiller(student, detector(kind), gk())
        images = mapped(
            tiny_config(kind),
            [Scene(torch.rand(3, 64, 80), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))],
        )
        step(student, (images,))
        terms = kd(images)
        assert all(v.isfinite() for v in terms.values())
        sum(terms.values()).backward()


def test_vitdet_as_a_teacher_is_padded_to_its_patches():
    from detectron2.modeling import ViT
    from detectron2.modeling.backbone.fpn import LastLevelMaxPool
    from detectron2.modeling.backbone.vit import SimpleFeaturePyramid

    torch.manual_seed(0)
    teacher = detector("faster")
    vit = ViT(img_size=96, embed_dim=16, depth=1, num_heads=2, out_feature="last_feat")
    teacher.backbone = SimpleFeaturePyramid(
        vit, "last_feat", 16, (4.0, 2.0, 1.0, 0.5), top_block=LastLevelMaxPool(), square_pad=96
    )
    assert Detectron2Detector(teacher).divisor == 32
    student = detector("c4")  # does not pad by itself
    kd = Distiller(student, teacher, gk(logits=0))
    images = batch("c4", sizes=((64, 80), (64, 64)))
    calls = spy(teacher.backbone)
    step(student, (images,))
    assert all(v.isfinite() for v in kd(images).values())
    assert calls[0][0][0].shape[-2:] == (64, 96)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_detections(kind):
    torch.manual_seed(0)
    model = detector(kind)
    reader = Detectron2Detector(model)
    if kind in TWO_STAGE:
        stages = model.roi_heads.box_predictor
        for predictor in stages if kind == "cascade" else [stages]:
            predictor.test_score_thresh = 0.0
    else:
        model.test_score_thresh = 0.0
    images = batch(kind)
    torch.manual_seed(1)
    with EventStorage():
        expected = sum(model(images).values())
    model.__dict__.pop("loss_normalizer", None)  # RetinaNet's running mean begins anew
    torch.manual_seed(1)
    torch.testing.assert_close(reader.losses(images, None), expected)  # no storage needed
    with EventStorage() as storage:
        reader.losses(images, None)
    assert storage.histories()  # a storage that is there is used
    view = reader.observe(images, None).look.view
    found = reader.detections(view)
    assert model.training
    model.eval()
    with torch.no_grad():
        own = model([{"image": x["image"]} for x in images])
    for mine, output, (height, width) in zip(found, own, view.sizes):
        assert len(mine.boxes) > 0
        torch.testing.assert_close(mine.boxes, output["instances"].pred_boxes.tensor)
        assert torch.equal(mine.labels, output["instances"].pred_classes)
        assert (mine.scores.diff() <= 0).all()
        assert mine.boxes.min() >= 0
        assert (mine.boxes.amax(dim=0) <= torch.tensor([width, height, width, height])).all()
        assert set(mine.labels.tolist()) <= set(range(NUM_CLASSES))


def test_wrong_use_is_named():
    student, images = detector("faster"), batch()
    kd = Distiller(student, detector("faster"), gk())
    with pytest.raises(ValueError, match="never fired; run this .* itself first"):
        kd(images)
    step(student, (images,))
    with pytest.raises(ValueError, match="targets: expected None, since Detectron2 puts"):
        kd(images, [{}])
    step(student, (images,))
    with pytest.raises(ValueError, match="images: expected Detectron2's batch, .* got Tensor"):
        kd(torch.zeros(1, 3, 64, 64))
    student.eval()
    with torch.no_grad():
        student(images)
    with pytest.raises(ValueError, match="expected its last forward in train mode"):
        kd(images)
    student.train()
    bare = [{"image": x["image"]} for x in images]
    with pytest.raises(ValueError, match=r"images\[0\]: expected ground truth, 'instances'"):
        kd.weigh(bare)
    with pytest.raises(ValueError, match="expected Detectron2's GeneralizedRCNN.* but got FPN"):
        Distiller(student.backbone, student, gk())
    with pytest.raises(ValueError, match="expected 4 class logits like the student's, but got 6"):
        Distiller(student, detector("faster", num_classes=5), gk())
    # The background is no class of the loss: labels reach NUM_CLASSES - 1.
    few = GlobalKnowledgeLoss(NUM_CLASSES - 1, total_steps=9)
    kd = Distiller(student, detector("faster"), few)
    for x in images:
        x["instances"].gt_classes.clamp_(min=NUM_CLASSES - 1)
    step(student, (images,))
    with pytest.raises(ValueError, match="labels: expected values below 2, but got 2"):
        kd(images)


def test_rotated_boxes_are_refused():
    student, images = detector("retinanet"), batch("retinanet")
    kd = Distiller(student, detector("retinanet"), gk())
    rotated = Instances((64, 64), gt_classes=torch.tensor([1]))
    rotated.gt_boxes = RotatedBoxes(torch.tensor([[0.0, 0, 8, 8, 45]]))
    with pytest.raises(ValueError, match=r"expected shape \(r, 4\), but got \(1, 5\)"):
        kd.weigh([{**images[0], "instances": rotated}])


def test_refresh_and_detach():
    student = detector("faster")
    kd = Distiller(student, detector("faster"), gk(refresh_every=None))
    kd.refresh([batch(seed=0), batch(seed=1)], progress=False)
    assert kd.loss.bank.valid.any() and student.training
    kd.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


@pytest.mark.parametrize("kind", ["faster", "retinanet", "fcos"])
def test_another_batch_than_the_students_is_refused(kind):
    student, teacher = detector(kind), detector(kind, 4)
    kd = Distiller(student, teacher, gk())
    images = batch(kind)
    copies = copy.deepcopy(images)
    filtered = [{**x, "instances": x["instances"][:1]} for x in images]
    for given in (
        images[:2],
        [*images, images[0]],
        images[::-1],
        filtered,
        batch(kind, seed=5),
        [],
    ):
        step(student, (images,))
        with pytest.raises(ValueError, match="^images"):
            kd(given)
    step(student, (images,))
    assert kd(copies)
    step(student, (images,))
    images[0]["instances"].gt_boxes.tensor.add_(1)
    with pytest.raises(ValueError, match="written in place"):
        kd(images)
