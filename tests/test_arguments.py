"""What a Distiller is given where something else belongs: the error says what to type."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import TensorDataset

from global_kd import Distiller, GlobalKnowledgeLoss, Pixels, RobustDistillLoss
from global_kd.losses import CWD, FGD, PKD, DistillLoss

from .test_distiller import BOXES, IMAGES, Detector, make

GK = GlobalKnowledgeLoss


def distil(student=None, teacher=None, losses=None, **options):
    student = Detector(4) if student is None else student
    teacher = Detector(9) if teacher is None else teacher
    options = {"example_inputs": (IMAGES,)} | options
    return Distiller(student, teacher, [PKD()] if losses is None else losses, **options)


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- a Distiller that reads nothing any more ------------------------------------------------------


def through(save):
    def copied(kd):
        file = io.BytesIO()
        save(kd, file)
        file.seek(0)
        return file

    return copied


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda kd: pickle.loads(pickle.dumps(kd)),
    "torch.save": lambda kd: torch.load(through(torch.save)(kd), weights_only=False),
    "average": lambda kd: AveragedModel(nn.ModuleList([kd])).module[0],
}
CALLS = {
    "call": lambda kd: kd(IMAGES, BOXES),
    "distil": lambda kd: kd.distil(IMAGES),
    "check": lambda kd: kd.check(IMAGES, BOXES),
    "weigh": lambda kd: kd.weigh(IMAGES, BOXES),
    "refresh": lambda kd: kd.refresh([(IMAGES, BOXES)], progress=False),
    "adopt": lambda kd: kd.adopt(kd.loss.bank, [(IMAGES, BOXES)], progress=False),
    "calibrate": lambda kd: kd.calibrate(
        IMAGES, BOXES, detection_loss=lambda m: m(IMAGES)[0].sum()
    ),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_keeps_what_the_losses_own_and_says_that_it_is_a_copy(how):
    student, _, kd = make()
    student(IMAGES)
    kd(IMAGES, BOXES)
    other = COPIES[how](kd)
    for name, x in kd.state_dict().items():
        assert torch.equal(x, other.state_dict()[name])
    student(IMAGES)
    with pytest.raises(
        RuntimeError, match=r"kd: expected .* but got a copy of one; make a new one"
    ):
        other(IMAGES, BOXES)
    other.detach()  # of nothing
    assert kd(IMAGES, BOXES)  # the first goes on


@pytest.mark.parametrize("call", [x for x in CALLS if x != "distil"])
def test_a_detached_one_says_so_at_every_door(call):
    student, teacher, kd = make()
    kd.detach()
    kd.detach()
    assert hooks_of(student) == hooks_of(teacher) == 0
    with pytest.raises(RuntimeError, match=r"kd: expected .* but got one after detach\(\); make a"):
        CALLS[call](kd)
    assert kd.state_dict() and kd.telemetry()["step"] == 0


def test_a_detached_one_of_losses_without_boxes():
    kd = distil()
    kd.detach()
    with pytest.raises(RuntimeError, match=r"but got one after detach\(\)"):
        kd.distil(IMAGES)


def test_one_that_is_dropped_takes_its_hooks_along():
    student, teacher = Detector(4), Detector(9)
    for _ in range(2):
        kd = distil(student, teacher)
        student(IMAGES)
        kd(IMAGES, BOXES)
        assert hooks_of(student) and hooks_of(teacher)
        del kd
        gc.collect()
        assert hooks_of(student) == hooks_of(teacher) == 0


@pytest.mark.parametrize("losses", [[PKD(levels=[4])], [FGD(robust=True)]], ids=["levels", "fact"])
def test_one_that_cannot_be_made_leaves_no_hook(losses):
    student, teacher = Detector(4), Detector(9)
    with pytest.raises(ValueError) as held:  # by its traceback, as in a notebook
        distil(student, teacher, losses)
    assert hooks_of(student) == hooks_of(teacher) == 0 and held.value


# --- what is no detector --------------------------------------------------------------------------

STATE = Detector(4).state_dict()
NO_DETECTOR = {
    "text": ("yolo.pt", r"the path 'yolo.pt'; make the network, load the file .*torch.load\('yolo"),
    "path": (Path("a/b.pth"), r"the path 'a/b.pth'; make the network"),
    "state": (STATE, r"a state dictionary; make the network, call model.load_state_dict"),
    "checkpoint": ({"epoch": 3, "model": STATE}, r"load_state_dict\(checkpoint\['model'\]\)"),
    "lightning": ({"state_dict": STATE}, r"load_state_dict\(checkpoint\['state_dict'\]\)"),
    "network in it": (
        {"ema": None, "model": Detector(4)},
        r"pass the network in it, \w+\['model'\]",
    ),
    "settings": ({"depth": 50}, r"a dictionary with \['depth'\]; pass the network"),
    "function": (lambda x: x, r"function '<lambda>'; pass the network"),
    "class": (Detector, r"the class Detector; pass an instance, Detector\(...\)"),
    "MSELoss": (
        nn.MSELoss(),
        r"MSELoss, a loss; the order is Distiller\(student, teacher, losses\)",
    ),
    "loss": (PKD(), r"the loss PKD; the order is Distiller\(student, teacher, losses\)"),
    "nothing": (nn.Identity(), r"Identity, which has no parameters"),
    "None": (0, r"int; pass the network, an nn.Module"),
    "several": ([Detector(4), Detector(4)], r"a list of 2; pass one network"),
    "predictor": (SimpleNamespace(model=Detector(4)), r"pass the network in it, \w+\.model"),
    "average": (SimpleNamespace(ema=Detector(4)), r"pass the network in it, \w+\.ema"),
    "batch": (IMAGES, r"Tensor; pass the network"),
}


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("what", NO_DETECTOR)
def test_what_is_no_detector(what, role):
    value, message = NO_DETECTOR[what]
    with pytest.raises(TypeError, match=rf"^{role}: expected a detector .*, but got .*{message}"):
        distil(**{role: value})


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["traced", "scripted"])
def test_torchscript_is_no_detector(how):
    module = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Conv2d(4, 4, 2, 2))
    module = torch.jit.trace(module, IMAGES) if how == "traced" else torch.jit.script(module)
    with pytest.raises(
        TypeError, match=r"teacher: .* a TorchScript module .*; pass the Python net"
    ):
        distil(teacher=module)


def test_a_student_has_something_to_train():
    student = Detector(4)
    for module in student.modules():  # as quantised models are: their weights are buffers
        for name, x in list(module._parameters.items()):
            delattr(module, name)
            module.register_buffer(name, None if x is None else x.detach())
    with pytest.raises(ValueError, match=r"student: .* parameters to train, but Detector has none"):
        distil(student=student)
    pupil = Detector(9)
    kd = distil(pupil, student)  # but such a one can teach
    pupil(IMAGES)
    assert kd(IMAGES, BOXES)


def test_a_distiller_is_no_detector():
    kd = distil()
    with pytest.raises(TypeError, match=r"student: .* got a Distiller; pass the network itself"):
        distil(student=kd)


def test_the_order_of_arguments():
    loss, student, teacher = PKD(), Detector(4), Detector(9)
    for given, first in (
        ((loss, student, teacher), "student"),
        ((student, loss, teacher), "teacher"),
    ):
        with pytest.raises(TypeError, match=rf"^{first}: .* the loss PKD; the order is Distiller"):
            Distiller(*given, example_inputs=(IMAGES,))
    with pytest.raises(TypeError, match=r"losses: .* after student and teacher, .*the order is"):
        Distiller(student, teacher, Detector(3), example_inputs=(IMAGES,))


@pytest.mark.parametrize("same", [lambda m: m, nn.DataParallel, copy.copy, torch.compile])
def test_a_student_is_not_its_own_teacher(same):
    student = Detector(4)
    with pytest.raises(ValueError, match=r"teacher: expected another network .*copy.deepcopy"):
        distil(student, same(student))


def test_an_average_teaches_and_is_not_trained():
    teacher = Detector(9)
    student, plain, average = Detector(4), distil, AveragedModel(teacher)
    seen = []
    for given in (teacher, average):
        kd = plain(student, given, teacher_path="body", student_path="body")
        student.eval()(IMAGES)
        seen.append(kd(IMAGES, BOXES)["kd_pkd"])
        kd.detach()
    assert torch.equal(*seen)  # the average of one model is that model
    with pytest.raises(ValueError, match=r"student: .* its AveragedModel; pass the model whose"):
        distil(AveragedModel(student))


class ModelEmaV3(nn.Module):
    """As timm's, as far as is looked at; called it fails, as a wrapper that is not read would."""

    def __init__(self, model):
        super().__init__()
        self.module = copy.deepcopy(model)


