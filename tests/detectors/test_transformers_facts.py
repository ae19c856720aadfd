"""What transformers' encoders and decoders say, held against the models' own outputs."""

import copy
import os
import tempfile
from dataclasses import replace

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("scipy", reason="transformers' matcher needs scipy")

from global_kd import Distiller  # noqa: E402
from global_kd.detectors import IMAGENET, View  # noqa: E402
from global_kd.detectors.transformers import TransformersDetector  # noqa: E402
from global_kd.hooks import FeatureTap, evaluating  # noqa: E402
from global_kd.losses import DETRDistill  # noqa: E402

from .cases import Scene  # noqa: E402
from .test_transformers import HYBRID, MAKERS, NUM_CLASSES, SCENES, batch_of, hybrid  # noqa: E402

MAKERS = dict(MAKERS)
if hasattr(transformers, "Deimv2Config"):
    MAKERS["deimv2"] = lambda **o: hybrid("Deimv2", **o)
RT = [name for name in MAKERS if name in (*HYBRID, "deimv2")]
BACKBONE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "image_size": 64,
}


def projected(name, backbone, **options):
    """LW-DETR and RF-DETR: the maps are a projector's behind a plain ViT."""
    small = {
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_ffn_dim": 48,
        "decoder_self_attention_heads": 2,
        "decoder_cross_attention_heads": 4,
        "num_queries": 12,
        "group_detr": 3,
        "num_labels": NUM_CLASSES,
        "dropout": 0.0,
        "c2f_num_blocks": 1,
    }
    config = getattr(transformers, f"{name}Config")(backbone_config=backbone, **small, **options)
    return getattr(transformers, f"{name}ForObjectDetection")(config)


def lw_detr():
    own = {"pretrain_image_size": 64, "patch_size": 16, "num_windows": 4, "out_indices": [1, 2]}
    vit = transformers.AutoConfig.for_model(
        "lw_detr_vit", window_block_indices=[0], **BACKBONE, **own
    )
    return projected("LwDetr", vit, projector_scale_factors=[2.0, 0.5])


def rf_detr():
    own = {"patch_size": 8, "num_windows": 2, "out_features": ["stage1", "stage2"]}
    vit = transformers.AutoConfig.for_model("rf_detr_dinov2", **BACKBONE, **own)
    return projected("RfDetr", vit)


LW = []
for make in (lw_detr, rf_detr):
    if hasattr(transformers, f"{make.__name__.title().replace('_', '')}Config"):
        LW.append(make.__name__)
        MAKERS[make.__name__] = make
TWO_STAGES = {"two_stage": True, "with_box_refine": True, "two_stage_num_proposals": 12}
MAKERS["two_stage"] = lambda **o: MAKERS["deformable_detr"](**TWO_STAGES, **o)
DENSE = [*RT, *LW, "two_stage"]
ALL = frozenset({"dense", "boxes", "priors", "positives"})


def levelled(name, count):
    """Options for levels that the decoder adds to the encoder's."""
    more = {"num_feature_levels": count}
    return more | ({"decoder_n_levels": count} if name == "rt_detr_v2" else {})


def network(name, **options):
    """An encoder's boxes are its anchors at first: here they are not."""
    torch.manual_seed(0)
    made = MAKERS[name](**options)
    with torch.no_grad():
        for key, x in made.named_parameters():
            if ("enc_" in key or "bbox" in key or "class_embed" in key) and x.dim() == 2:
                x.add_(torch.randn_like(x), alpha=0.2)
    return made


def corners(boxes, height, width):
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    canvas = torch.tensor([width, height, width, height])
    return torch.cat([centre - half, centre + half], dim=-1) * canvas


def trained_forward(student, images, facts=ALL):
    """What its training forward leaves for the reader."""
    reader = TransformersDetector(student)
    paths = reader.taps | reader.taps_for(facts)
    with FeatureTap(student, paths, inputs=reader.inputs) as tap:
        student.train()(**images)
        return reader, reader.read(tap.read(), images, None, facts)


