"""Any detector by a module's name: the layout of its maps, and the batch it is asked about."""

import pytest
import torch
from torch import nn

from global_kd import Targets
from global_kd.detectors import ModuleDetector, View, as_targets

IMAGES = torch.rand(2, 3, 64, 80)
BOXES = torch.tensor([[0.0, 0.0, 8.0, 8.0]])
ONE = {"boxes": BOXES, "labels": torch.tensor([1])}


class Swin(nn.Module):
    """Stages that keep channels last."""

    def __init__(self, channels=(24, 48), permuted=True):
        super().__init__()
        self.stages, self.permuted = Stages(channels, permuted), permuted
        self.head = nn.Linear(channels[-1], 2)

    def forward(self, x):
        x = self.stages(x)[-1]
        return self.head(x if self.permuted else x.permute(0, 2, 3, 1))


class Stages(nn.Module):
    def __init__(self, channels, permuted):
        super().__init__()
        self.permuted = permuted
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, s, s)
            for a, b, s in zip((3, *channels), channels, (4, 2, 2), strict=False)
        )

    def forward(self, x):
        maps = [x := conv(x) for conv in self.convs]
        return [y.permute(0, 2, 3, 1) for y in maps] if self.permuted else maps


@pytest.mark.parametrize("channels", [(24, 48), (96, 192), (16, 32), (7, 11)])
@pytest.mark.parametrize("size", [(64, 80), (64, 64), (100, 76), (32, 32)])
def test_channels_last_are_asked_about_and_read_when_told(channels, size):
    """16 x 20 cells of 24 channels look like 16 channels on a grid of 20 x 24."""
    model, images = Swin(channels), torch.rand(2, 3, *size)
    with pytest.raises(ValueError, match=r"student_path: .*Is this \(B, H, W, C\)\?") as caught:
        ModuleDetector(model, "stages", (images,), argument="student_path")
    assert 'student_layout="BHWC"' in str(caught.value)
    assert not any(m._forward_hooks for m in model.modules())  # refused, it leaves nothing
    told = ModuleDetector(model, "stages", (images,), layout="BHWC")
    maps = told.look(View(images)).maps
    assert [x.shape[1] for x in maps] == list(channels)
    for x, y in zip(maps, model.stages(images), strict=True):
        assert torch.equal(x, y.permute(0, 3, 1, 2))
    tapped = {"features": model.stages(images)}
    read = told.read(tapped, images, [ONE, ONE], frozenset()).look.maps
    assert all(map(torch.equal, read, maps))


@pytest.mark.parametrize("size", [(64, 80), (100, 76), (97, 131), (224, 416)])
def test_channels_first_are_taken_as_they_are(size):
    images = torch.rand(2, 3, *size)
    for path in ("stages", "stages.convs.0"):
        ModuleDetector(Swin(permuted=False), path, (images,))


def test_a_layout_needs_a_name_and_is_one_of_two():
    with pytest.raises(ValueError, match="layout: expected one of 'BCHW', 'BHWC'"):
        ModuleDetector(Swin(), "stages", (IMAGES,), layout="NHWC")
    with pytest.raises(ValueError, match="layout: expected a named module.*student_path=None"):
        ModuleDetector(Swin(), None, (IMAGES,), layout="BHWC", argument="student_path")


def test_as_many_targets_as_images():
    device = torch.device("cpu")
    with pytest.raises(ValueError, match="targets: expected 2 dictionaries.*but got 1"):
        as_targets([ONE], device, num_images=2)
    with pytest.raises(ValueError, match="targets: expected 2 dictionaries.*but got 3"):
        as_targets([ONE] * 3, device, num_images=2)
    packed = Targets.from_list([ONE])
    assert as_targets(packed, device, num_images=2) is packed  # images without boxes: none knows


def test_targets_and_images_of_the_forward_that_was_recorded():
    model = Swin(permuted=False)
    detector = ModuleDetector(model, "stages", (IMAGES,))
    tapped = {"features": model.stages(IMAGES[:1])}
    with pytest.raises(ValueError, match="images: expected the 1 images .*but got 2"):
        detector.read(tapped, IMAGES, [ONE, ONE], frozenset())
    with pytest.raises(ValueError, match="targets: expected 1 dictionaries.*but got 2"):
        detector.read(tapped, IMAGES[:1], [ONE, ONE], frozenset())
    with pytest.raises(ValueError, match="targets: expected 2 dictionaries.*but got 1"):
        detector.observe(IMAGES, [ONE])


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_images_of_any_number_of_channels(channels):
    model = nn.Sequential(nn.Conv2d(channels, 4, 8, 8))
    images = torch.rand(1, channels, 32, 32)
    detector = ModuleDetector(model, "0", (images,))
    assert torch.equal(detector.look(detector.example()).maps[0], model(images))


def test_a_named_module_without_maps_is_told_at_once():
    model = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(), nn.Linear(4 * 16, 2))
    with pytest.raises(ValueError, match="puts out maps .*but '1' puts out a Tensor without"):
        ModuleDetector(model, "1", (torch.rand(1, 3, 32, 32),))


def test_maps_that_can_be_read_once_are_told():
    """A generator: whoever records it takes it from the head."""
    model = nn.Sequential(Once(), Last())
    with pytest.raises(ValueError, match="'0' puts out a map without any; let it return a list"):
        ModuleDetector(model, "0", (torch.rand(1, 3, 32, 32),))


@pytest.mark.parametrize("path", [None, "1"])
def test_a_model_that_squeezes_its_images_is_refused(path):
    stages = Swin(permuted=False).stages
    model = nn.Sequential(nn.Upsample(size=(64, 64)), stages, Last())
    ModuleDetector(model, path, (torch.rand(1, 3, 128, 128),))
    with pytest.raises(ValueError, match="does the model resize its images inside"):
        ModuleDetector(model, path, (torch.rand(1, 3, 96, 160),))


class Last(nn.Module):
    """A head that takes a pyramid and gives a number."""

    def forward(self, maps):
        return sum(x.mean() for x in maps)


class Once(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 4, s, s) for s in (8, 16))

    def forward(self, x):
        return map(lambda conv: conv(x), self.convs)
