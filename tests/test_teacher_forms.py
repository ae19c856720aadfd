"""The teacher in half precision, with channels last, compiled and exported: the same teacher."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.export import Dim

from global_kd import Distiller, GlobalKnowledgeLoss
from global_kd.losses import FRS, PKD

from .detectors.detectors import detector, scenes
from .test_distiller import BOXES, IMAGES, Detector
from .watch import Graphs

try:
    from torch.distributed.tensor import DTensor, distribute_module
except ImportError:  # torch 2.4
    from torch.distributed._tensor import DTensor, distribute_module

NEW = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)
FORMS = [
    "bfloat16",
    "float16",
    "channels last",
    "compiled, wrapped",
    "compiled, in place",
    "compiled, its backbone",
    "compiled, its backbone in place",
    "compiled afterwards",
    "exported",
]
CASES = [(kind, form) for kind in ("fcos", "own") for form in FORMS]
CASES += [("faster_rcnn", form) for form in ("bfloat16", "compiled, its backbone", "exported")]


def backbone(teacher) -> str:
    return "body" if isinstance(teacher, Detector) else "backbone"


def exported(module: nn.Module, channels_of: torch.Tensor) -> nn.Module:
    """For images of any number and size; sides are those of whole cells."""
    batch, height, width = Dim("batch"), Dim("height", max=64), Dim("width", max=64)
    shapes = ({0: batch, 2: 16 * height, 3: 16 * width},)
    program = torch.export.export(module.eval(), (channels_of,), dynamic_shapes=shapes)
    return program.module()


def in_form(teacher: nn.Module, form: str, backend: Graphs) -> nn.Module:
    name = backbone(teacher)
    if form in ("bfloat16", "float16"):
        return teacher.to(getattr(torch, form))
    if form == "channels last":
        return teacher.to(memory_format=torch.channels_last)
    if form == "compiled, wrapped":
        return torch.compile(teacher, backend=backend)
    if form == "compiled, in place":
        teacher.compile(backend=backend)
    if form == "compiled, its backbone":
        setattr(teacher, name, torch.compile(getattr(teacher, name), backend=backend))
    if form in ("compiled, its backbone in place", "compiled afterwards"):
        getattr(teacher, name).compile(backend=backend)
    if form == "exported":
        whole = exported(getattr(teacher, name), torch.rand(2, 3, 64, 96))
        if isinstance(teacher, Detector):  # its maps are what it puts out
            return whole
        teacher.backbone = whole
    return teacher


# One size for all images: what is exported takes whole cells only.
SIZE = {"fixed_size": (96, 64)}


def pair(kind: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    if kind == "own":
        return Detector(4), Detector(9).eval()
    return detector(kind, 8, **SIZE), detector(kind, 12, **SIZE).eval()


def distilled(kind: str, form: str, teacher: nn.Module, student: nn.Module, then=lambda: None):
    """Two steps of a student: the terms of both, and the gradients of its first weight."""
    own = kind == "own"
    losses = [
        GlobalKnowledgeLoss(4, total_steps=9, refresh_every=1, min_side=4),
        PKD(),
        *([] if own else [FRS(warmup_steps=0)]),
    ]
    options = {"example_inputs": (IMAGES,)} if own else {}
    if isinstance(teacher, torch.fx.GraphModule):  # one module, whose output is the pyramid
        options["teacher_path"] = ""
    kd = Distiller(student, teacher, losses, **options)
    then()
    batch = (IMAGES, BOXES) if own else scenes()
    found = []
    for _ in range(2):
        student(*batch[: 1 if own else 2])
        torch.manual_seed(1)
        terms = kd(*batch)
        total = sum(terms.values())
        slope = torch.autograd.grad(total, next(student.parameters()), retain_graph=True)[0]
        found.append({**{k: v.detach() for k, v in terms.items()}, "slope": slope})
    if form in ("bfloat16", "exported"):
        kd.check(*batch, verbose=False)
    kd.detach()
    return found


@pytest.fixture(scope="module")
def expected():
    return {}


@pytest.mark.parametrize(("kind", "form"), CASES)
@pytest.mark.filterwarnings("ignore")  # of exporting, and of losses without steps
def test_a_teacher_in_every_form_teaches_the_same(kind, form, expected):
    torch._dynamo.reset()
    if kind not in expected:
        student, teacher = pair(kind)
        torch.manual_seed(5)
        expected[kind] = distilled(kind, "", teacher, student)
    student, teacher = pair(kind)
    backend = Graphs()
    late = form == "compiled afterwards"
    given = teacher if late else in_form(teacher, form, backend)
    before = copy.deepcopy({k: v for k, v in given.state_dict().items()})
    torch.manual_seed(5)
    found = distilled(
        kind,
        form,
        given,
        student,
        (lambda: in_form(teacher, form, backend)) if late else lambda: None,
    )
    half = form.endswith("16")
    for one, other in zip(found, expected[kind]):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert one[name].dtype == torch.float32 and one[name].isfinite().all(), name
            if not half:
                torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-5, msg=name)
            elif name != "slope":  # of single weights it may be all rounding
                assert one[name].item() == pytest.approx(value.item(), rel=0.02, abs=0.01), name
    for name, value in given.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in given.parameters())
    if form == "compiled, wrapped":  # it is taken off: docs/training.md says what to compile
        assert backend.count == 0
    elif form.startswith("compiled") and form != "compiled, in place":
        assert backend.count > 0


@pytest.mark.filterwarnings("ignore")
def test_what_was_exported_in_train_mode_is_refused():
    """Its batch norms would go on learning, whatever mode it is told to be in."""
    body = Detector(9).body.train()
    program = torch.export.export(body, (IMAGES,)).module()
    with pytest.raises(ValueError, match=r"teacher: expected what was exported.*call eval\(\)"):
        Distiller(Detector(4), program, PKD(), example_inputs=(IMAGES,))


class Own(torch.Tensor):
    """A user's own class, as fastai's images are; every result is of it, too."""


def subclassed(teacher, mesh):
    teacher.body.stem.weight = nn.Parameter(teacher.body.stem.weight.detach().as_subclass(Own))
    return teacher


def replicated(teacher, mesh):
    def given(module, args, mesh):
        return tuple(x if isinstance(x, DTensor) else DTensor.from_local(x, mesh) for x in args)

    def put_out(module, output, mesh):
        return [x.to_local() for x in output]

    return distribute_module(teacher, mesh, input_fn=given, output_fn=put_out)


def flat(teacher, mesh):
    return FullyShardedDataParallel(teacher, device_id=torch.device("cpu"))


def only_stored(teacher, mesh):
    if NEW:
        teacher.register_buffer("packed", torch.zeros(4, dtype=torch.uint4))
    teacher.lazy = nn.LazyLinear(3)
    teacher.lazy_norm = nn.LazyBatchNorm2d()
    return teacher


@pytest.mark.parametrize("form", [subclassed, replicated, flat, only_stored])
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_every_class_teach_the_same(form, tmp_path):
    """Parameters of a class of the user's own, of DTensors, in FSDP1, or without a shape."""
    if form in (flat, replicated) and not NEW:
        pytest.skip("FSDP and batch norm of distributed tensors on a processor need torch 2.6")
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        found, made = [], []
        for make in (lambda x, _: x, form):
            torch.manual_seed(0)
            student, teacher = Detector(4), Detector(9).eval()
            teacher = make(teacher, init_device_mesh("cpu", (1,)))
            loss = GlobalKnowledgeLoss(2, total_steps=9, refresh_every=2, relation=5)
            path = "_fsdp_wrapped_module." * (make is flat) + "body"
            options = {"student_path": "body", "teacher_path": path, "example_inputs": (IMAGES,)}
            kd = Distiller(student, teacher, loss, **options)
            kd.refresh([(IMAGES, BOXES)], progress=False)
            for _ in range(2):
                student(IMAGES)
                terms = kd(IMAGES, BOXES)
            assert all(type(x) is torch.Tensor for x in terms.values())
            kd.check(IMAGES, BOXES, verbose=False)
            copy.deepcopy(kd)
            found.append({name: x.item() for name, x in terms.items()})
            made.append(kd.loss.bank.teacher_fingerprint)
        assert found[1] == pytest.approx(found[0], rel=1e-5)
        assert made[0] == made[1] or form is only_stored
    finally:
        dist.destroy_process_group()
