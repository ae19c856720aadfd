"""Real transformers detectors: boxes where the image processors put the objects, maps, training."""

import copy
import io
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from global_kd import Distiller, GlobalKnowledgeLoss
from global_kd.detectors import IMAGENET, Pixels, View
from global_kd.hooks import evaluating
from global_kd.losses import GID, SoftLabels
from tests.small_loss import small_loss

from ..test_docs import blocks_of
from .cases import Scene
from .cases_transformers import processed, torchvision_resnet50

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("scipy", reason="transformers' matcher needs scipy")

from global_kd.detectors.transformers import TransformersDetector  # noqa: E402

NUM_CLASSES = 3
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 24], "layer_type": "basic"}
SMALL = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 12,
    "num_labels": NUM_CLASSES,
    "dropout": 0.0,
}


def hybrid(name, **options):
    """RT-DETR, RT-DETRv2, D-FINE: the maps are the hybrid encoder's."""
    backbone = transformers.RTDetrResNetConfig(**RESNET, depths=[1] * 4, out_indices=[2, 3, 4])
    own = {
        "encoder_hidden_dim": 32,
        "encoder_in_channels": [16, 16, 24],
        "decoder_in_channels": [32, 32, 32],
        "num_denoising": 4,
        "initializer_range": 0.1,  # with the published 0.01 a narrow network dies out
    }
    config = getattr(transformers, f"{name}Config")(
        backbone_config=backbone, **(SMALL | own | options)
    )
    return getattr(transformers, f"{name}ForObjectDetection")(config)


def plain(name, **options):
    """Detectors whose encoder works on tokens of a plain ResNet."""
    wide = RESNET | {"hidden_sizes": [8, 16, 16, 32]}
    out = [2, 3, 4] if name == "DeformableDetr" else [4]
    backbone = transformers.ResNetConfig(**wide, depths=[1] * 4, out_indices=out)
    # As transformers 4 wants it said.
    none = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
    if name == "DabDetr":
        options = {"hidden_size": 32} | options
    options = SMALL | {"attention_dropout": 0.0, "activation_dropout": 0.0} | options
    config = getattr(transformers, f"{name}Config")(backbone_config=backbone, **none, **options)
    return getattr(transformers, f"{name}ForObjectDetection")(config)


def yolos(**options):
    config = transformers.YolosConfig(
        **{
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "image_size": [64, 96],
            "num_detection_tokens": 12,
            "num_labels": NUM_CLASSES,
        }
        | options
    )
    model = transformers.YolosForObjectDetection(config)
    with torch.no_grad():  # published ones have learned it, here it would be all zeros
        model.vit.embeddings.position_embeddings.normal_(std=0.02)
    return model


MAKERS = {
    "rt_detr": lambda **o: hybrid("RTDetr", **o),
    "rt_detr_v2": lambda **o: hybrid("RTDetrV2", **o),
    "d_fine": lambda **o: hybrid("DFine", **o),
    "deformable_detr": lambda **o: plain("DeformableDetr", **o),
    "detr": lambda **o: plain("Detr", **o),
    "conditional_detr": lambda **o: plain("ConditionalDetr", **o),
    "dab-detr": lambda **o: plain("DabDetr", **o),
    "table-transformer": lambda **o: plain("TableTransformer", **o),
    "yolos": yolos,
}
HYBRID = ("rt_detr", "rt_detr_v2", "d_fine")
STRIDES = dict.fromkeys(MAKERS, (32.0,)) | dict.fromkeys(HYBRID, (8.0, 16.0, 32.0))
STRIDES |= {"deformable_detr": (8.0, 16.0, 32.0, 64.0), "yolos": (16.0,)}


def detector(name, **options):
    torch.manual_seed(0)
    return MAKERS[name](**options)


