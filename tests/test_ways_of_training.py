"""The ways in which people train: a test for each row of docs/training.md that had none elsewhere.

Most run a few steps in two ways that must come to the same.
"""

from __future__ import annotations

import ast
import copy
import gc
import io
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d

from global_kd import Distiller, GlobalKnowledgeLoss, Targets
from global_kd.ops.dispatch import force

from .detectors.detectors import detector, scenes
from .small_loss import small_loss
from .watch import Graphs

CLASSES = 3


class Body(nn.Module):
    """Strides 4 and 8. `checkpointed` runs the second stage again in the backward pass."""

    def __init__(self, width, norm):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, stride=4)
        self.norm = norm(width)
        self.down = nn.Conv2d(width, width, 2, stride=2)
        self.checkpointed = {}

    def forward(self, x):
        fine = self.norm(self.stem(x))
        if self.checkpointed and self.training:
            return fine, checkpoint(self.down, fine.relu(), **self.checkpointed)
        return fine, self.down(fine.relu())


class Tiny(nn.Module):
    """A detector of two levels and one dense head; its forward is its training loss."""

    def __init__(self, width=4, norm=nn.Identity, dropout=0.0):
        super().__init__()
        self.body = Body(width, norm)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Conv2d(width, CLASSES, 1))
        self.checkpointed = {}
        self.gain = 1.0

    def forward(self, images):
        images = images * self.gain
        if self.checkpointed and self.training:
            levels = checkpoint(self.body, images, **self.checkpointed)
        else:
            levels = self.body(images)
        return sum((self.head(x) - 0.5).square().mean() for x in levels)


def scene(seed, boxes=4, labels=None):
    g = torch.Generator().manual_seed(seed)
    images = torch.rand(2, 3, 32, 32, generator=g)
    corner = torch.rand(boxes, 2, generator=g) * 16
    extent = 6 + 10 * torch.rand(boxes, 2, generator=g)
    if labels is None:
        labels = torch.randint(0, CLASSES, (boxes,), generator=g)
    index = torch.arange(boxes) % 2
    return images, Targets(torch.cat([corner, corner + extent], dim=1), labels, index)


def gk(num_classes=CLASSES, **options):
    return GlobalKnowledgeLoss(
        num_classes,
        **{
            "total_steps": 20,
            "refresh_every": 3,
            "min_side": 4,
            "num_prototypes": 2,
            "finest_scale": 8,
            "relation": 5,
            **options,
        },
    )


def start(student=None, optimizer=torch.optim.SGD, **options):
    """Student, distiller and optimizer, from the same numbers at every call."""
    torch.manual_seed(0)
    student = Tiny() if student is None else student()
    kd = Distiller(student, Tiny(6), gk(**options), example_inputs=(scene(0)[0],))
    return student, kd, optimizer([*student.parameters(), *kd.parameters()], lr=0.05)


def train(student, kd, optimizer, steps, call=None):
    """Steps with the scenes of these seeds; returns the terms of each."""
    history = []
    for seed in steps:
        images, targets = scene(seed)
        optimizer.zero_grad()
        loss = (student if call is None else call)(images)
        terms = kd(images, targets)
        (loss + sum(terms.values())).backward()
        optimizer.step()
        history.append({name: x.item() for name, x in terms.items()})
    return history


def states(*owners):
    """Everything that they would save, flat."""

    def walk(value, path):
        if isinstance(value, dict):
            for key, x in value.items():
                yield from walk(x, f"{path}.{key}")
        elif isinstance(value, (list, tuple)):
            for i, x in enumerate(value):
                yield from walk(x, f"{path}.{i}")
        else:
            yield path, value

    return {k: v for i, x in enumerate(owners) for k, v in walk(x.state_dict(), str(i))}


def assert_same(a, b):
    """Bit for bit."""
    assert a.keys() == b.keys()
    for name, x in a.items():
        same = torch.equal(x, b[name]) if isinstance(x, torch.Tensor) else x == b[name]
        assert same, name


