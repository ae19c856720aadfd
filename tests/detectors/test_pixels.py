"""What passes between a student and a teacher of unlike pixels, scales and grids."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from global_kd import Distiller, GlobalKnowledgeLoss, Pixels, Targets
from global_kd.detectors import IMAGENET, ModuleDetector, View, translate
from global_kd.functional import pool_boxes
from global_kd.losses import PKD

RGB = torch.rand(2, 3, 40, 56)
BYTES_BGR = Pixels(mean=(103.53, 116.28, 123.675), std=(57.4, 57.1, 58.4), scale=255, bgr=True)


def network_input(pixels, rgb=RGB):
    """The definition: what a framework's own preprocessing would make."""
    x = rgb.flip(1) if pixels.bgr else rgb
    mean, std = (torch.tensor(v)[:, None, None] for v in (pixels.mean, pixels.std))
    return (x * pixels.scale - mean) / std


class Eyes:
    """As much of a detector as `translate` looks at."""

    def __init__(self, pixels, divisor=1):
        self.pixels, self.divisor = pixels, divisor


FORMATS = [Pixels(), IMAGENET, BYTES_BGR]


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("target", FORMATS)
def test_pixels_of_one_network_become_those_of_another(source, target):
    view = translate(View(network_input(source)), source, Eyes(target))
    torch.testing.assert_close(view.images, network_input(target), atol=1e-4, rtol=1e-4)
    if source == target:
        assert torch.equal(view.images, network_input(source))


def test_padding_becomes_the_teachers():
    sizes = [(40, 30), (20, 56)]
    target = Pixels(pad=0.45)
    view = translate(View(network_input(IMAGENET), sizes), IMAGENET, Eyes(target, divisor=32))
    assert view.images.shape == (2, 3, 64, 64)
    for image, rgb, (h, w) in zip(view.images, RGB, sizes, strict=True):
        torch.testing.assert_close(image[:, :h, :w], rgb[:, :h, :w], atol=1e-5, rtol=1e-5)
        assert (image[:, h:] == 0.45).all() and (image[:, :, w:] == 0.45).all()
    inside = view.inside()
    assert [int(x.sum()) for x in inside] == [40 * 30, 20 * 56]
    as_tensor = View(view.images, torch.tensor(sizes)).inside()
    assert torch.equal(as_tensor, inside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_padding_becomes_the_teachers_where_no_value_changes(dtype):
    sizes, images = [(40, 30), (20, 56)], (255 * RGB).to(dtype)
    grey = Pixels(scale=255, pad=114)
    view = translate(View(images, sizes), Pixels(scale=255), Eyes(grey))
    for image, given, (h, w) in zip(view.images, images, sizes, strict=True):
        assert torch.equal(image[:, :h, :w], given[:, :h, :w].to(image.dtype))
        assert (image[:, h:] == 114).all() and (image[:, :, w:] == 114).all()
    assert torch.equal(images, (255 * RGB).to(dtype))  # the student's own stay as they are


def test_a_canvas_without_sizes_gets_them_when_it_is_padded():
    view = translate(View(RGB), None, Eyes(None, divisor=32))
    assert [tuple(s) for s in view.sizes] == [(40, 56)] * 2
    assert torch.equal(view.images[:, :, :40, :56], RGB)
    assert translate(View(RGB), None, Eyes(None)).images is RGB


@pytest.mark.parametrize("sizes", [[(40, 30), (20, 56)], torch.tensor([[40, 30], [20, 56]])])
def test_scale(sizes):
    view = translate(View(RGB, sizes), None, Eyes(None), scale=2.0)
    assert view.images.shape == (2, 3, 80, 112)
    assert torch.as_tensor(view.sizes).tolist() == [[80, 60], [40, 112]]
    ramp = torch.arange(56.0).expand(1, 3, 40, 56)
    seen = translate(View(ramp), None, Eyes(None), scale=0.5).images
    # Half-pixel centres: the mean of each pair of columns, away from the border.
    torch.testing.assert_close(seen[0, 0, 5, 2:-2], torch.arange(0.5, 56, 2)[2:-2])


def test_one_known_format_beside_an_unknown_one_is_refused():
    with pytest.raises(ValueError, match=r"teacher_pixels: expected the pixel format of the teach"):
        translate(View(RGB), IMAGENET, Eyes(None))
    with pytest.raises(ValueError, match=r"student_pixels: expected the pixel format of the stude"):
        translate(View(RGB), None, Eyes(IMAGENET))
    with pytest.raises(ValueError, match=r"images: expected a batch \(B, C, H, W\) to feed"):
        translate(View([RGB]), None, Eyes(None), scale=2)


# --- any dtype, any number of channels --------------------------------------------------------

BYTES = torch.randint(0, 256, (2, 3, 40, 56), dtype=torch.uint8)
RGB_255 = Pixels(scale=255)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
@pytest.mark.parametrize("source", [RGB_255, replace(IMAGENET, pad=0.5), BYTES_BGR])
@pytest.mark.parametrize("target", [RGB_255, IMAGENET, BYTES_BGR, Pixels(pad=114 / 255)])
@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0])
def test_integers_give_the_numbers_of_floats(dtype, source, target, scale):
    views = [
        translate(View(x, [(40, 30), (20, 56)]), source, Eyes(target, divisor=32), scale=scale)
        for x in (BYTES.to(dtype), BYTES.float())
    ]
    assert views[0].images.isfinite().all()
    assert torch.equal(views[0].images.float(), views[1].images)