def test_averages_of_other_packages():
    assert distil(teacher=ModelEmaV3(Detector(9)), teacher_path="body", student_path="body")
    wrapper = nn.Module()
    wrapper.ema_model = Detector(9)
    with pytest.raises(TypeError, match=r"teacher: .* pass the network in it, teacher.ema_model"):
        distil(teacher=wrapper)


# --- what is no loss ------------------------------------------------------------------------------

NO_LOSS = {
    "MSELoss": (nn.MSELoss(), r"MSELoss; take one of global_kd.losses"),
    "function": (nn.functional.mse_loss, r"mse_loss; take one of global_kd.losses"),
    "class": (GlobalKnowledgeLoss, r"its class; write GlobalKnowledgeLoss\(...\)"),
    "class in a list": ([PKD(), CWD], r"its class; write CWD\(...\)"),
    "name": ("fgd", r"the text 'fgd'; write FGD\(...\)"),
    "names": (["pkd", "fgd"], r"the text 'pkd'; write PKD\(...\)"),
    "None": (None, r"NoneType; write GlobalKnowledgeLoss\(...\)"),
    "dictionary": ({"a": PKD()}, r"a dict; write list\(losses.values\(\)\)"),
    "ModuleDict": (nn.ModuleDict({"a": PKD()}), r"a ModuleDict; write list\(losses.values\(\)\)"),
    "nested": ([[PKD()]], r"a list in the list; write one flat list"),
    "weighted": ([(PKD(), 2.0)], r"a tuple in the list"),
    "a part": (RobustDistillLoss([8.0]), r"a part of one; write GlobalKnowledgeLoss"),
    "a detector": (Detector(3), r"Detector; the order is"),
}