def processor(name, **options):
    if name in HYBRID:
        size = {"height": 128, "width": 160}
        return transformers.RTDetrImageProcessor(**({"size": size} | options))
    kinds = {"deformable_detr": "DeformableDetr", "conditional_detr": "ConditionalDetr"}
    kinds |= {"yolos": "Yolos"}
    size = {"shortest_edge": 96, "longest_edge": 160}
    make = getattr(transformers, f"{kinds.get(name, 'Detr')}ImageProcessor")
    return make(**({"size": size} | options))


def square(height, width, boxes, labels):
    """Black, with white rectangles."""
    image = torch.zeros(3, height, width)
    for x1, y1, x2, y2 in boxes:
        image[:, y1:y2, x1:x2] = 1
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Scene(image, boxes, torch.tensor(labels, dtype=torch.int64))


# Resized to 96 x 160, 128 x 96 and 96 x 96 where the ratio is kept: padding in all three.
SCENES = [
    square(48, 80, [(40, 8, 72, 40)], [2]),
    square(64, 48, [(4, 8, 20, 24), (24, 40, 44, 60)], [0, 1]),
    square(48, 48, [], []),
]


def batch_of(name, scenes=SCENES, **options):
    return processed(processor(name, **options), scenes)


# Random weights: maps next to zero.
gk = partial(small_loss, NUM_CLASSES, standardize=False)


def bright_extent(image, label, pixels):
    """xyxy of the white pixels around one box, in RGB whatever the normalisation."""
    rgb = pixels.convert(image[None], Pixels())[0].mean(dim=0)
    x1, y1, x2, y2 = label
    around = torch.zeros_like(rgb, dtype=torch.bool)
    around[max(0, int(y1) - 6) : int(y2) + 6, max(0, int(x1) - 6) : int(x2) + 6] = True
    y, x = ((rgb > 0.6) & around).nonzero(as_tuple=True)
    return [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]


