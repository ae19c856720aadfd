"""A run goes on from its state, whoever wrote it, and whatever dtype the modules are in."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from global_kd import Distiller, GlobalKnowledgeLoss, PrototypeBank, PrototypeGenerator, Targets
from global_kd.losses import MGD

NAMES = ("ant", "bee", "çow")


def detector(width):
    return nn.Sequential(nn.Conv2d(3, width, 8, stride=8), nn.Conv2d(width, 5, 1))


def batch(number, ids=True, boxes=5):
    g = torch.Generator().manual_seed(number)
    corner = 20 * torch.rand(boxes, 2, generator=g)
    target = {
        "boxes": torch.cat([corner, corner + 9 + 25 * torch.rand(boxes, 2, generator=g)], dim=1),
        "labels": torch.randint(0, 3, (boxes,), generator=g),
    }
    if ids:
        target["ids"] = torch.arange(boxes) + 100 * number
    return torch.rand(1, 3, 64, 64, generator=g), [target]


def start(**options):
    torch.manual_seed(0)
    student, teacher = detector(4), detector(8)
    options = {"min_side": 12, "max_instances": 4, "total_steps": 30, "refresh_every": 4} | options
    loss = GlobalKnowledgeLoss(3, num_prototypes=3, class_names=NAMES, **options)
    paths = {"student_path": "0", "teacher_path": "0", "example_inputs": (batch(0)[0],)}
    kd = Distiller(student, teacher, loss, **paths)
    return student, kd, torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=1e-3)


def train(student, kd, optimizer, steps):
    for seed in steps:
        student(batch(seed)[0])
        optimizer.zero_grad()
        sum(kd(*batch(seed)).values()).backward()
        optimizer.step()


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert x.dtype == b[name].dtype and torch.equal(x, b[name]), name


# --- every writer ------------------------------------------------------------------------------


def through_torch(kd, fresh, folder):
    torch.save(kd.state_dict(), folder / "kd.pt")
    fresh.load_state_dict(torch.load(folder / "kd.pt", weights_only=True))


def through_safetensors(kd, fresh, folder):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(kd.state_dict(), folder / "kd.safetensors")
    fresh.load_state_dict(safetensors.load_file(folder / "kd.safetensors"))


def through_safetensors_model(kd, fresh, folder):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_model(kd, str(folder / "kd.safetensors"))
    safetensors.load_model(fresh, str(folder / "kd.safetensors"))


def through_distributed_checkpoint(kd, fresh, folder):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "assuming the intent is to save in a single process"
        dcp.save({"kd": kd.state_dict()}, checkpoint_id=folder)
        state = {"kd": fresh.state_dict()}
        dcp.load(state, checkpoint_id=folder)
    fresh.load_state_dict(state["kd"])


def through_distributed_state_dict(kd, fresh, folder):
    helper = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"kd": helper.get_model_state_dict(kd)}, checkpoint_id=folder)
        state = {"kd": helper.get_model_state_dict(fresh)}
        dcp.load(state, checkpoint_id=folder)
        helper.set_model_state_dict(fresh, state["kd"])


def through_accelerate(kd, fresh, folder):
    accelerate = pytest.importorskip("accelerate")
    before = accelerate.Accelerator(cpu=True)
    before.prepare(kd)
    before.save_state(str(folder))
    after = accelerate.Accelerator(cpu=True)
    after.prepare(fresh)
    after.load_state(str(folder))


WRITERS = [
    through_torch,
    through_safetensors,
    through_safetensors_model,
    through_distributed_checkpoint,
    through_distributed_state_dict,
    through_accelerate,
]


@pytest.mark.parametrize("cut", [0, 3, 4, 6], ids="after {0} steps".format)
@pytest.mark.parametrize("write", WRITERS, ids=lambda f: f.__name__)
def test_a_run_goes_on_whoever_wrote_its_state(write, cut, tmp_path):
    whole = start()
    train(*whole, range(10))
    before = start()
    train(*before, range(cut))
    after = start(seed=9)  # every bit comes from the file
    for owner, saved in zip((after[0], after[2]), (before[0], before[2])):
        owner.load_state_dict(saved.state_dict())
    write(before[1], after[1], tmp_path)
    assert_same(before[1].state_dict(), after[1].state_dict())
    assert len(before[1].loss.generator) == len(after[1].loss.generator)
    assert after[1].loss.bank.class_names == NAMES
    train(*after, range(cut, 10))
    assert whole[1].loss.bank.valid.any() and len(whole[1].loss.generator) > 0
    assert_same(whole[1].state_dict(), after[1].state_dict())


def test_names_shapes_and_dtypes_of_a_state_do_not_depend_on_the_state():
    def structure(kd):
        return {k: (x.dtype, x.shape) for k, x in kd.state_dict().items()}

    student, kd, optimizer = start()
    fresh = structure(kd)
    for step in range(6):
        train(student, kd, optimizer, [step])
        assert structure(kd) == fresh
    kd.refresh([batch(7)], progress=False)
    assert structure(kd) == fresh


def test_without_a_stream_a_state_keeps_no_room_for_a_sample():
    _, kd, _ = start(refresh_every=None, max_instances=10_000)
    assert kd.loss.generator.get_extra_state().numel() < 100


def test_states_from_before_still_load():
    """Of version 1: dictionaries of tensors and plain values."""
    student, kd, optimizer = start()
    train(student, kd, optimizer, range(6))
    old = kd.state_dict()
    loss, generator = kd.loss, kd.loss.generator
    rows = generator._sample.cut()
    keys = [k for k in old if "generator" in k or "bank._extra" in k]
    assert len(keys) == 2
    for key in keys:
        if "bank" in key:
            old[key] = loss.bank.origin()
        else:
            counters = {
                "seed": 0,
                "turn": loss.generator.turn,
                "calls": loss.generator._sample.calls,
            }
            old[key] = {"rows": rows._asdict(), **counters}
    _, fresh, _ = start()
    fresh.load_state_dict(old)
    assert_same(fresh.state_dict(), kd.state_dict())


@pytest.mark.parametrize(
    "damage",
    [
        lambda x: x[:-4],
        lambda x: x[:8],
        lambda x: x.float(),
        lambda x: torch.cat([torch.full((8,), 255, dtype=torch.uint8), x[8:]]),
    ],
    ids=["cut", "header", "dtype", "rows"],
)
def test_a_damaged_sample_is_refused(damage):
    generator = start()[1].loss.generator
    with pytest.raises(ValueError, match="state_dict: expected"):
        generator.set_extra_state(damage(generator.get_extra_state()))


def test_names_longer_than_usual_are_kept():
    names = ["x" * 5000, "y" * 9000, "z"]
    bank = PrototypeBank(1, 3, 1, 2, 2, class_names=names)
    other = PrototypeBank(1, 3, 1, 2, 2)
    other.load_state_dict(bank.state_dict())
    assert other.class_names == tuple(names)


# --- passes over a loader ----------------------------------------------------------------------


@pytest.mark.parametrize("stream", [None, 3], ids=["passes alone", "a stream between"])
def test_resumed_between_two_passes_the_second_takes_the_same_sample(stream):
    loader = [batch(n) for n in range(8)]
    whole = start(refresh_every=stream)
    parts = start(refresh_every=stream)
    for run in (whole, parts):
        run[1].refresh(loader, progress=False)
        train(*run, range(5))
    resumed = start(refresh_every=stream)
    buffer = io.BytesIO()
    torch.save([x.state_dict() for x in parts], buffer)
    buffer.seek(0)
    for owner, state in zip(resumed, torch.load(buffer, weights_only=True)):
        owner.load_state_dict(state)
    for run in (whole, resumed):
        run[1].refresh(loader, progress=False)
        train(*run, range(5, 9))
    assert_same(whole[1].state_dict(), resumed[1].state_dict())
    ids = whole[1].loss.bank.ids
    assert (ids >= 0).sum() < 40  # the sample had to choose


def test_a_state_of_another_sample_ends_the_use_of_kept_rows():
    """Loaded into a run that has rows of its own."""
    loader = [batch(n) for n in range(8)]
    (_, kd, _), (_, other, _), (_, fresh, _) = start(), start(seed=5), start(seed=5)
    for each in (kd, other, fresh):
        each.refresh(loader, progress=False)
    kd.load_state_dict(other.state_dict())
    for each in (kd, fresh):
        each.refresh(loader, progress=False)
    assert_same(kd.state_dict(), fresh.state_dict())


# --- dtypes ------------------------------------------------------------------------------------


def small(dtype=None):
    loss = GlobalKnowledgeLoss(
        3,
        student_channels=[4],
        teacher_channels=[8],
        strides=[8],
        total_steps=9000,
        refresh_every=None,
        min_side=0,
    )
    return loss if dtype is None else loss.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_telemetry_does_not_depend_on_the_dtype_of_the_loss(dtype):
    plain, other = small(), small(dtype)
    g = torch.Generator().manual_seed(0)
    labels = torch.full((100,), 1)
    for loss in (plain, other):
        omega = torch.rand(1, 100, generator=g.manual_seed(0))
        for _ in range(30):  # more than the 256 that bfloat16 counts to
            loss._tally(omega, labels)
    expected, found = plain.telemetry(), other.telemetry()
    assert expected["omega/class_1"] == pytest.approx(omega.mean().item(), rel=1e-4)
    assert found == expected
    assert "omega/class_1" not in other.telemetry()  # read, it starts anew


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bank_stays_in_float32(dtype):
    bank = PrototypeBank(1, 2, 2, 3, 3)
    bank.student.fill_(1.0009765625e-5)
    bank.ids.fill_(2**40 + 1)
    before = copy.deepcopy(bank)
    bank.to(dtype)
    for a, b in zip(bank.buffers(), before.buffers(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    other = PrototypeBank(1, 2, 2, 3, 3).to(dtype)
    other.load_state_dict(bank.state_dict())
    assert other.student.dtype == torch.float32


def test_tensors_of_a_loss_follow_it_to_a_device():
    loss = small().to("meta")
    assert {x.device.type for x in (*loss.bank.buffers(), loss._omega)} == {"meta"}
    loss.to_empty(device="cpu")
    assert {x.device.type for x in (*loss.bank.buffers(), loss._omega)} == {"cpu"}


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["swa", "ema"])
def test_an_average_with_buffers_around_a_distiller(average):
    student, kd, optimizer = start()
    whole = nn.ModuleDict({"student": student, "kd": kd})
    averaged = AveragedModel(whole, multi_avg_fn=average, use_buffers=True)
    for step in range(6):
        train(student, kd, optimizer, [step])
        averaged.update_parameters(whole)
    assert all(p.isfinite().all() for p in averaged.parameters())
    assert kd.loss.bank.valid.any()


# --- a default device, a default dtype ---------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_what_is_made_under_another_default_dtype_is_the_same(dtype):
    """Adapters, random masks, and the teacher's rows that are kept from pass to pass."""
    ends = []
    for default in (torch.float32, dtype):
        torch.manual_seed(0)
        student, teacher = detector(4), detector(8)
        batches = [batch(n) for n in range(6)]
        torch.set_default_dtype(default)
        try:
            loss = GlobalKnowledgeLoss(3, num_prototypes=3, min_side=0, total_steps=30, relation=1)
            paths = {"student_path": "0", "teacher_path": "0", "example_inputs": batches[0][:1]}
            kd = Distiller(student, teacher, [loss, MGD(total_steps=30)], **paths)
            optimizer = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=1e-3)
            for images, targets in batches:
                kd.refresh(batches, progress=False)
                student(images)
                optimizer.zero_grad()
                terms = kd(images, targets)
                sum(terms.values()).backward()
                optimizer.step()
            assert {x.dtype for x in terms.values()} == {torch.float32}
        finally:
            torch.set_default_dtype(torch.float32)
        ends.append(kd.state_dict())
    assert_same(*ends)