# --- precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False], ids=["kd inside", "kd outside"])
def test_autocast_in_bfloat16(inside):
    """Terms in float32, near those of a float32 step; every parameter gets its gradient."""
    (exact,) = train(*start(), [0])
    student, kd, _ = start()
    images, targets = scene(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = student(images)
        if inside:
            terms = kd(images, targets)
    if not inside:
        terms = kd(images, targets)
    (loss + sum(terms.values())).backward()
    for name, x in terms.items():
        assert x.dtype == torch.float32
        assert x.item() == pytest.approx(exact[name], rel=0.05)
    assert all(p.grad.isfinite().all() for m in (student, kd) for p in m.parameters())


@pytest.mark.parametrize("gain", [1e7, torch.nan], ids=["inf", "nan"])
@pytest.mark.parametrize("bad", [1, 2, 3], ids=["first half", "before refresh", "at refresh"])
def test_an_overflowed_step_under_a_grad_scaler_leaves_no_trace(gain, bad):
    """float16: the scaler skips the step, and of the bad image nothing enters the prototypes."""
    student, kd, optimizer = start()
    scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**8)
    for step in range(8):
        images, targets = scene(step)
        student.gain = torch.ones(2, 1, 1, 1)
        if step == bad:
            student.gain[0] = gain  # the second image is fine
        before, scale = copy.deepcopy(student.state_dict()), scaler.get_scale()
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = student(images)
            terms = kd(images, targets)
        scaler.scale(loss + sum(terms.values())).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped = all(torch.equal(x, before[k]) for k, x in student.state_dict().items())
        assert skipped == (step == bad)
        assert (scaler.get_scale() < scale) == skipped
        overflowed = any(k // 3 == step // 3 for k in {bad} & set(range(step + 1)))
        assert len(kd.loss.generator) == 4 * (step % 3 + 1) - 2 * overflowed
        kept = [x for x in states(kd).values() if isinstance(x, torch.Tensor)]
        assert all(x.isfinite().all() for x in kept)
        assert step == bad or all(x.isfinite() for x in terms.values())
    assert kd.loss.bank.valid.any() and terms["kd_relation"] > 0
    numbers = kd.telemetry()
    assert all(torch.tensor(list(numbers.values())).isfinite())


def test_looking_inside_an_autocast_region_does_not_cut_the_students_gradient():
    """The casts of a forward without gradient must not serve the one with (torch 2.4 would)."""
    student, kd, _ = start()
    images, targets = scene(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kd.weigh(images, targets)
        student(images).backward()
    assert all(p.grad is not None for p in student.parameters())


# --- the shape of a step -----------------------------------------------------------------------


def test_gradients_accumulate_to_the_sum():
    """Four small batches, one backward each or one for all, a refresh between the third and the
    fourth."""
    accumulated, summed = start(), start()
    total = 0.0
    for seed in range(4):
        images, targets = scene(seed)
        student, kd, _ = accumulated
        (student(images) + sum(kd(images, targets).values())).backward()
        student, kd, _ = summed
        total = total + student(images) + sum(kd(images, targets).values())
    total.backward()
    assert accumulated[1].loss.bank.valid.any()
    assert_same(states(accumulated[1].loss.bank), states(summed[1].loss.bank))
    for a, b in zip(accumulated[:2], summed[:2]):
        for (name, p), q in zip(a.named_parameters(), b.parameters()):
            torch.testing.assert_close(p.grad, q.grad, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("place", "reentrant"),
    [
        ("inside what is tapped", False),
        ("inside what is tapped", True),
        ("what is tapped", False),
        ("what is tapped", True),
        ("the whole student", False),
    ],
)
def test_activation_checkpointing(place, reentrant):
    """Hooks fire again in the backward pass; nobody counts twice, and training is the same."""
    plain, checkpointed = start(), start()
    expected = train(*plain, range(5))
    student, kd, _ = checkpointed
    options = {"use_reentrant": reentrant}
    if place == "inside what is tapped":
        student.body.checkpointed = options
    elif place == "what is tapped":
        student.checkpointed = options

    def call(images):
        images.requires_grad_()  # the reentrant kind asks for it
        if place == "the whole student":
            return checkpoint(student, images, **options)
        return student(images)

    calls = []
    student.body.down.register_forward_pre_hook(lambda *_: calls.append(1))
    found = train(*checkpointed, range(5), call)
    assert len(calls) == 10  # it did run twice
    for a, b in zip(found, expected):
        assert a == pytest.approx(b)
    for a, b in zip(states(student, kd).values(), states(*plain[:2]).values()):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b)
    assert kd.loss.step == 5 and len(kd.loss.generator) == 8
    with pytest.raises(ValueError, match="never fired"):
        kd(*scene(0))  # what ran in the backward pass was no forward


@pytest.mark.parametrize("how", ["checkpoint", "no_grad"])
def test_a_forward_that_hides_the_graph_is_reported(how):
    """Reentrant checkpointing runs without gradient what lies inside: the maps teach nothing."""
    student, kd, _ = start()
    images, targets = scene(0)
    if how == "checkpoint":
        checkpoint(student, images.requires_grad_(), use_reentrant=True)
    else:
        with torch.no_grad():
            student(images)
    with pytest.warns(UserWarning, match="use_reentrant=False"):
        kd(images, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student(images)
        kd(images, targets)  # once is enough


def test_layers_frozen_on_purpose_and_evaluation_give_no_warning():
    student, kd, _ = start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            student(scene(0)[0])
            kd(*scene(0))
        student.requires_grad_(False)
        student(scene(0)[0])
        kd(*scene(0))


@pytest.mark.parametrize("what", ["between steps", "forward and kd", "weigh", "compiled"])
def test_evaluation_in_the_middle_of_training(what):
    """Wherever it comes, training goes on as if it had not been."""
    plain = start(lambda: Tiny(norm=nn.BatchNorm2d))
    expected = train(*plain, range(7))
    student, kd, optimizer = start(lambda: Tiny(norm=nn.BatchNorm2d))

    def evaluate(model=student):
        if what == "weigh":
            kd.weigh(*scene(99))
            return
        model.eval()
        with torch.no_grad():
            model(scene(99)[0])
        model.train()

    def step_and_evaluate(images):
        loss = model(images)
        if what != "between steps":
            evaluate(model)
        return loss

    model = student
    if what == "compiled":
        torch._dynamo.reset()
        model = torch.compile(student, backend="eager")
    found = []
    for seed in range(7):
        found += train(student, kd, optimizer, [seed], step_and_evaluate)
        if what == "between steps":
            evaluate()
    assert found == expected
    assert_same(states(student, kd), states(*plain[:2]))


# --- other models around the student -----------------------------------------------------------


@pytest.mark.parametrize("kind", ["AveragedModel", "deepcopy"])
def test_averaged_copies_of_the_student(kind):
    """Made after attaching and between forward and kd; used, saved and loaded all along."""
    plain = start()
    expected = train(*plain, range(5))
    student, kd, optimizer = start()
    copies = []

    def step_and_average(images):
        loss = student(images)
        if not copies:
            copies.append(AveragedModel(student) if kind == "AveragedModel" else None)
            copies[0] = copies[0] or copy.deepcopy(student)
        (average,) = copies
        if kind == "AveragedModel":
            average.update_parameters(student)
        average.train()
        average(torch.rand(2, 3, 32, 32))  # its forward reaches no tap
        average.eval()
        average(torch.rand(2, 3, 32, 32))
        return loss

    assert train(student, kd, optimizer, range(5), step_and_average) == expected
    assert_same(states(student, kd), states(*plain[:2]))
    (average,) = copies
    buffer = io.BytesIO()
    torch.save(average.state_dict(), buffer)
    assert b"global_kd" not in buffer.getvalue()
    buffer.seek(0)
    fresh = AveragedModel(Tiny()) if kind == "AveragedModel" else Tiny()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    images = scene(9)[0]
    assert torch.equal(fresh.eval()(images), average.eval()(images))
    with pytest.raises(ValueError, match="never fired"):
        kd(*scene(9))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["torch.compile", "in place", "backbone", "backbone in place"])
def test_a_compiled_student(how, when):
    """Whether compiled before or after attaching, all of it or its backbone."""
    expected = train(*start(), range(4))
    torch._dynamo.reset()
    backend, compiled = Graphs(), []

    def compile_it(student):
        if how == "torch.compile":
            compiled.append(torch.compile(student, backend=backend))
        elif how == "backbone":
            student.body = torch.compile(student.body, backend=backend)
            compiled.append(student)
        else:
            (student if how == "in place" else student.body).compile(backend=backend)
            compiled.append(student)
        return compiled[0]

    if when == "before":
        student, kd, optimizer = start(lambda: compile_it(Tiny()))
        if how != "backbone":  # which cannot be run otherwise
            assert backend.count == 0  # the distiller's own look is not traced
    else:
        student, kd, optimizer = start()
        compile_it(student)
    found = train(student, kd, optimizer, range(4), compiled[0])
    assert backend.count > 0
    for a, b in zip(found, expected):
        assert a == pytest.approx(b)


def test_the_rdm_compiled_where_it_is():
    """As one graph, inside of a loss inside of a distiller."""
    with force("definition"):  # what a compiler gets
        expected = train(*start(), range(5))
    torch._dynamo.reset()
    student, kd, optimizer = start()
    backend = Graphs()
    kd.loss.rdm.compile(backend=backend, fullgraph=True)
    # A gap of 0.02 between cosines near 1 is known to 1e-7, so 2.5 times its square to 1e-8.
    for a, b in zip(train(student, kd, optimizer, range(5)), expected):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-8)
    assert backend.count > 0
    assert any(name.startswith("omega") for name in kd.telemetry())