@pytest.mark.parametrize("name", MAKERS)
def test_a_few_steps_of_training(name):
    """All terms are finite, the student moves, the teacher does not, the file stays the same."""
    student, teacher = detector(name), detector(name)
    keys, before = list(student.state_dict()), copy.deepcopy(student.state_dict())
    frozen = copy.deepcopy(teacher.state_dict())
    kd = Distiller(student, teacher, gk())
    assert kd.loss.rdm.strides == STRIDES[name]
    optimizer = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=1e-3)
    student.train()
    teacher.train()  # somebody calls .train() on everything
    batch = batch_of(name)
    for _ in range(3):
        outputs = student(**batch)
        terms = kd(batch)
        expected = {"kd_foreground", "kd_background", "kd_relation"}
        # Encoder cells correspond, queries do not.
        encoder = "positives" in kd._pair.student.gives
        assert set(terms) == expected | ({"kd_logits"} if encoder else set())
        assert all(v.isfinite() for v in terms.values())
        optimizer.zero_grad()
        (outputs.loss + sum(terms.values())).backward()
        optimizer.step()
        assert not any(m.training for m in teacher.modules())
    assert kd.loss.bank.valid.any()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, frozen[k]) for k, v in teacher.state_dict().items())
    assert any(not torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert list(student.state_dict()) == keys
    buffer = io.BytesIO()
    torch.save(student.state_dict(), buffer)
    buffer.seek(0)
    detector(name).load_state_dict(torch.load(buffer, weights_only=True))


@pytest.mark.parametrize("name", MAKERS)
def test_the_gradient_of_the_terms_reaches_the_students_backbone(name):
    student = detector(name)
    kd = Distiller(student, detector(name), gk())
    batch = batch_of(name)
    student.train()(**batch)
    sum(kd(batch).values()).backward()
    conv = [m for m in student.modules() if isinstance(m, nn.Conv2d) and m.weight.requires_grad]
    assert conv[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", MAKERS)
def test_a_student_that_is_its_teacher_loses_nothing(name):
    student = detector(name)
    kd = Distiller(student, copy.deepcopy(student), gk(adapter="identity"))
    batch = batch_of(name)
    student.train()
    for module in student.modules():  # the necks' statistics of a batch are not the teacher's
        module.training &= not isinstance(module, nn.BatchNorm2d)
    for _ in range(3):
        student(**batch)
        terms = kd(batch)
    assert kd.loss.bank.valid.any()
    assert {k: v.item() for k, v in terms.items()} == {k: pytest.approx(0, abs=1e-5) for k in terms}
    _, omega = kd.weigh(batch)
    torch.testing.assert_close(omega, torch.ones_like(omega))


def read_and_observed(name, batch):
    """The targets that training and ``weigh`` see, and the reader."""
    student = detector(name)
    kd = Distiller(student, detector(name), gk())
    seen = []
    kd.loss.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    student.train()(**batch)
    kd(batch)
    return seen[0], kd.weigh(batch)[0], kd._pair.student


@pytest.mark.parametrize(
    "name, options",
    [
        *((name, {}) for name in MAKERS),
        ("rt_detr", {"size": {"shortest_edge": 96, "longest_edge": 160}, "do_pad": True}),
        ("detr", {"pad_size": {"height": 192, "width": 224}}),
    ],
)
def test_boxes_are_where_the_white_rectangles_are(name, options):
    """Through the real image processor: resized, padded to the largest, normalised."""
    batch = batch_of(name, **options)
    read, observed, reader = read_and_observed(name, batch)
    assert read.image_index.tolist() == observed.image_index.tolist() == [0, 1, 1]
    assert read.labels.tolist() == [2, 0, 1]  # from 0, no background
    torch.testing.assert_close(read.boxes, observed.boxes)
    images = batch["pixel_values"]
    for box, image in zip(read.boxes.tolist(), read.image_index.tolist()):
        extent = bright_extent(images[image], box, reader.pixels)
        assert box == pytest.approx(extent, abs=1.01)  # a fractional resize blurs a pixel
        if name not in HYBRID or options:
            assert box == pytest.approx(extent, abs=1e-3)  # resized by 2 exactly
    if name not in HYBRID or options:
        assert read.boxes.tolist()[1:] == [
            pytest.approx([8, 16, 40, 48], abs=1e-3),
            pytest.approx([48, 80, 88, 120], abs=1e-3),
        ]


@pytest.mark.parametrize("name", ["detr", "deformable_detr", "yolos"])
def test_labels_that_a_collator_padded_no_further_are_read_by_their_own_size(name):
    """The way of transformers 4: boxes relative to the unpadded image, ``size`` says so."""
    single = [batch_of(name, [scene]) for scene in SCENES]
    together = batch_of(name)
    alone = single[1]["labels"][0]["boxes"]
    assert not torch.equal(alone, together["labels"][1]["boxes"])
    values = torch.zeros(3, 3, 128, 160)
    mask = torch.zeros(3, 128, 160, dtype=torch.int64)
    for i, x in enumerate(single):
        height, width = x["pixel_values"].shape[-2:]
        values[i, :, :height, :width] = x["pixel_values"][0]
        mask[i, :height, :width] = 1
    labels = [x["labels"][0] for x in single]
    late = {"pixel_values": values, "pixel_mask": mask, "labels": labels}
    reader = TransformersDetector(detector(name))
    with evaluating(reader.model), torch.no_grad():
        torch.testing.assert_close(
            reader.observe(late, None).truth.boxes,
            reader.observe(together, None).truth.boxes,
        )
        bare = [{k: x[k] for k in ("boxes", "class_labels")} for x in together["labels"]]
        torch.testing.assert_close(
            reader.observe(late | {"labels": bare}, None).truth.boxes,
            reader.observe(together, None).truth.boxes,
        )


@pytest.mark.parametrize("name", MAKERS)
def test_padding_is_known_and_what_is_seen_is_what_the_model_saw(name):
    """The maps of a dry look are those of the model's own forward, mask and all."""
    options = {"size": {"shortest_edge": 96, "longest_edge": 160}, "do_pad": True}
    batch = batch_of(name, **(options if name in HYBRID else {}))
    reader = TransformersDetector(detector(name))
    with evaluating(reader.model), torch.no_grad():
        view = reader.observe(batch, None).look.view
        if "pixel_mask" not in batch:
            pytest.skip("transformers 4 gives no mask to YOLOS")
        assert torch.equal(view.inside().long(), batch["pixel_mask"])
        assert view.sizes.tolist() == [[96, 160], [128, 96], [96, 96]]
        looked = reader.look(view).maps
        output = reader.model(**batch, output_hidden_states=True)
    if name == "yolos":
        assert looked[0].flatten(2).mT.equal(output.last_hidden_state[:, 1:-12])
        return
    whole = output.encoder_last_hidden_state
    if name in HYBRID:
        assert len(looked) == len(whole) == 3
        assert all(torch.equal(a, b) for a, b in zip(looked, whole))
    else:
        assert torch.cat([x.flatten(2) for x in looked], dim=2).mT.equal(whole)


@pytest.mark.parametrize("name", MAKERS)
def test_the_maps_have_the_right_order_strides_and_channels(name):
    reader = TransformersDetector(detector(name))
    with evaluating(reader.model), torch.no_grad():
        maps = reader.look(View(torch.randn(2, 3, 128, 192))).maps
    assert [tuple(x.shape) for x in maps] == [
        (2, 32, int(128 / s), int(192 / s)) for s in STRIDES[name]
    ]


@pytest.mark.parametrize("name", ["deformable_detr", "detr", "conditional_detr", "yolos"])
def test_without_encoder_layers_the_maps_are_their_input(name):
    """Every token goes back to the cell that it came from, on a canvas of odd size too."""
    none = {"num_hidden_layers": 0, "use_mid_position_embeddings": False}
    model = detector(name, **(none if name == "yolos" else {"encoder_layers": 0}))
    reader, recorded = TransformersDetector(model), []
    sources = list(getattr(model.model, "input_proj", [])) if name != "yolos" else []
    if name in ("detr", "conditional_detr"):
        sources = [model.model.input_projection]
    if name == "yolos":
        sources = [model.vit.embeddings.patch_embeddings.projection]
        model.vit.embeddings.position_embeddings.data.zero_()
    for module in sources:
        module.register_forward_hook(lambda m, args, output: recorded.append(output))
    with evaluating(model), torch.no_grad():
        maps = reader.look(View(torch.randn(2, 3, 104, 150))).maps
    if name == "yolos":
        recorded = [model.vit.layernorm(x.movedim(1, 3)).movedim(3, 1) for x in recorded]
        assert maps[0].shape[2:] == (6, 9)  # whole patches only
    assert len(maps) == len(recorded) > 0
    for a, b in zip(maps, recorded):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "name", ["detr", "conditional_detr", "dab-detr", "table-transformer", "yolos"]
)
def test_the_maps_answer_to_a_square_where_it_is(name):
    """With encoder; the random pyramids of the others see the whole image in every cell."""
    reader = TransformersDetector(detector(name))
    scenes = [square(256, 320, [], []), square(256, 320, [(192, 0, 320, 128)], [1])]
    batch = batch_of(name, scenes, do_resize=False)
    with evaluating(reader.model), torch.no_grad():
        seen = reader.observe(batch, None)
    x1, y1, x2, y2 = seen.truth.boxes[0]
    for maps in seen.look.maps:
        changed = (maps[1] - maps[0]).norm(dim=0)
        y, x = (torch.arange(n) + 0.5 for n in changed.shape)
        y, x = y * (256 / len(y)), x * (320 / len(x))  # centres of the cells in pixels
        inside = ((y > y1) & (y < y2))[:, None] & ((x > x1) & (x < x2))
        assert changed[inside].mean() > 1.2 * changed[~inside].mean()


@pytest.mark.parametrize("name", MAKERS)
def test_only_as_much_of_a_model_runs_as_is_looked_at(name):
    model = detector(name)
    reader = TransformersDetector(model)
    late = model.class_labels_classifier if name == "yolos" else model.model.decoder
    late.register_forward_hook(lambda *_: pytest.fail("ran"))
    with evaluating(model), torch.no_grad():
        reader.look(reader.example())


@pytest.mark.parametrize("name", MAKERS)
def test_losses_are_the_models_own(name):
    model, batch = detector(name), batch_of(name)
    reader = TransformersDetector(model)
    model.train()
    torch.manual_seed(0)
    mine = reader.losses(batch, None)
    torch.manual_seed(0)
    assert torch.equal(mine, model(**batch).loss)
    assert mine.requires_grad and mine.isfinite()


@pytest.mark.parametrize("name", ["rt_detr", "d_fine", "deformable_detr", "detr", "yolos"])
def test_detections_are_the_processors_in_pixels_of_the_view(name):
    model = detector(name)
    reader, batch = TransformersDetector(model), batch_of(name, SCENES[:1])
    view = View(batch["pixel_values"])
    found = reader.detections(view)
    with evaluating(model), torch.no_grad():
        outputs = model(view.images)
    theirs = processor(name).post_process_object_detection(
        outputs, threshold=0.0, target_sizes=[view.size]
    )
    for mine, expected in zip(found, theirs):
        assert len(mine.scores) == 12 and mine.scores.diff().le(0).all()
        order = expected["scores"].argsort(descending=True)[:12]
        torch.testing.assert_close(mine.scores, expected["scores"][order])
        torch.testing.assert_close(mine.boxes, expected["boxes"][order])
        assert torch.equal(mine.labels, expected["labels"][order])
        assert mine.labels.max() < NUM_CLASSES


def test_detections_do_not_depend_on_the_padding():
    """Alone and beside a larger image an image shows the same objects at the same places."""
    reader, batch = TransformersDetector(detector("detr")), batch_of("detr")
    view = reader.observe(batch, None).look.view
    together = reader.detections(view)
    for i, (height, width) in enumerate(view.sizes.tolist()):
        alone = reader.detections(View(view.images[i : i + 1, :, :height, :width]))[0]
        torch.testing.assert_close(alone.boxes, together[i].boxes)
        torch.testing.assert_close(alone.scores, together[i].scores)


def test_a_torchvision_student_shows_an_rt_detr_teacher_its_own_pixels():
    """ImageNet-normalised for the student, RGB in [0, 1] at a multiple of 32 for the teacher."""
    pytest.importorskip("torchvision", reason="needs torchvision")
    torch.manual_seed(0)
    student, teacher = torchvision_resnet50("fcos"), detector("rt_detr")
    kd = Distiller(student, teacher, gk())
    assert kd.loss.rdm.strides == (8, 16, 32)  # P6 and P7 have no partner
    shown = []
    teacher.model.backbone.register_forward_pre_hook(lambda m, args: shown.append(args[0]))
    images = [torch.rand(3, 64, 80), torch.rand(3, 64, 64)]
    boxes = torch.tensor([[8.0, 8, 40, 56]])
    targets = [{"boxes": boxes, "labels": torch.tensor([i])} for i in range(2)]
    sum(student(images, targets).values())
    terms = kd(images, targets)
    assert all(v.isfinite() for v in terms.values())
    assert shown[0].shape[2] % 32 == shown[0].shape[3] % 32 == 0
    transformed = student.transform(images)[0]
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET.mean, IMAGENET.std))
    for i, (height, width) in enumerate(transformed.image_sizes):
        rgb = transformed.tensors[i, :, :height, :width] * std + mean
        torch.testing.assert_close(shown[0][i, :, :height, :width], rgb, atol=1e-5, rtol=0)
        assert shown[0][i, :, height:].eq(0).all() and shown[0][i, :, :, width:].eq(0).all()
    assert shown[0].min() > -1e-5 and shown[0].max() < 1 + 1e-5