@pytest.mark.parametrize("what", NO_LOSS)
def test_what_is_no_loss(what):
    value, message = NO_LOSS[what]
    with pytest.raises(TypeError, match=rf"^losses: expected .*, but got .*{message}"):
        Distiller(Detector(4), Detector(9), value, example_inputs=(IMAGES,))


def test_losses_come_in_any_sequence():
    for losses in (PKD(), (PKD(),), iter([PKD()]), nn.ModuleList([PKD()])):
        assert list(distil(losses=losses).losses) == ["pkd"]


def test_one_loss_serves_one_distiller():
    loss = PKD()
    kd = distil(losses=loss)
    with pytest.raises(ValueError, match=r"losses: expected a PKD of its own .*; make a new one"):
        distil(losses=[loss])
    kd.detach()
    kd = distil(losses=loss)
    del kd
    gc.collect()
    kd = distil(losses=loss)
    with pytest.raises(ValueError, match="losses: expected a PKD of its own"):
        distil(losses=[GlobalKnowledgeLoss(2, refresh_every=None), kd.losses["pkd"]])
    assert distil(losses=copy.deepcopy(loss))
    with pytest.raises(TypeError, match="teacher"):
        distil(teacher="x", losses=(unused := PKD()))
    assert distil(losses=unused)  # one that was not made has no loss


# --- options of losses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GK(2, total_steps="100"), r"total_steps: .*; write total_steps=100"),
        (lambda: PKD(total_steps=900.0), r"total_steps: .* but got 900.0; write total_steps=900"),
        (lambda: GK(2, refresh_every="9"), r"refresh_every: .*; write refresh_every=9"),
        (lambda: PKD(warmup_steps="9"), r"warmup_steps: .*; write warmup_steps=9"),
        (lambda: GK("2"), r"num_classes: .*'2'; write num_classes=2"),
        (lambda: GK(2.5), r"num_classes: .* but got 2.5"),
        (lambda: GK(["ant", "bee"]), r"num_classes=2, class_names=.*bee"),
        (lambda: GK(2, foreground="1"), r"foreground: .*'1'; write foreground=1.0"),
        (lambda: GK(2, foreground=None), r"foreground: .* but got None"),
        (lambda: GK(2, num_prototypes=2.5), r"num_prototypes: .* but got 2.5"),
        (lambda: CWD(temperature="1"), r"temperature: .*; write temperature=1.0"),
        (lambda: PKD(weight=[1.0]), r"weight: expected a finite number >= 0, but got \[1.0\]"),
        (lambda: PKD(levels=8), r"levels: expected the strides .* but got 8; write levels=\[8"),
        (lambda: PKD(levels="all"), r"levels: expected the strides .* but got 'all'"),
        (lambda: PKD(levels=["p3"]), r"levels: expected the strides .* but got \['p3'\]"),
        (lambda: PKD(seed="a"), r"seed: expected a whole number, but got 'a'"),
    ],
)  # fmt: skip
def test_numbers_of_another_type(call, message):
    with pytest.raises(TypeError, match=f"^{message}|{message}"):
        call()