def test_neither_a_default_device_nor_a_default_dtype_has_a_say():
    """ "meta" stands for "cuda": a tensor without an explicit device could not be read."""
    expected = start()
    train(*expected, range(6))
    expected[1].refresh([batch(n) for n in range(3)], progress=False)
    found, batches = start(), {}
    for number in range(6):
        images, (target,) = batch(number)
        index = torch.zeros_like(target["labels"])
        batches[number] = images, Targets(target["boxes"], target["labels"], index, target["ids"])
    torch.set_default_device("meta")
    try:
        loss = small()
        torch.set_default_dtype(torch.float64)
        student, kd, optimizer = found
        for step in range(6):
            student(batches[step][0])
            optimizer.zero_grad()
            sum(kd(*batches[step]).values()).backward()
            optimizer.step()
        kd.refresh([batches[n] for n in range(3)], progress=False)
        numbers = kd.telemetry()
        state = kd.state_dict()
        generator = PrototypeGenerator(3, min_side=0, max_instances=2)
        targets = batches[0][1]
        rows = torch.rand(1, 5, 4, device="cpu", dtype=torch.float32)
        generator.add(rows, rows, targets)
        bank = generator.generate()
        generator.load_state_dict(generator.state_dict())
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert_same(expected[1].state_dict(), state)
    assert numbers["step"] == 6 and bank.valid.any()
    assert {p.device.type for p in loss.parameters()} == {"cpu"}
    for p, q in zip(loss.parameters(), small().parameters(), strict=True):
        assert torch.equal(p, q)