@pytest.mark.parametrize("student", ["rt_detr", "detr"])
@pytest.mark.parametrize("teacher", ["rt_detr", "deformable_detr", "yolos"])
def test_unlike_families_are_paired_by_stride(student, teacher):
    pair = detector(student), detector(teacher, **({"d_model": 64} if teacher != "yolos" else {}))
    if not set(STRIDES[student]) & set(STRIDES[teacher]):
        with pytest.raises(ValueError, match="levels of about equal stride"):
            Distiller(*pair, gk())
        return
    kd = Distiller(*pair, gk())
    assert kd.loss.rdm.strides == tuple(s for s in STRIDES[student] if s in STRIDES[teacher])
    batch = batch_of(student)
    pair[0].train()(**batch)
    assert all(v.isfinite() for v in kd(batch).values())


def test_the_pixels_that_a_user_knows_better_are_taken():
    kd = Distiller(detector("rt_detr"), detector("rt_detr"), gk(), student_pixels=IMAGENET)
    assert kd._pair.student.pixels == IMAGENET and kd._pair.teacher.pixels == Pixels()


def test_a_teacher_in_half_precision_takes_the_students_images():
    student, teacher = detector("detr"), detector("detr").to(torch.bfloat16)
    kd = Distiller(student, teacher, gk())
    batch = batch_of("detr")
    student.train()(**batch)
    assert all(v.isfinite() for v in kd(batch).values())


