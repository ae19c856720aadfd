"""`find_pyramids` on detectors of other frameworks: random weights, no downloads."""

import pytest
import torch

from global_kd import FeatureTap, Pyramid, find_pyramids
from global_kd.hooks import level_shapes, pyramid_maps, tokens_to_maps

STRIDES = (8.0, 16.0, 32.0)
IMAGE = (1, 3, 128, 160)


def backbone(transformers, stages=(2, 3, 4)):
    return transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=[f"stage{i}" for i in stages],
    )


SMALL = {
    "backbone": None,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 10,
    "num_labels": 5,
}


@pytest.mark.parametrize("kind", ["RTDetr", "RTDetrV2", "DFine"])
def test_hybrid_encoders(kind):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"this transformers has no {kind}")
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=backbone(transformers),
        encoder_in_channels=[16, 24, 32],
        encoder_hidden_dim=32,
        decoder_in_channels=[32, 32, 32],
        num_denoising=0,
        **SMALL | {"encoder_layers": 1},
    )
    model = getattr(transformers, f"{kind}ForObjectDetection")(config)
    first, *others = find_pyramids(model, pixel_values=torch.rand(IMAGE))
    assert first == Pyramid("model.encoder", STRIDES, (32, 32, 32))
    assert first.confidence == 1.0
    assert all(p.confidence <= 0.5 for p in others)  # its input, the backbone


# (100, 150): the coarsest level has 2 x 3 cells, 50 pixels each if the strides were not a ladder.
@pytest.mark.parametrize("size", [(128, 160), (100, 150)])
@pytest.mark.parametrize("levels, two_stage", [(4, False), (4, True), (3, False)])
def test_tokens_of_deformable_detr(size, levels, two_stage):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DeformableDetrConfig(
        backbone_config=backbone(transformers),
        num_feature_levels=levels,
        two_stage=two_stage,
        with_box_refine=two_stage,
        **SMALL,
    )
    model = transformers.DeformableDetrForObjectDetection(config).eval()
    images = torch.rand(1, 3, *size)
    first, *others = find_pyramids(model, pixel_values=images)
    strides = (8.0, 16.0, 32.0, 64.0)[:levels]
    assert first == Pyramid("model.encoder", strides, (32,) * levels, "tokens")
    assert first.confidence == 1.0
    assert [(p.path, p.confidence) for p in others] == [("model.backbone", 0.38)]

    # The levels lie one after another, finest first: what the encoder takes in undoes to the
    # projected maps.
    taken = []
    handle = model.model.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: taken.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    paths = ["model.encoder", *(f"model.input_proj.{i}" for i in range(levels))]
    with FeatureTap(model, paths) as tap:
        model(pixel_values=images)
        recorded = tap.read()
    handle.remove()
    for ours, theirs in zip(tokens_to_maps(taken[0], level_shapes(size, strides)), paths[1:]):
        assert torch.equal(ours, recorded[theirs])
    maps = pyramid_maps(first, recorded["model.encoder"], size)
    assert [x.shape for x in maps] == [recorded[path].shape for path in paths[1:]]


def test_detr_and_yolos_have_one_scale():
    transformers = pytest.importorskip("transformers")
    config = transformers.DetrConfig(backbone_config=backbone(transformers, (4,)), **SMALL)
    model = transformers.DetrForObjectDetection(config)
    assert find_pyramids(model, pixel_values=torch.rand(IMAGE)) == []
    config = transformers.YolosConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[64, 96],
        num_detection_tokens=10,
    )
    model = transformers.YolosForObjectDetection(config)
    assert find_pyramids(model, pixel_values=torch.rand(1, 3, 64, 96)) == []


@pytest.mark.parametrize("name, path", [("yolov8n", "model.22"), ("yolo11n", "model.23")])
def test_ultralytics_heads_take_the_pyramid_in(name, path):
    tasks = pytest.importorskip("ultralytics.nn.tasks", exc_type=ImportError)
    model = tasks.DetectionModel(f"{name}.yaml", verbose=False).train()
    images = torch.rand(IMAGE)
    (pyramid,) = find_pyramids(model, images)
    assert pyramid == Pyramid(path, STRIDES, (64, 128, 256), "input")
    assert pyramid.confidence == 0.75
    assert model.training
    with FeatureTap(model, path, inputs=[path]) as tap:
        recorded = tap.run(images)[path]
    maps = pyramid_maps(pyramid, recorded, images.shape[-2:])
    assert [x.shape[1] for x in maps] == [64, 128, 256]


@pytest.mark.parametrize(
    "name, strides, channels",
    [
        ("faster_rcnn_R_50_FPN_1x", (4.0, 8.0, 16.0, 32.0, 64.0), (256,) * 5),
        ("retinanet_R_50_FPN_1x", (8.0, 16.0, 32.0, 64.0, 128.0), (256,) * 5),
        ("faster_rcnn_R_50_C4_1x", (), ()),  # heads on one scale
    ],
)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_detectron2(name, strides, channels):
    pytest.importorskip("detectron2")
    from detectron2 import model_zoo
    from detectron2.modeling import build_model

    config = model_zoo.get_config(f"COCO-Detection/{name}.yaml")
    config.MODEL.WEIGHTS, config.MODEL.DEVICE = "", "cpu"
    model = build_model(config)
    found = find_pyramids(model, [{"image": torch.rand(3, 128, 160) * 255}])
    if not strides:
        assert found == []
        return
    assert found[0] == Pyramid("backbone", strides, channels)
    assert found[0].confidence == 1.0
    assert [(p.path, p.confidence) for p in found[1:]] == [("backbone.bottom_up", 0.38)]