def test_integers_stay_what_they_are_where_nothing_changes():
    assert translate(View(BYTES), None, Eyes(None)).images is BYTES
    assert translate(View(BYTES), None, Eyes(None, divisor=32)).images.dtype == torch.uint8
    padded = translate(View(BYTES), RGB_255, Eyes(replace(RGB_255, pad=0.5), divisor=32)).images
    assert (padded[:, :, 40:] == 0.5).all()


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_defaults_fit_every_number_of_channels(channels):
    x = torch.rand(2, channels, 8, 8)
    whole = Pixels(mean=tuple(range(channels)), std=(0.5,) * channels, scale=255)
    want = (x * 255 - torch.arange(float(channels))[:, None, None]) / 0.5
    for default in (Pixels(), Pixels(mean=(0.0,), std=(1.0,))):
        torch.testing.assert_close(default.convert(x, whole), want)
        torch.testing.assert_close(whole.convert(want, default), x)


def test_one_number_is_as_good_as_equal_ones():
    assert Pixels(mean=(0.5,), std=(1.0,)).same_values(Pixels(mean=(0.5, 0.5, 0.5)))
    assert not Pixels(mean=(0.5,)).same_values(Pixels(mean=(0.5, 0.5, 0.4)))


def test_grey_has_no_order_and_other_numbers_of_channels_tell_none():
    grey, four = torch.rand(1, 1, 4, 4), torch.rand(1, 4, 4, 4)
    assert torch.equal(Pixels(bgr=True).convert(grey, Pixels()), grey)
    with pytest.raises(ValueError, match=r"^bgr: expected .*4 channels"):
        Pixels(bgr=True).convert(four, Pixels())


@pytest.mark.parametrize("channels", [1, 4])
def test_statistics_of_other_channels_are_refused(channels):
    x = torch.rand(1, channels, 4, 4)
    with pytest.raises(ValueError, match=rf"^mean: expected {channels} numbers.*but got 3"):
        Pixels().convert(x, IMAGENET)
    with pytest.raises(ValueError, match=rf"^std: expected {channels} numbers.*but got 3"):
        Pixels(std=(1.0, 2.0, 3.0)).convert(x, Pixels())


# --- a whole pair -----------------------------------------------------------------------------


class Brightness(nn.Module):
    """Every map is the mean brightness of each patch: what a cell holds can be read off."""

    def __init__(self, *strides, channels=3, odd=False):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.neck = Patches(strides, channels, odd)

    def forward(self, images):
        return self.neck(images * self.scale)


