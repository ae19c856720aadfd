"""Which form of an op runs, and what the processor's forms promise: little memory, same numbers."""

import sys
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import global_kd.functional as F
from global_kd.ops import dispatch, memory
from global_kd.ops.dispatch import backend, force
from tests.strategies import random


def test_the_form_follows_the_tensor_unless_forced():
    x = torch.ones(2)
    assert backend(x) == "cpu"
    assert backend(x.to("meta")) == "definition"
    with force("definition"):
        assert backend(x) == "definition"
        with force("triton"):
            assert backend(x) == "triton"
        assert backend(x) == "definition"
    with pytest.raises(RuntimeError, match="on the way"), force("triton"):
        raise RuntimeError("on the way")
    assert backend(x) == "cpu"
    with pytest.raises(ValueError, match="backend: expected one of 'definition', 'cpu', 'triton'"):
        force("cuda").__enter__()


@pytest.mark.parametrize("forced", [None, "cpu", "definition"])
def test_a_compiler_gets_the_definition(forced):
    def signed(x):
        return x if backend(x) == "definition" else -x

    torch._dynamo.reset()
    with force(forced) if forced else nullcontext():
        compiled = torch.compile(signed, backend="eager", fullgraph=True)
        assert compiled(torch.ones(2)).tolist() == [1, 1]


