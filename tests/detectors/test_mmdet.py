"""MMDetection's structures in miniature: its compiled operations are not to be had everywhere.

The stand-ins keep to MMDetection 3.3: a ``DetDataPreprocessor`` that turns BGR bytes into padded,
normalised batches, ``DetDataSample`` with ``gt_instances`` and ``metainfo``, a detector of
backbone, neck and head with one ``forward`` of several modes.
"""

import copy
import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from global_kd import Distiller, Pixels
from global_kd.detectors import View
from global_kd.detectors.mmdet import MMDetDetector
from global_kd.functional import pool_boxes
from tests.small_loss import small_loss

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # RGB


class HorizontalBoxes:
    """A box structure that is no tensor."""

    def __init__(self, boxes):
        self.tensor = boxes


class DetDataSample:
    def __init__(self, metainfo=None):
        self.metainfo = dict(metainfo or {})


class Preprocessor(nn.Module):
    def __init__(self, bgr_to_rgb=True, divisor=32, pad_value=0):
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(-1, 1, 1), False)
        self.register_buffer("std", torch.tensor(STD).view(-1, 1, 1), False)
        self._channel_conversion = bgr_to_rgb
        self.pad_size_divisor, self.pad_value = divisor, pad_value

    def forward(self, data, training=False):
        images = [x.flip(0) if self._channel_conversion else x for x in data["inputs"]]
        images = [(x.float() - self.mean) / self.std for x in images]
        height, width = (
            -(-max(x.shape[d] for x in images) // self.pad_size_divisor) * self.pad_size_divisor
            for d in (1, 2)
        )
        inputs = torch.full((len(images), 3, height, width), float(self.pad_value))
        for x, image in zip(inputs, images):
            x[:, : image.shape[1], : image.shape[2]] = image
        samples = copy.deepcopy(data["data_samples"])
        for sample in samples:
            sample.metainfo["batch_input_shape"] = (height, width)
        return {"inputs": inputs, "data_samples": samples}


class Backbone(nn.Module):
    def __init__(self, width, channels=3):
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 4, stride=4)
        self.stages = nn.ModuleList(nn.Conv2d(width, width, 2, stride=2) for _ in range(2))

    def forward(self, x):
        x = self.stem(x)
        outputs = []
        for stage in self.stages:
            x = stage(x).relu()
            outputs.append(x)
        return tuple(outputs)


class Neck(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, 2 * width, 1) for _ in range(2))

    def forward(self, maps):
        return tuple(conv(x) for conv, x in zip(self.convs, maps))


class Detector(nn.Module):
    """Forward, losses and predictions as ``SingleStageDetector`` has them."""

    def __init__(self, width=4, neck=True, **preprocessor):
        super().__init__()
        self.data_preprocessor = Preprocessor(**preprocessor)
        self.backbone = Backbone(width)
        self.neck = Neck(width) if neck else None
        self.bbox_head = nn.Conv2d(2 * width if neck else width, 3, 1)

    def extract_feat(self, inputs):
        maps = self.backbone(inputs)
        return self.neck(maps) if self.neck is not None else maps

    def forward(self, inputs, data_samples=None, mode="tensor"):
        return getattr(self, mode)(inputs, data_samples)

    def loss(self, inputs, data_samples):
        scores = [self.bbox_head(x) for x in self.extract_feat(inputs)]
        return {"loss_cls": [x.square().mean() for x in scores], "acc": torch.tensor(50.0)}

    def parse_losses(self, losses):
        parts = {k: sum(v) if isinstance(v, list) else v for k, v in losses.items()}
        return sum(v for k, v in parts.items() if "loss" in k), parts

    def predict(self, inputs, data_samples, rescale=True):
        assert not self.training
        assert not rescale
        self.extract_feat(inputs)
        for sample in data_samples:
            height, width = sample.metainfo["img_shape"]
            assert sample.metainfo["batch_input_shape"] == tuple(inputs.shape[-2:])
            sample.pred_instances = SimpleNamespace(
                bboxes=torch.tensor([[0.0, 0.0, width, height]]),
                scores=torch.tensor([0.5]),
                labels=torch.tensor([2]),
            )
        return data_samples


Detector.__module__ = "mmdet.models.detectors.single_stage"