def test_what_does_not_fit_is_named():
    student, teacher, batch = detector("detr"), detector("detr"), batch_of("detr")
    kd = Distiller(student, teacher, gk())
    unlabelled = {k: v for k, v in batch.items() if k != "labels"}
    student.train()(**unlabelled)
    with pytest.raises(ValueError, match="labels: expected one mapping per image"):
        kd(unlabelled)
    student(**batch)
    with pytest.raises(ValueError, match="expected the batch that the student was called with"):
        kd(batch["pixel_values"], batch["labels"])
    with pytest.raises(ValueError, match="never fired; run this .* itself first"):
        kd(batch)
    small = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    for model in (transformers.ViTForImageClassification(small), student.model):
        with pytest.raises(ValueError, match=r"rt_detr, .* but got \w+ of .*teacher_path, or with"):
            Distiller(model, teacher, gk())


def test_nothing_is_left_behind():
    student = detector("deformable_detr")
    before = sum(len(m._forward_hooks) for m in student.modules())
    kd = Distiller(student, detector("deformable_detr"), gk())
    kd.detach()
    assert sum(len(m._forward_hooks) for m in student.modules()) == before


def page_blocks():
    page = Path(__file__).parents[2] / "docs" / "transformers.md"
    return [block.source for block in blocks_of(page.read_text(encoding="utf-8"))]