def test_numbers_of_numpy_and_tensors_of_one_are_numbers():
    assert GlobalKnowledgeLoss(2, foreground=torch.tensor(3.0)).built is False
    assert PKD(weight=np.float32(2), total_steps=np.int64(9)).total_steps == 9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GK(2, logit=1), r"logit: .*option of GlobalKnowledgeLoss, .*write logits"),
        (lambda: GK(2, foregrund=1), r"an option of GlobalKnowledgeLoss, .*; write foreground"),
        (lambda: GK(2, min_size=1), r"an option of GlobalKnowledgeLoss, .*; write min_side"),
        (lambda: PKD(wieght=1), r"an option of PKD, but got 'wieght'; write weight"),
        (lambda: FGD(temprature=1), r"an option of FGD, .*; write temperature"),
        (lambda: CWD(fg=1), r"an option of CWD, but got 'fg'; it has adapter, .*weight"),
    ],
)  # fmt: skip
def test_misspelt_options_name_the_class_that_was_called(call, message):
    with pytest.raises(TypeError, match=message) as caught:
        call()
    assert "DistillLoss" not in str(caught.value)


def test_a_loss_of_ones_own_knows_its_options():
    class Mine(DistillLoss):
        name = "mine"

        def __init__(self, *, strength=1.0, **common):
            super().__init__({"": strength}, **common)

    assert Mine(strength=2, adapter="identity").adapter == "identity"
    with pytest.raises(TypeError, match="an option of Mine, but got 'strenght'; write strength"):
        Mine(strenght=2)


# --- options of the Distiller ---------------------------------------------------------------------


class TwoInputs(Detector):
    """RGB and thermal images."""

    def forward(self, rgb, thermal):
        return super().forward(rgb + thermal)


class ListTaking(Detector):
    def forward(self, images):
        return super().forward(torch.stack(list(images)))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (IMAGES, TypeError, r"a tuple .* but got a tensor; write example_inputs=\(images,\)"),
        ({"images": IMAGES}, TypeError, r"but got dict; write example_inputs=\(images,\)"),
        ("x", TypeError, r"but got str; write"),
        (True, TypeError, r"but got bool; write"),
        (iter([IMAGES]), TypeError, r"but got list_iterator; write"),
        ((IMAGES, BOXES), TypeError, r"Detector.forward takes .*\(images\).*too many"),
        ((IMAGES[0],), ValueError, r"got \['\(3, 64, 96\)'\]; write .*torch.stack"),
        (list(IMAGES), ValueError, r"write .*torch.stack"),
        ((IMAGES.numpy(),), ValueError, r"write example_inputs=\(torch.as_tensor\(images\),\)"),
        ((list(IMAGES),), ValueError, r"the module in it that takes the batch \(docs/own_detector"),
        ((SimpleNamespace(tensors=IMAGES),), ValueError, r"nested tensor makes the batch"),
        ((), ValueError, r"but got \[\]; write example_inputs=\(images,\)"),
    ],
)  # fmt: skip
def test_example_inputs(given, error, message):
    with pytest.raises(error, match=f"^example_inputs: expected .*{message}"):
        distil(example_inputs=given)