def data(horizontal=True):
    """BGR bytes, as the data pipeline yields them; a red rectangle in the second image."""
    images = [torch.full((3, h, w), 50, dtype=torch.uint8) for h, w in ((64, 96), (96, 80))]
    images[1][2, 16:48, 32:64] = 250
    samples = []
    for i, image in enumerate(images):
        sample = DetDataSample({"img_shape": tuple(image.shape[1:])})
        boxes = torch.tensor([[32.0, 16, 64, 48]])[:i]
        sample.gt_instances = SimpleNamespace(
            bboxes=HorizontalBoxes(boxes) if horizontal else boxes,
            labels=torch.zeros(i, dtype=torch.int64),
        )
        samples.append(sample)
    return {"inputs": images, "data_samples": samples}


gk = partial(small_loss, 3, finest_scale=None)


@pytest.mark.parametrize("neck", [True, False])
def test_a_few_steps_of_training(neck):
    torch.manual_seed(0)
    student, teacher = Detector(4, neck), Detector(8)
    keys, frozen = list(student.state_dict()), copy.deepcopy(teacher.state_dict())
    kd = Distiller(student, teacher, gk())
    assert kd.loss.rdm.strides == (8, 16)
    optimizer = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=1e-2)
    start = student.backbone.stem.weight.clone()
    for _ in range(4):
        batch = student.data_preprocessor(data(), True)
        losses = student(**batch, mode="loss")
        terms = kd(batch["inputs"], batch["data_samples"])
        assert set(terms) == {"kd_foreground", "kd_background", "kd_relation"}
        assert all(v.isfinite() for v in terms.values())
        optimizer.zero_grad()
        (student.parse_losses(losses)[0] + sum(terms.values())).backward()
        optimizer.step()
    assert not torch.equal(student.backbone.stem.weight, start)
    assert all(torch.equal(v, frozen[k]) for k, v in teacher.state_dict().items())
    assert list(student.state_dict()) == keys
    Detector(4, neck).load_state_dict(student.state_dict())


@pytest.mark.parametrize("horizontal", [True, False])
def test_boxes_are_in_pixels_of_the_padded_input(horizontal):
    torch.manual_seed(0)
    student = Detector()
    kd = Distiller(student, Detector(8), gk())
    truth, _ = kd.weigh(data(horizontal))  # a batch as the data loader yields it
    assert truth.boxes.tolist() == [[32, 16, 64, 48]]
    assert (truth.labels.tolist(), truth.image_index.tolist()) == ([0], [1])
    seen = kd._pair.student.observe(data(horizontal), None)
    assert seen.look.view.size == (96, 96)
    assert seen.look.view.sizes == [(64, 96), (96, 80)]
    rgb = kd._pair.student.pixels.convert(seen.look.view.images, Pixels())
    torch.testing.assert_close(rgb[1, 0, 16:48, 32:64], torch.full((32, 32), 250 / 255))
    rgb[1, 0, 16:48, 32:64] = 50 / 255
    torch.testing.assert_close(rgb[1, :, :, :80], torch.full((3, 96, 80), 50 / 255))
    # A map that keeps the brightness of red: only the cells of the box see it.
    with torch.no_grad():
        for layer in (student.backbone.stem, *student.backbone.stages, *student.neck.convs):
            layer.bias.zero_()
            layer.weight.fill_(1 / layer.weight[0].numel())
        seen = kd._pair.student.observe(data(horizontal), None)
    finest = seen.look.maps[0]
    inside = pool_boxes(finest, seen.truth.boxes, seen.truth.image_index, 8)[0, 0]
    assert (finest[1, 0, 2:6, 4:8] == inside).all()
    assert (finest > inside / 2).sum() == finest.shape[1] * 16


def test_pixels_are_those_of_the_data_preprocessor():
    rgb, bgr = Detector(), Detector(bgr_to_rgb=False, divisor=64, pad_value=114)
    assert MMDetDetector(rgb).pixels == Pixels(
        tuple(torch.tensor(MEAN).tolist()), tuple(torch.tensor(STD).tolist()), scale=255
    )
    reader = MMDetDetector(bgr)
    assert (reader.pixels.bgr, reader.pixels.pad, reader.divisor) == (True, 114, 64)
    image = torch.rand(1, 3, 32, 32)
    raw = {"inputs": [(image[0].flip(0) * 255)], "data_samples": []}
    for model in (rgb, bgr):
        theirs = model.data_preprocessor(raw)["inputs"][:, :, :32, :32]
        ours = Pixels().convert(image, MMDetDetector(model).pixels)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    bgr.data_preprocessor.mean = bgr.data_preprocessor.std = None  # YOLOX: bytes as they are
    assert MMDetDetector(bgr).pixels == Pixels(scale=255, bgr=True, pad=114)