def frozen_statistics(student):
    """Batch norms as in a teacher; no dropout."""
    student.train()
    for module in student.modules():
        module.training &= not isinstance(module, (nn.BatchNorm2d, nn.Dropout))
    return student


@pytest.mark.parametrize("name", RT)
@pytest.mark.parametrize("levels", [3, 4])
def test_the_dense_head_is_the_encoders_own(name, levels):
    """Scores and boxes of every cell, as the queries are chosen from them."""
    teacher = network(name, **levelled(name, levels)).eval()
    reader, x = TransformersDetector(teacher), torch.randn(2, 3, 64, 416)
    with torch.no_grad():
        output = teacher(x)
        dense = reader.dense(reader.look(View(x)), ALL)
    # Where the widths agree, D-FINE projects nothing, and halves nothing.
    further = (32, (2, 13)) if name in ("d_fine", "deimv2") else (64, (1, 7))
    sizes = [(8, 52), (4, 26), (2, 13), further[1]][:levels]
    assert [(g.height, g.width) for g in dense.grids] == sizes
    assert [g.stride for g in dense.grids] == [8, 16, 32, further[0]][:levels]
    assert torch.equal(dense.logits, output.enc_outputs_class)
    theirs = corners(output.enc_outputs_coord_logits.sigmoid(), 64, 416)
    known = dense.valid
    torch.testing.assert_close(dense.boxes[:, known], theirs[:, known], rtol=1e-5, atol=1e-3)
    assert dense.boxes[:, known].std(dim=1).min() > 1
    # Cells whose centre is nearer than 1 % to the border have no anchor.
    biggest = torch.finfo(torch.float32).max
    anchored = teacher.model.generate_anchors(tuple(sizes))[0][0].ne(biggest).all(dim=1)
    assert torch.equal(known, anchored)
    assert known.any()
    assert not known.all()
    assert dense.boxes.isfinite().all()
    assert (dense.scores[:, ~known] == 0).all()
    assert dense.activation == "sigmoid"
    assert reader.num_logits == dense.logits.shape[2] == NUM_CLASSES


@pytest.mark.parametrize(
    "name, options",
    [(name, levelled(name, levels)) for name in RT for levels in (3, 4, 5)]
    + [(name, {}) for name in (*LW, "two_stage")],
)
def test_a_student_is_read_from_its_own_training_forward(name, options):
    student = network(name, **options)
    reader, seen = trained_forward(student, batch_of("rt_detr"))
    tap = "encoder logits" if name in RT else "encoder memory"
    assert set(reader.taps_for(frozenset({"dense"}))) == {tap}
    assert reader.taps_for(frozenset({"targets", "queries"})) == {}
    facts = frozenset({"boxes", "priors"})
    tapped = reader.dense(seen.look, facts)
    again = reader.dense(replace(seen.look, tapped=None), facts)
    assert tapped.grids == again.grids
    for part in ("logits", "priors", "valid"):
        torch.testing.assert_close(getattr(tapped, part), getattr(again, part))
    torch.testing.assert_close(tapped.boxes, again.boxes, rtol=1e-5, atol=1e-3)  # pixels
    encoder = student.model.encoder if name in RT else student.model.backbone
    encoder = student.model.input_proj if name == "two_stage" else encoder  # its backbone is frozen
    weights = [p for p in encoder.parameters() if p.dim() == 4]
    for part in (tapped.logits, tapped.boxes):
        (gradient,) = torch.autograd.grad(part.square().sum(), weights[0], retain_graph=True)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", [*RT, *LW])
def test_a_copy_gives_the_soft_labels_of_its_student(name):
    student = network(name)
    teacher = TransformersDetector(copy.deepcopy(student).eval())
    reader = TransformersDetector(student)
    paths = reader.taps | reader.taps_for(ALL)
    images = batch_of("rt_detr")
    with FeatureTap(student, paths) as tap:
        frozen_statistics(student)(**images)
        seen = reader.read(tap.read(), images, None, ALL)
    sampled = seen.sampled
    assert len(sampled.box) == len(sampled.logits) == 9 * len(seen.truth) == 27
    assert torch.equal(sampled.raw[0], seen.truth.image_index[sampled.box])
    with torch.no_grad():
        soft, rows = teacher.soft_labels(teacher.look(seen.look.view), sampled)
    assert rows is None
    torch.testing.assert_close(soft, sampled.logits, atol=1e-4, rtol=1e-4)
    assert sampled.logits.requires_grad
    assert not soft.requires_grad