@pytest.mark.parametrize("wrapped", [True, False], ids=["kd on DDP", "kd on the module"])
def test_a_student_in_ddp_on_one_process(wrapped):
    plain = start()
    expected = train(*plain, range(5))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        if wrapped:
            ddp, kd, optimizer = start(lambda: DistributedDataParallel(Tiny()))
        else:
            student, kd, optimizer = start()
            ddp = DistributedDataParallel(student)
        assert train(ddp, kd, optimizer, range(5)) == expected
        assert_same(states(ddp.module, kd), states(*plain[:2]))
    finally:
        distributed.destroy_process_group()


# --- batch norm --------------------------------------------------------------------------------


def frozen(width):
    norm = nn.BatchNorm2d(width)
    norm.running_mean.normal_()
    return norm.eval()


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, frozen], ids=["FrozenBatchNorm2d", "eval()"])
def test_frozen_batch_norm_stays_frozen(norm):
    student, kd, optimizer = start(lambda: Tiny(norm=norm))
    mode, buffers = student.body.norm.training, copy.deepcopy(dict(student.named_buffers()))
    train(student, kd, optimizer, range(4))
    kd.refresh([scene(0)], progress=False)
    kd.check(*scene(1), verbose=False)
    assert student.training and student.body.norm.training == mode
    assert_same(dict(student.named_buffers()), buffers)