def test_a_student_that_is_its_teacher_loses_nothing():
    torch.manual_seed(0)
    student = Detector()
    kd = Distiller(student, copy.deepcopy(student), gk(adapter="identity"))
    for _ in range(4):
        batch = student.data_preprocessor(data(), True)
        student(**batch, mode="loss")
        terms = kd(batch["inputs"], batch["data_samples"])
    assert kd.loss.bank.valid.any()
    assert {k: pytest.approx(0, abs=1e-6) for k in terms} == {k: v.item() for k, v in terms.items()}


def test_losses_and_detections(monkeypatch):
    structures = ModuleType("mmdet.structures")
    structures.DetDataSample = DetDataSample
    monkeypatch.setitem(sys.modules, "mmdet", ModuleType("mmdet"))
    monkeypatch.setitem(sys.modules, "mmdet.structures", structures)
    student = Detector()
    reader = MMDetDetector(student)
    batch = student.data_preprocessor(data(), True)
    expected = sum(student(**batch, mode="loss")["loss_cls"])
    torch.testing.assert_close(reader.losses(batch["inputs"], batch["data_samples"]), expected)
    found = reader.detections(reader.observe(data(), None).look.view)
    assert [x.boxes.tolist() for x in found] == [[[0, 0, 96, 64]], [[0, 0, 80, 96]]]
    assert [x.labels.tolist() for x in found] == [[2], [2]]
    assert student.training
    half, view = MMDetDetector(Detector().half()), View(batch["inputs"])
    assert len(half.detections(view)) == len(half.look(view).maps[0]) == 2


def test_what_does_not_fit_is_named():
    student, teacher = Detector(), Detector(8)
    kd = Distiller(student, teacher, gk())
    batch = student.data_preprocessor(data(), True)
    inputs, samples = batch["inputs"], batch["data_samples"]
    student.loss(inputs, samples)  # not through forward
    with pytest.raises(ValueError, match="never fired; run this .* itself first"):
        kd(inputs, samples)
    student(inputs, samples, mode="loss")
    with pytest.raises(ValueError, match="targets: expected the data samples.*got NoneType"):
        kd(inputs)
    student(inputs, samples, mode="loss")
    with pytest.raises(ValueError, match=r"images: expected the inputs .* but got dict"):
        kd(batch, samples)
    wrapper = nn.Module()
    wrapper.student = student
    wrapper.__class__ = type("SemiBaseDetector", (nn.Module,), {"__module__": "mmdet.models"})
    with pytest.raises(ValueError, match="detector with a backbone"):
        Distiller(wrapper, teacher, gk())


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels(channels):
    model = Detector()
    model.backbone = Backbone(4, channels)
    del model.data_preprocessor.mean, model.data_preprocessor.std
    model.data_preprocessor.mean = model.data_preprocessor.std = None
    reader = MMDetDetector(model)
    assert reader.example().images.shape[1] == channels
    assert len(reader.look(reader.example()).maps) == 2
    assert reader.pixels.convert(torch.rand(1, channels, 4, 4), Pixels(scale=255)).isfinite().all()


def test_another_batch_than_the_students_is_refused():
    student, teacher = Detector(4).train(), Detector(8)
    kd = Distiller(student, teacher, small_loss(2, logits=0))
    batch = student.data_preprocessor(data(), True)
    images, samples = batch["inputs"], batch["data_samples"]
    moved = copy.deepcopy(samples)
    moved[1].gt_instances.bboxes.tensor += 1
    for given in (
        (images, samples[:1]),
        (images, samples[::-1]),
        (images.flip(0), samples),
        (images[:1], samples[:1]),
        (images, moved),
        (images, [*samples, samples[0]]),
    ):
        student(images, samples, mode="loss")
        with pytest.raises(ValueError, match="^(images|targets)"):
            kd(*given)
    student(inputs=images, data_samples=samples, mode="loss")
    assert kd(images.clone(), copy.deepcopy(samples))


def test_a_teacher_in_half_precision():
    student, teacher = Detector(4), Detector(8).bfloat16()
    kd = Distiller(student, teacher, gk())
    batch = student.data_preprocessor(data(), True)
    student(**batch, mode="loss")
    terms = kd(batch["inputs"], batch["data_samples"])
    assert all(x.isfinite() and x.dtype == torch.float32 for x in terms.values())