@pytest.mark.parametrize("name", RT)
def test_rt_detrs_of_all_kinds_speak_of_the_same_cells(name):
    _, seen = trained_forward(network("rt_detr"), batch_of("rt_detr"))
    teacher = TransformersDetector(network(name, encoder_layers=2, decoder_layers=3).eval())
    with torch.no_grad():
        look = teacher.look(seen.look.view)
        soft, rows = teacher.soft_labels(look, seen.sampled)
        scores = teacher.model(seen.look.view.images).enc_outputs_class
    image, location = seen.sampled.raw[:2]
    assert rows is None
    assert teacher.kind == TransformersDetector(network("rt_detr")).kind is not None
    assert torch.equal(soft, scores[image, location])


def test_ultralytics_rt_detr_speaks_of_the_same_cells():
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())
    os.environ.setdefault("YOLO_OFFLINE", "1")
    pytest.importorskip("ultralytics", minversion="8.4", exc_type=ImportError)
    from global_kd.detectors.ultralytics import UltralyticsDetector

    from .test_ultralytics_facts import rt_detr

    teacher = UltralyticsDetector(rt_detr(nc=NUM_CLASSES).eval())
    reader, seen = trained_forward(network("rt_detr"), batch_of("rt_detr"))
    assert teacher.kind == reader.kind
    with torch.no_grad():
        look = teacher.look(seen.look.view)
        soft, rows = teacher.soft_labels(look, seen.sampled)
        dense = teacher.dense(look)
    assert rows is None
    assert dense.grids == reader.dense(seen.look).grids
    assert torch.equal(soft, dense.logits[seen.sampled.raw[0], seen.sampled.raw[1]])


def test_the_sampled_cells_lie_in_their_boxes():
    _, seen = trained_forward(network("rt_detr"), batch_of("rt_detr"))
    reader = TransformersDetector(network("rt_detr"))
    cells = reader.dense(reader.look(seen.look.view), frozenset({"priors"})).priors
    centre = (cells[:, :2] + cells[:, 2:])[seen.sampled.raw[1]] / 2
    boxes = seen.truth.boxes[seen.sampled.box]
    assert ((centre > boxes[:, :2]) & (centre < boxes[:, 2:])).all()


def test_a_batch_without_boxes_has_no_soft_labels_and_a_gradient():
    images = batch_of("rt_detr", [Scene(SCENES[2].image, SCENES[2].boxes, SCENES[2].labels)])
    student = network("rt_detr")
    _, seen = trained_forward(student, images)
    teacher = TransformersDetector(network("rt_detr").eval())
    soft, rows = teacher.soft_labels(teacher.look(seen.look.view), seen.sampled)
    assert soft.shape == seen.sampled.logits.shape == (0, NUM_CLASSES)
    assert rows is None
    seen.sampled.logits.sum().backward()
    assert student.model.enc_score_head.weight.grad.abs().max() == 0