def test_paths_and_pixels_of_another_type():
    student = Detector(4)
    with pytest.raises(TypeError, match="student_path: .* but got Body; write student_path='body'"):
        distil(student, student_path=student.body)
    with pytest.raises(TypeError, match=r"teacher_path: .* but got list; write its name in named"):
        distil(teacher_path=["body"])
    with pytest.raises(ValueError, match=r"teacher_path: expected the name .*'bdy'; nearest: body"):
        distil(teacher_path="bdy")
    for role in ("student", "teacher"):
        with pytest.raises(
            TypeError, match=rf"{role}_pixels: .* but got str; write {role}_pixels=P"
        ):
            distil(**{f"{role}_pixels": "imagenet"})
    with pytest.raises(TypeError, match="teacher_scale: .*'2'; write teacher_scale=2.0"):
        distil(teacher_scale="2")


def test_paths_in_a_known_framework():
    models = pytest.importorskip("torchvision.models.detection")
    make = models.fasterrcnn_mobilenet_v3_large_320_fpn
    options = {"weights": None, "weights_backbone": None, "num_classes": 3}
    student = make(**options).eval()
    with pytest.raises(
        ValueError, match=r"^student_path: .*FasterRCNN, but got 'backbon'; nearest: "
    ):
        Distiller(student, Detector(9), PKD(), student_path="backbon")
    with pytest.raises(
        ValueError, match=r"^example_inputs: .*FasterRCNN.forward .* leave student_p"
    ):
        Distiller(student, Detector(9), PKD(), student_path="backbone")
    wrapper = nn.Module()
    wrapper.model = student
    with pytest.raises(ValueError, match=r"^student: .* Module, which holds one; pass it, student"):
        Distiller(wrapper, make(**options), PKD())
    with pytest.raises(ValueError, match=r"^student_layout: .* 'BCHW' for FasterRCNN, .*student_p"):
        Distiller(make(**options), student, PKD(), student_layout="BHWC")
    kd = Distiller(make(**options), AveragedModel(student), PKD())  # read as its framework's
    assert kd.losses["pkd"].strides


def test_list_taking_students_beside_a_teacher():
    """The batch is made inside: the module that takes it is the one to distil."""
    outer = nn.Module()
    outer.net = Detector(4)
    outer.forward = lambda images: outer.net(torch.stack(list(images)))
    kd = distil(outer.net)
    outer.forward(list(IMAGES))
    assert kd(IMAGES, BOXES)


class Boxed:
    """A nested tensor, as DETR's own code has one."""

    def __init__(self, tensors):
        self.tensors = tensors


class TakesBoxed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Detector(4).body
        self.head = nn.Conv2d(4, 5, 1)

    def forward(self, samples):
        return [self.head(x) for x in self.net(samples.tensors).values()]


def test_a_student_of_nested_tensors_beside_a_frameworks_teacher():
    """What the message says leads there: the batch, the module, its path, its pixels."""
    models = pytest.importorskip("torchvision.models.detection")
    options = {"weights": None, "weights_backbone": None, "num_classes": 3}
    teacher = models.fasterrcnn_mobilenet_v3_large_320_fpn(**options)
    student, boxed = TakesBoxed(), Boxed(torch.rand(2, 3, 128, 128))
    loss = PKD(levels=[32])
    options = {"student_pixels": Pixels(), "example_inputs": (boxed,)}
    with pytest.raises(ValueError, match="a nested tensor makes the batch inside: give the Dist"):
        Distiller(student, teacher, loss, **options)
    options["example_inputs"] = (boxed.tensors,)
    student.net.stem, student.net.down = nn.Conv2d(3, 4, 16, 16), nn.Conv2d(4, 4, 2, 2)
    with pytest.raises(
        ValueError, match=r'^student_path: .*Body itself puts out .*student_path=""'
    ):
        Distiller(student.net, teacher, loss, **options)
    kd = Distiller(student.net, teacher, loss, student_path="", **options)
    student(boxed)
    terms = kd(boxed.tensors, BOXES)
    sum(terms.values()).backward()
    assert student.net.stem.weight.grad.abs().sum() > 0