class Patches(nn.Module):
    def __init__(self, strides, channels, odd):
        super().__init__()
        self.strides, self.channels, self.odd = strides, channels, odd

    def forward(self, x):
        x = x.mean(dim=1, keepdim=True).expand(-1, self.channels, -1, -1)
        # `odd`: a partial cell at the right and bottom makes one of its own.
        return [nn.functional.avg_pool2d(x, s, ceil_mode=self.odd) for s in self.strides]


def ramp(height=60, width=92):
    """Brightness is the column, so that a mean tells where it was taken."""
    return torch.arange(float(width)).expand(2, 3, height, width).clone()


def paired(student, teacher, images, **options):
    loss = GlobalKnowledgeLoss(2, total_steps=9, adapter="identity")
    kd = Distiller(student, teacher, loss, example_inputs=(images,), **options)
    seen = kd._pair.student.look(View(images))
    with torch.no_grad():
        looked = kd._pair.look(seen.view)
    return kd, *kd._pair.maps(seen, looked)


@pytest.mark.parametrize("odd_one", ["student", "teacher"])
def test_a_grid_a_cell_larger_is_cut(odd_one):
    """60 x 92 at stride 8: 8 x 12 cells with the partial ones, 7 x 11 without."""
    student = Brightness(8, 16, odd=odd_one == "student")
    teacher = Brightness(8, 16, odd=odd_one == "teacher")
    kd, mine, theirs = paired(student, teacher, ramp())
    assert kd.loss.rdm.strides == (8, 16)
    assert [x.shape[2:] for x in mine] == [(7, 11), (3, 5)]
    for s, t in zip(mine, theirs, strict=True):
        assert torch.equal(s, t)
    boxes = Targets(torch.tensor([[8.0, 8, 92, 60]]), torch.tensor([1]), torch.tensor([1]))
    terms = kd.loss(mine, theirs, boxes)
    assert all(v == 0 for v in terms.values())
    sum(terms.values()).backward()
    assert student.scale.grad is not None


@pytest.mark.parametrize("scale", [2.0, 0.5, 1.5])
def test_a_teacher_at_another_resolution(scale):
    """Levels pair by their stride in the student's pixels, and cells see the same columns."""
    student, teacher = Brightness(8, 16), Brightness(4, 8, 16, 32)
    images = ramp(96, 192)
    kd, mine, theirs = paired(student, teacher, images, teacher_scale=scale)
    assert kd.loss.rdm.strides == (8, 16)
    for s, t in zip(mine, theirs, strict=True):
        assert s.shape == t.shape
        # Bilinear resizing keeps a ramp a ramp, but for the border.
        torch.testing.assert_close(s[..., 1:-1], t[..., 1:-1], atol=0.6, rtol=0)
        if scale != 1.5:
            assert (s - t).abs().mean() < 0.1
    pixel = pool_boxes(theirs[0], torch.tensor([[64.0, 0, 80, 96]]), torch.tensor([0]), 8)
    assert pixel[0, 0].item() == pytest.approx(71.5, abs=0.2)


def test_a_vit_of_stride_14_beside_a_pyramid():
    student, teacher = Brightness(8, 16, 32), Brightness(14, 28)
    kd, mine, theirs = paired(student, teacher, ramp(224, 448))
    assert kd.loss.rdm.strides == (16, 32)
    assert [x.shape[2:] for x in theirs] == [(14, 28), (7, 14)]
    for s, t in zip(mine, theirs, strict=True):
        torch.testing.assert_close(s[..., 1:-1], t[..., 1:-1], atol=1e-3, rtol=0)


def test_a_teacher_sees_its_own_pixels():
    seen = []
    student, teacher = Brightness(8), Brightness(8)
    teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    options = {"student_path": "neck", "teacher_path": "neck", "teacher_pixels": BYTES_BGR}
    paired(student, teacher, network_input(IMAGENET), student_pixels=IMAGENET, **options)
    torch.testing.assert_close(seen[-1], network_input(BYTES_BGR), atol=1e-3, rtol=1e-4)
    with pytest.raises(ValueError, match="student_pixels: expected"):
        paired(student, teacher, RGB, **options)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_scale_that_makes_no_sense(scale):
    with pytest.raises(ValueError, match="teacher_scale: expected a number > 0"):
        paired(Brightness(8, 16), Brightness(8, 16), RGB, teacher_scale=scale)