def test_the_loop_of_the_page_runs():
    student, teacher = detector("rt_detr"), detector("rt_detr")
    loader = [batch_of("rt_detr")] * 2
    before = copy.deepcopy(student.state_dict())
    names = {"torch": torch, "Distiller": Distiller, "GlobalKnowledgeLoss": GlobalKnowledgeLoss}
    names |= {"student": student, "teacher": teacher, "loader": loader}
    exec(page_blocks()[1], names)
    assert set(names["terms"]) == {"kd_foreground", "kd_background", "kd_logits"}
    assert any(not torch.equal(v, before[k]) for k, v in student.state_dict().items())


@pytest.mark.parametrize("name", ["rt_detr", "detr", "yolos"])
def test_another_batch_than_the_students_is_refused(name):
    student, batch = detector(name).train(), batch_of(name)
    kd = Distiller(student, detector(name), gk(logits=0))
    labels = batch["labels"]
    fewer = [{**x, "boxes": x["boxes"][:1], "class_labels": x["class_labels"][:1]} for x in labels]
    for changed in (
        {"labels": labels[:2]},
        {"labels": [*labels, labels[0]]},
        {"labels": labels[::-1]},
        {"labels": fewer},
        {"pixel_values": batch["pixel_values"].flip(0)},
        {"pixel_values": batch["pixel_values"][:2], "labels": labels[:2]},
        {"pixel_values": batch["pixel_values"][:, :, :64]},
    ):
        student(**batch)
        with pytest.raises(ValueError, match="^(images|labels|pixel_values)"):
            kd({**batch, **changed})
    student(**batch)
    assert kd(dict(batch))