def test_running_statistics_are_those_of_the_students_own_forwards():
    """kd, weigh, refresh and check move none of them, nor the counter of batches."""
    plain = Tiny(norm=nn.BatchNorm2d)
    student, kd, _ = start(lambda: Tiny(norm=nn.BatchNorm2d))
    plain.load_state_dict(student.state_dict())
    for seed in range(5):
        images, targets = scene(seed)
        plain(images)
        student(images)
        kd(images, targets)
        kd.weigh(*scene(seed + 10))
    kd.refresh([scene(20)], progress=False)
    kd.check(*scene(21), verbose=False)
    assert int(student.body.norm.num_batches_tracked) == 5
    assert_same(dict(student.named_buffers()), dict(plain.named_buffers()))


# --- interrupted and resumed -------------------------------------------------------------------


@pytest.mark.parametrize("cut", range(8))
def test_resume_at_any_step_is_bit_identical(cut):
    """Refreshes come before steps 3 and 6: cuts before, at and after, with dropout in the student.

    Everything in one file that `torch.load(weights_only=True)` opens.
    """

    def begin():
        run = start(lambda: Tiny(norm=nn.BatchNorm2d, dropout=0.3), torch.optim.AdamW)
        return *run, torch.optim.lr_scheduler.CosineAnnealingLR(run[2], 8)

    def go_on(student, kd, optimizer, schedule, steps):
        history = []
        for seed in steps:
            history += train(student, kd, optimizer, [seed])
            schedule.step()
        return history

    whole = begin()
    expected = go_on(*whole, range(8))
    random = torch.get_rng_state()
    parts = begin()
    found = go_on(*parts, range(cut))
    buffer = io.BytesIO()
    torch.save([[x.state_dict() for x in parts], torch.get_rng_state()], buffer)
    buffer.seek(0)
    torch.manual_seed(123)
    parts = begin()
    loaded, state = torch.load(buffer, weights_only=True)
    for owner, saved in zip(parts, loaded):
        owner.load_state_dict(saved)
    torch.set_rng_state(state)
    found += go_on(*parts, range(cut, 8))
    assert found == expected
    assert_same(states(*parts), states(*whole))
    assert torch.equal(torch.get_rng_state(), random)