# --- a teacher that moves on purpose ---------------------------------------------------------


def start_with_average(moving, **options):
    student, kd, _ = start(**options)
    kd.detach()
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    paths = {"student_path": "0", "teacher_path": "0", "example_inputs": (batch(0)[0],)}
    loss = GlobalKnowledgeLoss(
        3, num_prototypes=3, min_side=12, max_instances=4, total_steps=30, refresh_every=4
    )
    kd = Distiller(student, average, loss, moving_teacher=moving, **paths)
    optimizer = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=1e-2)
    return student, kd, optimizer, average


def train_with_average(student, kd, optimizer, average, steps):
    for step in steps:
        train(student, kd, optimizer, [step])
        average.update_parameters(student)


@pytest.mark.parametrize("moving", [True, False])
def test_a_run_with_an_average_as_teacher_is_resumed(moving):
    whole = start_with_average(moving)
    train_with_average(*whole, range(10))
    before = start_with_average(moving)
    train_with_average(*before, range(6))
    assert before[1].loss.bank.valid.any()
    after = start_with_average(moving)
    for fresh, saved in zip(after, before, strict=True):
        fresh.load_state_dict(saved.state_dict())
    if moving:
        train_with_average(*after, range(6, 10))
        assert_same(whole[1].state_dict(), after[1].state_dict())
        assert_same(whole[0].state_dict(), after[0].state_dict())
    else:
        with pytest.raises(ValueError, match=r"teacher: .* Distiller\(..., moving_teacher=True\)"):
            train_with_average(*after, range(6, 10))