# --- detectors whose pyramid is no module's output ------------------------------------------------


class Head(nn.Module):
    def forward(self, maps):
        return [x.flatten(2) for x in maps]


class FedHead(nn.Module):
    """As in Ultralytics: nothing puts the pyramid out, the head takes it in."""

    def __init__(self, width=4):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 8, 8), nn.Conv2d(width, width, 2, 2)
        self.c = nn.Conv2d(width, width, 2, 2)
        self.head = Head()

    def forward(self, x):
        a = self.a(x)
        b = self.b(a)
        return self.head([a, b, self.c(b)])


class Sequence(nn.Module):
    """As in Deformable DETR: all levels as one sequence of tokens."""

    def __init__(self, width=4):
        super().__init__()
        self.levels = FedHead(width)
        self.encoder = nn.TransformerEncoderLayer(width, 2, 8, batch_first=True)
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        maps = [y for y in self.levels(x)]
        return self.head(self.encoder(torch.cat(maps, dim=2).transpose(1, 2)))


@pytest.mark.parametrize("model", [FedHead, Sequence])
def test_found_and_read_wherever_it_is(model):
    torch.manual_seed(0)
    student, teacher = model(4), model(8)
    images = torch.rand(2, 3, 64, 96)
    loss = GlobalKnowledgeLoss(2, total_steps=9)
    kd = Distiller(student, teacher, loss, example_inputs=(images,))
    assert kd.loss.rdm.strides == (8, 16, 32)
    student(images)
    boxes = Targets(torch.tensor([[8.0, 8, 60, 60]]), torch.tensor([1]), torch.tensor([1]))
    terms = kd(images, boxes)
    sum(terms.values()).backward()
    assert next(student.parameters()).grad.abs().sum() > 0
    look = ModuleDetector(student, None, (images,)).look(View(images))
    assert [tuple(x.shape) for x in look.maps] == [(2, 4, 8, 12), (2, 4, 4, 6), (2, 4, 2, 3)]
    if model is FedHead:
        assert torch.equal(look.maps[0], student.a(images))


class Channels(nn.Module):
    def __init__(self, channels, width):
        super().__init__()
        self.body = nn.Conv2d(channels, width, 8, stride=8)

    def forward(self, x):
        return self.body(x)


def taught(student, teacher, images, **options):
    kd = Distiller(
        student,
        teacher,
        PKD(),
        student_path="body",
        teacher_path="body",
        example_inputs=(images,),
        **options,
    )
    shown = []
    teacher.register_forward_pre_hook(lambda module, args: shown.append(args[0]))
    student(images)
    terms = kd(images, Targets(torch.zeros(0, 4), *torch.zeros(2, 0, dtype=torch.int64)))
    assert all(x.isfinite() for x in terms.values())
    return shown[-1]


def test_a_teacher_of_colours_sees_grey_images_in_three_channels():
    grey = torch.rand(2, 1, 32, 32)
    shown = taught(Channels(1, 4), Channels(3, 8), grey)
    assert torch.equal(shown, grey.expand(-1, 3, -1, -1))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    pixels = {"student_pixels": Pixels((0.5,), (0.25,)), "teacher_pixels": Pixels(mean, std)}
    shown = taught(Channels(1, 4), Channels(3, 8), grey, **pixels)
    rgb = (grey * 0.25 + 0.5).expand(-1, 3, -1, -1)
    wanted = (rgb - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(shown, wanted)


@pytest.mark.parametrize("channels", [(4, 3), (3, 1), (3, 6)])
def test_channels_that_a_teacher_does_not_take_are_told(channels):
    mine, theirs = channels
    images = torch.rand(1, mine, 32, 32)
    with pytest.raises(
        ValueError,
        match=rf"^teacher: .* the student's {mine} channels, but Channels takes {theirs} \(Given",
    ):
        taught(Channels(mine, 4), Channels(theirs, 8), images)