@pytest.mark.parametrize("trial", ["passes", "fails", "is not there"])
def test_twins_are_tried_before_they_are_trusted(trial, monkeypatch):
    """A GPU is imitated by the only device there is."""
    calls = []

    def tried(device, dtype):
        calls.append(device)
        assert dispatch._twins_work(device, dtype) is False  # its own ops find the definition
        if trial == "fails":
            raise AssertionError("numbers differ")

    monkeypatch.setattr(dispatch, "_trusted", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setitem(sys.modules, "global_kd.ops._triton.trial", SimpleNamespace(trial=tried))
    if trial == "is not there":
        monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    here = torch.device("cpu")
    expected = pytest.warns(UserWarning, match="with torch.float32 .AssertionError: numbers differ")
    with expected if trial == "fails" else nullcontext():
        assert dispatch._twins_work(here, torch.float32) is (trial == "passes")
    assert dispatch._twins_work(here, torch.float32) is (trial == "passes")
    assert len(calls) == (trial != "is not there")  # once per process


def test_there_is_no_trial_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(dispatch, "_trusted", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert dispatch._twins_work(torch.device("cpu"), torch.float32) is False
    assert dispatch._trusted == {}


class Largest(TorchDispatchMode):
    """How many tensors of at least this size new memory was taken for."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            x.untyped_storage().data_ptr()
            for x in tree_leaves((args, kwargs or {}))
            if isinstance(x, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.count += x.numel() >= self.numel
        return out


BOXES = torch.tensor([[0.0, 0, 100, 60], [30, 10, 220, 120], [4, 4, 8, 8]])
IMAGE = torch.tensor([0, 1, 1])
SHAPE = (2, 64, 64, 96)  # many planes: one of them is little beside the map


@pytest.mark.parametrize("op", ["imitation", "pool"])
def test_nothing_of_the_maps_size_is_made_but_the_gradient(op):
    student, teacher = random(SHAPE, 0).float().requires_grad_(), random(SHAPE, 1).float()

    def run():
        if op == "pool":
            return F.pool_boxes(student, BOXES, IMAGE, 4).square().sum()
        fg, bg = F.imitation_loss(student, teacher, BOXES, IMAGE, 4, torch.rand(3))
        return 0.3 * fg + 2 * bg

    with Largest(student.numel() // 2) as forward:
        value = run()
    assert forward.count == 0
    with Largest(student.numel() // 2) as backward:
        torch.autograd.grad(value, student)
    assert backward.count == 1
    with force("definition"), Largest(student.numel() // 2) as slow:  # the witness can see
        run()
    assert slow.count > 0


@pytest.mark.parametrize("count", [1, 40, 300])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_forms_agree_for_few_and_many_boxes(count, layout):
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=g) * torch.tensor([380.0, 250.0])
    boxes = torch.cat([corner, corner + torch.rand(count, 2, generator=g) * 200], dim=1)
    image, weights = torch.arange(count) % 2, torch.rand(count, generator=g)
    results = []
    for form in ("cpu", "definition"):
        student = random(SHAPE, 0).float().contiguous(memory_format=layout).requires_grad_()
        teacher = random(SHAPE, 1).float().contiguous(memory_format=layout)
        with force(form):
            fg, bg = F.imitation_loss(student, teacher, boxes, image, 4, weights)
            pooled = F.pool_boxes(student, boxes, image, 4)
            (fg + bg + pooled.square().sum()).backward()
        results.append((fg, bg, pooled, student.grad))
    for mine, defined in zip(*results, strict=True):
        torch.testing.assert_close(mine, defined, rtol=1e-4, atol=1e-5)


def test_a_gradient_asked_for_twice_is_the_same():
    student, teacher = random(SHAPE, 0).float().requires_grad_(), random(SHAPE, 1).float()
    fg, bg = F.imitation_loss(student, teacher, BOXES, IMAGE, 4)
    both = fg + bg
    first, second = (torch.autograd.grad(both, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (alone,) = torch.autograd.grad(fg, student, retain_graph=True)
    (other,) = torch.autograd.grad(bg, student)
    torch.testing.assert_close(alone + other, first)


def test_a_map_changed_between_forward_and_backward_is_an_error():
    student = random(SHAPE, 0).float().requires_grad_()
    teacher = random(SHAPE, 1).float()
    fg, _ = F.imitation_loss(student, teacher, BOXES, IMAGE, 4)
    teacher.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fg.backward()


@pytest.mark.parametrize("size", [3, memory._LARGE // 4 + 5], ids=["small", "in huge pages"])
def test_fresh_memory_is_memory(size):
    x = memory.empty(torch.Size([size]), torch.float32)
    assert x.shape == (size,) and x.dtype == torch.float32
    x.fill_(2)
    assert (x == 2).all()


@pytest.fixture
def trials(monkeypatch):
    """The trials that took place, on a GPU that is imitated."""
    found = []
    monkeypatch.setattr(dispatch, "_trusted", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setitem(
        sys.modules,
        "global_kd.ops._triton.trial",
        SimpleNamespace(trial=lambda *made: found.append(made)),
    )
    monkeypatch.setattr(dispatch, "find_spec", lambda name: name)
    return found


@pytest.mark.parametrize("mode", ["inference_mode", "vmap", "grad", "fake tensors"])
def test_the_trial_waits_for_a_better_moment(mode, trials):
    here, said = torch.device("cpu"), []

    def ask(x):
        said.append(dispatch._twins_work(here, torch.float32))
        return x.sum()

    x = torch.ones(2, 2)
    if mode == "inference_mode":
        with torch.inference_mode():
            ask(x)
    elif mode == "fake tensors":
        with FakeTensorMode():
            ask(torch.ones(2, 2))
    else:
        (torch.vmap(ask) if mode == "vmap" else torch.func.grad(ask))(x)
    assert said == [False] and not trials and dispatch._trusted == {}
    assert dispatch._twins_work(here, torch.float32) and trials == [(here, torch.float32)]


def test_an_interrupted_trial_is_tried_again(trials, monkeypatch):
    def interrupted(device, dtype):
        raise KeyboardInterrupt

    here, trial = torch.device("cpu"), sys.modules["global_kd.ops._triton.trial"]
    with monkeypatch.context() as patch:
        patch.setattr(trial, "trial", interrupted)
        with pytest.raises(KeyboardInterrupt):
            dispatch._twins_work(here, torch.float32)
    assert dispatch._twins_work(here, torch.float32) and trials == [(here, torch.float32)]


def test_each_dtype_is_tried_apart(trials, monkeypatch):
    """Kernels that fail in one take nothing from the others."""

    def fails_in_halves(device, dtype):
        trials.append(dtype)
        if dtype != torch.float32:
            raise RuntimeError("out of resource: shared memory")

    here = torch.device("cpu")
    trial = sys.modules["global_kd.ops._triton.trial"]
    monkeypatch.setattr(trial, "trial", fails_in_halves)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        said = pytest.warns(UserWarning, match=rf"do not work here with {dtype} .*shared memory")
        with said if dtype != torch.float32 else nullcontext():
            assert dispatch._twins_work(here, dtype) is (dtype == torch.float32)
        assert dispatch._twins_work(here, dtype) is (dtype == torch.float32)
    assert trials == [torch.bfloat16, torch.float32, torch.float16]


def on_a_gpu_that_is_imitated(x, monkeypatch):
    """What `backend` says of a tensor, as if its device were a GPU."""
    monkeypatch.setattr(
        dispatch, "_twins_work", lambda device, dtype: trials_of.append((device, dtype)) or True
    )
    trials_of = []
    stand_in = SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=x.dtype)
    return backend(stand_in), trials_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_trial_is_of_the_tensors_dtype(dtype, monkeypatch):
    form, asked = on_a_gpu_that_is_imitated(torch.ones(2, dtype=dtype), monkeypatch)
    assert form == ("definition" if dtype == torch.float64 else "triton")
    assert [d for _, d in asked] == ([] if dtype == torch.float64 else [dtype])


@pytest.mark.parametrize("place", ["default dtype", "default device", "no_grad", "autocast"])
def test_the_trial_has_its_own_dtype_and_device(place):
    """Its inputs are drawn alike wherever it is called; both forms are the definition here."""
    from global_kd.ops._triton import trial as module

    seen = []

    def forced(form):
        seen.append(form)
        return force("definition")

    where = {
        "default dtype": nullcontext(),
        "default device": torch.device("meta"),
        "no_grad": torch.no_grad(),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
    }[place]
    before = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "force", forced)
        patch.setattr(module, "_SIZES", {"small tiles": module._SIZES["small tiles"]})
        try:
            if place == "default dtype":
                torch.set_default_dtype(torch.float64)
            with where:
                module.trial(torch.device("cpu"), torch.float32)
        finally:
            torch.set_default_dtype(before)
    assert seen == ["triton", "definition"]


def test_large_tiles_are_tried_beside_small_ones(monkeypatch):
    from global_kd.ops._triton import trial as module

    seen = []

    def fails_where_large(device, dtype, count, *sizes):
        seen.append(count)
        if count >= 256:
            raise RuntimeError("out of resource")

    monkeypatch.setattr(module, "_try", fails_where_large)
    with pytest.raises(RuntimeError, match="large tiles: RuntimeError: out of resource"):
        module.trial(torch.device("cpu"), torch.float32)
    assert len(seen) == 2 and seen[0] < 256


class OutOfResources(Exception):
    """As Triton has some: made of more than one argument."""

    def __init__(self, required, limit, name):
        super().__init__(f"out of resource: {name}, Required: {required}, Hardware limit: {limit}")


def test_what_a_kernel_says_is_said_whatever_its_error_is_made_of(monkeypatch):
    from global_kd.ops._triton import trial as module

    def fails(*_):
        raise OutOfResources(232448, 101376, "shared memory")

    monkeypatch.setattr(module, "_try", fails)
    with pytest.raises(RuntimeError, match="small tiles: OutOfResources: .* Required: 232448"):
        module.trial(torch.device("cpu"), torch.float32)


def test_a_trial_without_memory_says_nothing_of_the_twins(trials, monkeypatch):
    from global_kd.ops._triton import trial as real

    def no_memory(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    here, trial = torch.device("cpu"), sys.modules["global_kd.ops._triton.trial"]
    with monkeypatch.context() as patch:
        patch.setattr(real, "_try", no_memory)
        patch.setattr(trial, "trial", real.trial)
        assert dispatch._twins_work(here, torch.float32) is False
    assert dispatch._twins_work(here, torch.float32) and trials == [(here, torch.float32)]


def test_a_trial_in_one_thread_forces_nothing_in_another():
    inside, done = threading.Event(), threading.Event()

    def elsewhere():
        with force("triton"), force("definition"):
            inside.set()
            done.wait(30)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    try:
        assert inside.wait(30)
        assert backend(torch.ones(2)) == "cpu"
        with force("definition"):
            done.set()
            thread.join()
            assert backend(torch.ones(2)) == "definition"  # the other has ended
    finally:
        done.set()
    assert not dispatch._forced


@pytest.mark.parametrize("where", ["checkpointed", "deterministic"])
def test_the_trial_is_not_disturbed_by_what_its_caller_does(where, monkeypatch):
    """Both forms are the definition here, as above."""
    from global_kd.ops._triton import trial as module

    told = []

    def forced(form):
        told.append(torch.are_deterministic_algorithms_enabled())
        return force("definition")

    monkeypatch.setattr(module, "force", forced)
    monkeypatch.setattr(module, "_SIZES", {"small tiles": module._SIZES["small tiles"]})

    def work(x):
        if not told:
            module.trial(torch.device("cpu"), torch.float32)
        return x.sin().square().sum()

    x = torch.ones(3, requires_grad=True)
    if where == "checkpointed":
        checkpoint(work, x, use_reentrant=False).backward()
    else:
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            work(x).backward()
            assert torch.is_deterministic_algorithms_warn_only_enabled()
        finally:
            torch.use_deterministic_algorithms(False)
    assert told == [False, False]
    torch.testing.assert_close(x.grad, 2 * x.detach().sin() * x.detach().cos())