def test_detectors_of_two_inputs():
    needs = "one image batch, but TwoInputs.forward needs rgb, thermal; wrap it"
    with pytest.raises(ValueError, match=rf"^teacher: .* {needs} .*net\(x\[:, :3\], x\[:, 3:\]\)"):
        distil(teacher=TwoInputs(9))
    student = TwoInputs(4)
    kd = distil(
        student, losses=GlobalKnowledgeLoss(2, refresh_every=None), example_inputs=(IMAGES, IMAGES)
    )
    student(IMAGES, IMAGES)
    assert kd(IMAGES, BOXES)  # its teacher sees the first
    with pytest.raises(
        ValueError, match=r"^student: .* one image batch, but TwoInputs.forward needs"
    ):
        kd.refresh([(IMAGES, BOXES)], progress=False)


class Split(nn.Module):
    """How two inputs become one, as the message says."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x[:, :3], x[:, 3:])


def test_the_way_for_two_inputs_works():
    both = torch.cat([IMAGES, IMAGES], dim=1)
    student, teacher = Split(TwoInputs(4)), Split(TwoInputs(9))
    loss = GlobalKnowledgeLoss(2, refresh_every=None, min_side=5)
    kd = distil(student, teacher, loss, example_inputs=(both,))
    student(both)
    assert kd(both, BOXES)
    kd.refresh([(both, BOXES)], progress=False)
    assert kd.loss.bank.valid.any()


# --- images, batches and loaders ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "NoneType; pass what the student was called with"),
        (IMAGES.numpy(), r"ndarray; pass torch.as_tensor"),
        (IMAGES[0], r"\(3, 64, 96\); pass images\[None\]"),
        (list(IMAGES), r"list of images; pass torch.stack"),
        ({"images": IMAGES}, r'a dictionary with images; .*kd\(batch\["images"\]'),
        ((IMAGES, BOXES), r"tuple of .*; pass images, targets"),
        (SimpleNamespace(tensors=IMAGES), r"SimpleNamespace; pass images.tensors"),
    ],
)
def test_images_of_another_kind(images, message):
    student, _, kd = make()
    student(IMAGES)
    with pytest.raises(
        TypeError, match=rf"^images: expected a batch \(B, C, H, W\), but got {message}"
    ):
        kd(images, BOXES)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (
            (IMAGES, BOXES, ["a", "b"]),
            ValueError,
            r"a tuple of 3 .*for images, targets, \*_ in loader",
        ),
        ((IMAGES,), ValueError, r"a tuple of 1"),
        ([IMAGES, BOXES, None, None], ValueError, r"a list of 4"),
        (list(zip(IMAGES, BOXES, strict=True)), ValueError, r"a list of pairs, .*collate_fn"),
        ({"images": IMAGES, "targets": BOXES}, TypeError, r"a dictionary with images, targets; "),
        ({"pixel_values": IMAGES}, TypeError, r"a dictionary with pixel_values; "),
    ],
)
def test_batches_of_another_kind(batch, error, message):
    _, _, kd = make()
    for call in (kd.refresh, lambda x, progress: kd.adopt(kd.loss.bank, x, progress=progress)):
        kd.loss.bank.clear()
        if call is not kd.refresh:
            kd.refresh([(IMAGES, [x | {"ids": torch.arange(len(x["boxes"]))} for x in BOXES])],
                       progress=False)  # fmt: skip
            if not kd.loss.bank.valid.any():
                continue
        with pytest.raises(error, match=f"expected .*, but got {message}"):
            call([batch], progress=False)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (None, "NoneType; pass the loader"),
        ("coco.yaml", "str; pass the loader"),
        (lambda: 0, "function; pass the loader"),
        (IMAGES, "Tensor; pass the loader"),
        ({"train": []}, "dict; pass the loader"),
        (TensorDataset(IMAGES), r"TensorDataset, a data set of single images; pass DataLoader\("),
    ],
)
def test_what_is_no_loader(loader, message):
    _, _, kd = make()
    with pytest.raises(
        TypeError, match=rf"^loader: expected an iterable of batches .* got {message}"
    ):
        kd.refresh(loader, progress=False)
    if loader is not None:
        with pytest.raises(TypeError, match=rf"^loader: expected .* got {message}"):
            kd.calibrate(loader=loader)


def test_a_loader_without_batches_is_told():
    _, _, kd = make()
    with pytest.warns(UserWarning, match="refresh: the loader gave no batch"):
        kd.refresh(iter(()), progress=False)
    with pytest.raises(ValueError, match="loader: expected at least one batch, but got none"):
        kd.calibrate(loader=[])