def test_the_students_file_knows_nothing_of_distillation():
    student, kd, optimizer = start()
    train(student, kd, optimizer, range(4))
    buffer = io.BytesIO()
    torch.save(student.state_dict(), buffer)
    assert b"global_kd" not in buffer.getvalue()
    buffer.seek(0)
    bare = Tiny()
    bare.load_state_dict(torch.load(buffer, weights_only=True))
    images = scene(9)[0]
    assert torch.equal(bare(images), student(images))


# --- data as it comes --------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["made", "first step", "refresh"])
def test_inference_mode_before_training(what):
    """What was begun in inference mode, as a sanity validation is, goes on outside of it."""

    def run(inside):
        torch.manual_seed(0)
        student, teacher = detector("retinanet", 4).train(), detector("retinanet", 8)
        images, targets = scenes()
        with torch.inference_mode(inside and what == "made"):
            kd = Distiller(student, teacher, small_loss(4, seed=1))
        with torch.inference_mode(inside and what != "made"):
            if what == "first step":
                student(images, targets)
                kd(images, targets)
            elif what == "refresh":
                kd.refresh([(images, targets)], progress=False)
        for _ in range(4):  # past a refresh from the stream
            student(images, targets)
            sum(kd(images, targets).values()).backward()
        assert kd.loss.bank.valid.any()
        return [p.grad for p in kd.parameters()]

    for a, b in zip(run(inside=True), run(inside=False), strict=True):
        assert a.abs().sum() > 0
        torch.testing.assert_close(a, b)


def test_class_lists_with_gaps_and_a_class_seen_once():
    """Labels 1, 5 and 90 of 91; 90 once in the first epoch and never again."""
    student, kd, _ = start(num_classes=91)
    for step in range(10):
        labels = torch.tensor([1, 5, 5, 90 if step == 1 else 1])
        images, targets = scene(step, labels=labels)
        loss = student(images)
        terms = kd(images, targets)
        (loss + sum(terms.values())).backward()
        assert all(x.isfinite() for x in terms.values())
    counts = kd.loss.bank.counts()
    assert counts.count_nonzero(dim=0).nonzero()[:, 0].tolist() == [1, 5, 90]
    assert counts[:, 90].tolist() == [1, 1]  # its one instance, kept over two refreshes without
    images, targets = scene(1, labels=torch.tensor([90, 7, 90, 7]))
    _, omega = kd.weigh(images, targets)
    assert (omega[:, [1, 3]] == 1).all()  # never seen: full trust
    assert all(p.grad.isfinite().all() for p in student.parameters())