@pytest.mark.parametrize("name", LW)
@pytest.mark.parametrize("padded", [False, True])
def test_the_cells_from_which_lw_detr_chooses(name, padded):
    """The first group's scores and boxes, of all cells but those in the padding."""
    teacher = network(name).eval()
    reader, x = TransformersDetector(teacher), torch.randn(2, 3, 64, 96)
    view = View(x, torch.tensor([[64, 96], [32, 64]]) if padded else None)
    with torch.no_grad():
        output = teacher(x, **({"pixel_mask": view.inside()} if padded else {}))
        dense = reader.dense(reader.look(view), ALL)
    strides = {"lw_detr": [8, 32], "rf_detr": [8]}[name]
    assert [(g.stride, g.height, g.width) for g in dense.grids] == [
        (s, 64 // s, 96 // s) for s in strides
    ]
    assert reader.divisor == {"lw_detr": 32, "rf_detr": 16}[name]
    ranks = dense.logits.amax(dim=2).masked_fill(~dense.valid, -torch.inf)
    best = ranks.topk(12, dim=1).indices
    rows = torch.arange(2)[:, None]
    torch.testing.assert_close(dense.logits[rows, best], output.enc_outputs_class)
    for i, size in enumerate([(64, 96), (32, 64) if padded else (64, 96)]):
        theirs = corners(output.enc_outputs_coord_logits[i], *size)
        torch.testing.assert_close(dense.boxes[i, best[i]], theirs, rtol=1e-5, atol=1e-3)
        centre = (dense.priors[:, :2] + dense.priors[:, 2:]) / 2
        assert torch.equal(dense.valid[i], (centre < torch.tensor(size).flip(0)).all(dim=1))
    assert dense.boxes.isfinite().all()
    assert dense.logits.isfinite().all()


@pytest.mark.parametrize("padded", [False, True])
def test_the_cells_from_which_a_two_stage_deformable_detr_chooses(padded):
    """The one column that it ranks them by, and boxes of all cells but those without an anchor."""
    teacher = network("two_stage").eval()
    reader, x = TransformersDetector(teacher), torch.randn(2, 3, 64, 832)
    view = View(x, torch.tensor([[64, 832], [32, 416]]) if padded else None)
    with torch.no_grad():
        output = teacher(x, **({"pixel_mask": view.inside()} if padded else {}))
        dense = reader.dense(reader.look(view), ALL)
    assert [(g.stride, g.height, g.width) for g in dense.grids] == [
        (s, 64 // s, 832 // s) for s in (8, 16, 32, 64)
    ]
    known = output.enc_outputs_coord_logits.isfinite().all(dim=2)
    assert torch.equal(dense.valid, known)
    assert known.any() and not known.all()
    torch.testing.assert_close(dense.logits, output.enc_outputs_class[..., :1])
    assert dense.logits.std() > 0.1
    for i, size in enumerate([(64, 832), (32, 416) if padded else (64, 832)]):
        theirs = corners(output.enc_outputs_coord_logits[i].sigmoid(), *size)[known[i]]
        torch.testing.assert_close(dense.boxes[i, known[i]], theirs, rtol=1e-5, atol=1e-3)
    assert dense.boxes.isfinite().all()
    # No class is told apart there, and with one stage nothing is said at all.
    assert reader.num_logits is None and reader.kind is None
    assert reader.gives == {"images", "queries", "dense", "boxes", "priors", "teacher_head"}
    assert TransformersDetector(network("deformable_detr")).gives == {"images", "queries"}


@pytest.mark.parametrize("name", DENSE)
def test_the_head_runs_on_maps_and_gives_them_gradients(name):
    teacher = network(name).eval().requires_grad_(False)
    reader = TransformersDetector(teacher)
    with torch.no_grad():
        look = reader.look(View(torch.randn(2, 3, 64, 96)))
        own = reader.dense(look, ALL)
    maps = [x.clone().requires_grad_() for x in look.maps]
    dense = reader.head(maps, look, ALL)
    assert torch.equal(dense.logits, own.logits)
    assert torch.equal(dense.boxes, own.boxes)
    for part in (dense.logits, dense.boxes):
        for gradient in torch.autograd.grad(part.square().sum(), maps, retain_graph=True):
            assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", MAKERS)
def test_the_queries_are_those_of_the_models_forward(name):
    teacher = network(name)
    reader, view = TransformersDetector(teacher), View(torch.randn(2, 3, 64, 96))
    with torch.no_grad():
        queries = reader.queries(reader.look(view))
        with evaluating(teacher):
            output = teacher(view.images)
    assert teacher.training
    assert "queries" in reader.gives
    assert queries.logits.shape[:2] == (2, 12)
    assert torch.equal(queries.logits, output.logits)
    torch.testing.assert_close(queries.boxes, corners(output.pred_boxes, 64, 96))
    hidden = output.last_hidden_state
    assert torch.equal(queries.embeddings, hidden[:, -12:])
    assert queries.embeddings.shape == (2, 12, 32)
    assert queries.embeddings.shape[2] == reader.look(view).maps[0].shape[1]
    assert queries.activation == reader.activation
    if name in ("d_fine", "deimv2"):
        sides = output.intermediate_predicted_corners[:, -1]
        assert torch.equal(queries.bins.flatten(2), sides)
        assert queries.bins.shape[:3] == (2, 12, 4)
    else:
        assert queries.bins is None


@pytest.mark.parametrize("name", ["detr", "deformable_detr", "rt_detr", *LW])
def test_the_boxes_of_queries_leave_the_padding_out_where_it_is_masked(name):
    """As published ones are trained: relative to the image, not to the canvas of the batch."""
    teacher = network(name).eval()
    reader = TransformersDetector(teacher)
    view = View(torch.randn(2, 3, 64, 96), torch.tensor([[64, 96], [32, 64]]))
    with torch.no_grad():
        queries = reader.queries(reader.look(view))
        mask = {} if name == "rt_detr" else {"pixel_mask": view.inside()}
        output = teacher(view.images, **mask)
    torch.testing.assert_close(queries.boxes[0], corners(output.pred_boxes[0], 64, 96))
    size = (64, 96) if name == "rt_detr" else (32, 64)
    torch.testing.assert_close(queries.boxes[1], corners(output.pred_boxes[1], *size))


@pytest.mark.parametrize("name", RT)
def test_a_decoder_narrower_than_the_maps_is_refused_when_the_distiller_is_made(name):
    """As RT-DETR x has: its encoder's maps are projected before the decoder reads them."""
    wide = network(name, encoder_hidden_dim=48, decoder_in_channels=[48, 48, 48])
    student = network("rt_detr")
    message = r"losses: DETRDistill .* queries, 32 channels, but got \[48, 48, 48\]; .*PKD"
    with pytest.raises(ValueError, match=message):
        Distiller(student, wide, DETRDistill())
    assert not any(module._forward_hooks for module in student.modules())
    assert Distiller(student, network(name), DETRDistill()).losses


@pytest.mark.parametrize("name", ["detr", "yolos"])
def test_detectors_without_cells_say_so(name):
    reader = TransformersDetector(network(name).eval())
    assert reader.gives == {"images", "queries"}
    look = reader.look(reader.example())
    for ask in (lambda: reader.dense(look), lambda: reader.head(look.maps, look)):
        with pytest.raises(NotImplementedError, match=r"ForObjectDetection gives no \w+"):
            ask()


def test_the_example_has_as_many_channels_as_the_model_takes():
    torch.manual_seed(0)
    config = transformers.YolosConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=[64, 96],
        num_detection_tokens=12,
        num_channels=5,
    )
    reader = TransformersDetector(transformers.YolosForObjectDetection(config))
    assert reader.example().images.shape[1] == 5
    assert len(reader.look(reader.example()).maps) == 1


@pytest.mark.parametrize("name", ["rt_detr", "detr"])
def test_a_teacher_in_half_precision_takes_its_students_numbers(name):
    teacher = network(name).bfloat16().eval()
    reader, view = TransformersDetector(teacher), View(torch.rand(2, 3, 64, 64))
    with torch.no_grad():
        assert len(reader.detections(view)) == 2
        look = reader.look(view)
        assert reader.queries(look).boxes.dtype == torch.float32
        if name == "rt_detr":
            dense = reader.dense(look, ALL)
            assert dense.logits.dtype == torch.bfloat16
            assert dense.boxes.dtype == torch.float32


@pytest.mark.skipif("deimv2" not in MAKERS, reason="needs transformers with DEIMv2")
def test_deimv2_takes_the_pixels_of_its_backbone():
    teacher = network("deimv2")
    assert TransformersDetector(teacher).pixels.mean == (0, 0, 0)
    teacher.config.backbone_config.model_type = "dinov3_vit"
    assert TransformersDetector(teacher).pixels == IMAGENET