def test_a_moving_teacher_is_looked_at_in_every_pass():
    """Its rows of an earlier pass are another teacher's."""
    student, kd, optimizer, average = start_with_average(True)
    loader = [batch(n) for n in range(3)]
    kd.refresh(loader, progress=False)
    with torch.no_grad():
        for p in average.parameters():
            p.mul_(2)
    kd.refresh(loader, progress=False)
    bank = {name: x.clone() for name, x in kd.loss.bank.state_dict().items()}
    other = start_with_average(True)
    other[3].load_state_dict(average.state_dict())
    other[1].refresh(loader, progress=False)
    assert torch.equal(bank["teacher"], other[1].loss.bank.state_dict()["teacher"])
    assert kd.loss.bank.teacher_fingerprint.startswith("moving")


@pytest.mark.parametrize("change", ["depth", "from still", "to still"])
def test_a_moving_teacher_of_another_structure_is_another(change):
    student, kd, optimizer, average = start_with_average(change != "from still")
    train_with_average(student, kd, optimizer, average, range(6))
    state = kd.state_dict()
    kd.detach()
    teacher = nn.Sequential(*average.module, nn.ReLU(), nn.Conv2d(5, 5, 1))
    paths = {"student_path": "0", "teacher_path": "0", "example_inputs": (batch(0)[0],)}
    loss = GlobalKnowledgeLoss(
        3, num_prototypes=3, min_side=12, max_instances=4, total_steps=30, refresh_every=4
    )
    kd = Distiller(
        student,
        teacher if change == "depth" else average,
        loss,
        moving_teacher=change != "to still",
        **paths,
    )
    kd.load_state_dict(state)
    with pytest.raises(ValueError, match="teacher: expected that of the prototypes in the bank"):
        train(student, kd, optimizer, [6])