def test_epochs_of_background_alone_keep_the_prototypes():
    student, kd, optimizer = start()
    train(student, kd, optimizer, range(3))
    for step in range(3, 10):  # refreshes before 3 (with boxes), 6 and 9 (without)
        images, targets = scene(step, boxes=0)
        optimizer.zero_grad()
        loss = student(images)
        terms = kd(images, targets)
        (loss + sum(terms.values())).backward()
        optimizer.step()
        assert terms["kd_foreground"] == 0 and terms["kd_relation"] == 0
        assert terms["kd_background"] > 0 and terms["kd_background"].isfinite()
        if step == 3:
            bank = states(kd.loss.bank)
            assert bank["0.valid"].any()
    assert_same(states(kd.loss.bank), bank)
    assert all(p.grad.isfinite().all() for p in student.parameters())
    assert train(student, kd, optimizer, [10])[0]["kd_relation"] > 0


def test_no_boxes_at_all_ever():
    """Not one instance up to the first refreshes, and then some."""
    student, kd, optimizer = start()
    for step in range(7):
        images, targets = scene(step, boxes=0)
        student(images)
        kd(images, targets)
    assert not kd.loss.bank.valid.any()
    history = train(student, kd, optimizer, range(7, 11))
    assert kd.loss.bank.valid.any() and history[-1]["kd_relation"] > 0


# --- for long ----------------------------------------------------------------------------------

STATM = Path("/proc/self/statm")


def live_tensors():
    gc.collect()
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


def resident_megabytes():
    return int(STATM.read_text().split()[1]) * 4096 / 2**20


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="reads the memory in use from /proc")
def test_memory_is_flat_over_thousands_of_steps(capsys):
    """2 000 steps, 40 refreshes, with evaluation, averages, telemetry and saving in between."""
    student, kd, optimizer = start(
        lambda: Tiny(norm=nn.BatchNorm2d), refresh_every=50, total_steps=2000, max_instances=60
    )
    average = AveragedModel(student)
    tensors, memory = [], []
    for step in range(1, 2001):
        train(student, kd, optimizer, [step])
        average.update_parameters(student)
        if step % 100 == 0:
            student.eval()
            with torch.no_grad():
                student(scene(0)[0])
            student.train()
            kd.weigh(*scene(0))
            assert all(torch.tensor(list(kd.telemetry(1.0).values())).isfinite())
            torch.save([x.state_dict() for x in (student, kd, optimizer)], io.BytesIO())
            tensors.append(live_tensors())
            memory.append(resident_megabytes())
    with capsys.disabled():
        print(
            f"\nsteps 500 to 2000: live tensors {tensors[4]} to {tensors[-1]}, resident memory "
            f"{memory[4]:.1f} to {memory[-1]:.1f} MiB (at most {max(memory[4:]):.1f})"
        )
    assert len(set(tensors[4:])) == 1
    assert max(memory[4:]) - memory[4] < 4


# --- the table ---------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]


def test_every_test_that_the_page_names_exists():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    table = [line for line in page.split("## Appendix: ")[1].splitlines() if line.startswith("|")]
    named = [re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", line) for line in table]
    promised = [row for row, line in zip(named, table) if "not tested" not in line][2:]
    assert len(promised) >= 12 and all(promised)  # every way has a test, or says that it has none
    for file, name in sum(named, []):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        functions = {x.name for x in tree.body if isinstance(x, ast.FunctionDef)}
        assert name in functions, f"{file}::{name}"