def test_fewer_labels_than_images_are_refused_in_a_pass():
    kd = Distiller(detector("rt_detr"), detector("rt_detr"), gk(logits=0))
    batch = batch_of("rt_detr")
    with pytest.raises(ValueError, match="labels: expected 3 entries"):
        kd.refresh([{**batch, "labels": batch["labels"][:2]}], progress=False)


@pytest.mark.parametrize("name", ["rt_detr", "detr"])
def test_labels_are_those_of_their_own_image(name):
    """A class more in one image and one less in the next would move to another picture."""
    kd = Distiller(detector(name), detector(name), gk(logits=0))
    batch = batch_of(name)
    entries = [{"boxes": x["boxes"], "class_labels": x["class_labels"]} for x in batch["labels"]]
    whole = torch.cat([x["class_labels"] for x in entries])
    counts = [len(x["boxes"]) for x in entries]
    counts[counts.index(max(counts))] -= 1
    counts[counts.index(min(counts))] += 1
    moved = [{**x, "class_labels": c} for x, c in zip(entries, whole.split(counts))]
    boxes, classes = entries[0]["boxes"], entries[0]["class_labels"]
    for wrong, message in (
        (moved, r"labels\[\d\]: expected 'boxes' \(r, 4\) and 'class_labels' \(r,\), one for"),
        (
            [{**entries[0], "class_labels": classes[:, None]}, *entries[1:]],
            r"labels\[0\]: expected",
        ),
        ([{**entries[0], "boxes": boxes[0]}, *entries[1:]], r"labels\[0\]: expected 'boxes'"),
        ([{"boxes": boxes, "labels": classes}, *entries[1:]], r"labels\[0\]: expected tensors"),
        ([{**entries[0], "boxes": boxes.tolist()}, *entries[1:]], "got {'boxes': 'list', 'class"),
        ([{**entries[0], "class_labels": classes.float()}, *entries[1:]], "expected an int64"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            kd.refresh([{**batch, "labels": wrong}], progress=False)


def test_an_image_without_objects_has_labels_of_any_dtype():
    kd = Distiller(detector("rt_detr"), detector("rt_detr"), gk(logits=0))
    batch = batch_of("rt_detr")
    none = {"boxes": torch.zeros(0, 4), "class_labels": torch.zeros(0)}
    expected, _ = kd.weigh(
        {
            **batch,
            "labels": [{**none, "class_labels": none["class_labels"].long()}, *batch["labels"][1:]],
        }
    )
    found, _ = kd.weigh({**batch, "labels": [none, *batch["labels"][1:]]})
    assert found.labels.dtype == torch.int64 and torch.equal(found.labels, expected.labels)
    assert torch.equal(found.boxes, expected.boxes)


def test_classes_in_another_order_are_not_compared():
    """Equal in number and in name: soft labels would teach a dog what the teacher says of a cat."""
    student = detector("rt_detr", id2label={0: "cat", 1: "dog", 2: "cow"})
    teacher = detector("rt_detr", id2label={0: "dog", 1: "Cat", 2: "cow"})
    message = "^teacher: .* class 0 is 'cat' in the student and 'dog' in the teacher: .*logits=0"
    for loss in (gk(), SoftLabels(), GID()):
        with pytest.raises(ValueError, match=message):
            Distiller(student, teacher, loss)
    assert Distiller(student, teacher, gk(logits=0)).losses
    for other in ({0: "CAT", 1: "dog", 2: "cow"}, {0: "a", 1: "b", 2: "c"}):
        assert Distiller(student, detector("rt_detr", id2label=other), gk()).losses
