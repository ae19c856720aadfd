"""Hooks: what they read, what they refuse, and that they leave nothing behind."""

import copy
import dataclasses
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from global_kd import FeatureTap, Pyramid, find_pyramids
from global_kd.hooks import evaluating, feature_maps


class Neck(nn.Module):
    """Three levels in the container asked for."""

    def __init__(self, container="list"):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, c, 1) for c in (5, 6, 7))
        self.container = container

    def forward(self, x):
        maps = []
        for conv in self.convs:
            x = nn.functional.avg_pool2d(x, 2)
            maps.append(conv(x))
        if self.container == "dict":
            return {"p1": maps[0], "p2": maps[1], "note": "not a map", "p3": maps[2]}
        if self.container == "object":
            return Output(maps)
        return tuple(maps) if self.container == "tuple" else maps


@dataclasses.dataclass
class Output:
    feature_maps: list


class Detector(nn.Module):
    def __init__(self, container="list"):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2, stride=2)
        self.neck = Neck(container)
        self.head = nn.Conv2d(7, 2, 1)

    def forward(self, x):
        maps = feature_maps(self.neck(self.stem(x)))
        return self.head(maps[-1])


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.unused = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(self.conv(x))


IMAGE = torch.rand(2, 3, 32, 48)


@pytest.mark.parametrize("container", ["list", "tuple", "dict", "object"])
def test_every_kind_of_output_gives_its_maps(container):
    model = Detector(container)
    with FeatureTap(model, "neck") as tap:
        model(IMAGE)
        maps = feature_maps(tap.read()["neck"])
    assert [tuple(x.shape) for x in maps] == [(2, 5, 8, 12), (2, 6, 4, 6), (2, 7, 2, 3)]


def test_a_single_tensor_and_inputs_can_be_tapped_under_own_names():
    model = Detector()
    with FeatureTap(model, {"stem": "stem", "image": "stem"}, inputs=["image"]) as tap:
        model(IMAGE)
        read = tap.read()
    assert read["image"][0] is IMAGE
    assert torch.equal(read["stem"], model.stem(IMAGE))


def test_the_record_keeps_its_graph_for_the_student():
    model = Detector()
    with FeatureTap(model, "stem") as tap:
        model(IMAGE)
        tap.read()["stem"].sum().backward()
    assert model.stem.weight.grad is not None


def test_each_forward_starts_afresh():
    model = Detector()
    with FeatureTap(model, "stem") as tap:
        model(IMAGE)  # an evaluation in between, say
        model(IMAGE * 2)
        assert torch.equal(tap.read()["stem"], model.stem(IMAGE * 2))


def test_silence_is_an_error():
    model = Shared()
    with FeatureTap(model, "unused") as tap:
        model(IMAGE)
        with pytest.raises(ValueError, match="'unused'.*never fired"):
            tap.read()
    with FeatureTap(model, "conv") as tap:
        with pytest.raises(ValueError, match="never fired"):
            tap.read()  # before any forward
        model(IMAGE)
        with pytest.raises(ValueError, match="'conv'.*fired 2 times"):
            tap.read()


def test_reading_twice_needs_two_forwards():
    model = Detector()
    with FeatureTap(model, "stem") as tap:
        model(IMAGE)
        tap.read()
        with pytest.raises(ValueError, match="never fired"):
            tap.read()


def test_an_unknown_path_lists_the_nearest_names():
    with pytest.raises(ValueError, match=r"'nek'; nearest: .*neck"):
        FeatureTap(Detector(), "nek")


def test_removal_leaves_no_trace():
    model = Detector()
    before = {n: dict(m._forward_hooks) for n, m in model.named_modules()}
    tap = FeatureTap(model, ["stem", "neck"])
    model(IMAGE)
    tap.remove()
    assert {n: dict(m._forward_hooks) for n, m in model.named_modules()} == before
    assert not model._forward_pre_hooks
    assert list(model.state_dict()) == list(Detector().state_dict())


def test_read_lets_go_of_the_tensors():
    model = Detector()
    with FeatureTap(model, "stem") as tap:
        model(IMAGE)
        reference = weakref.ref(tap.read()["stem"])
        gc.collect()
        assert reference() is None


def test_copies_and_pickles_carry_no_tensors_and_no_live_hooks():
    model = Detector()
    with FeatureTap(model, "stem") as tap:
        model(IMAGE)  # deepcopy of a recorded, non-leaf tensor would raise
        twin = copy.deepcopy(model)
        size = len(pickle.dumps(model))
        model(torch.rand(2, 3, 320, 480))
        assert len(pickle.dumps(model)) == size
        restored = pickle.loads(pickle.dumps(model))
        recorded = tap.read()["stem"]
        for other in (twin, restored):
            other(IMAGE)
        with pytest.raises(ValueError, match="never fired"):
            tap.read()  # the copies' forwards do not reach this tap
        assert recorded.shape[-1] == 240
        dead = pickle.loads(pickle.dumps(tap))
        assert dead.paths == tap.paths
        with pytest.raises(ValueError, match="removed"):
            dead.run(IMAGE)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)


def test_run_stops_as_soon_as_all_taps_have_fired():
    class Bomb(nn.Module):
        def forward(self, x):
            raise AssertionError("ran further than needed")

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Bomb())
    with FeatureTap(model, "0") as tap:
        assert tap.run(IMAGE)["0"].shape == (2, 4, 32, 48)
        with pytest.raises(AssertionError):
            model(IMAGE)  # an ordinary forward is not cut short


def test_wrappers_and_their_prefixes_are_seen_through():
    model = Detector()
    with FeatureTap(nn.DataParallel(model), "module.stem") as tap:
        model(IMAGE)
        assert "module.stem" in tap.read()


def test_recomputation_of_checkpointing_is_not_recorded():
    class Checkpointed(Detector):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    model = Checkpointed()
    with FeatureTap(model, "stem") as tap:
        model(IMAGE).sum().backward()  # the module runs twice, once in backward
        assert tap.read()["stem"].shape == (2, 4, 16, 24)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_attach_then_compile_works_and_the_reverse_is_refused(backend):
    torch._dynamo.reset()
    model = Detector()
    tap = FeatureTap(model, "stem")
    compiled = torch.compile(model, backend=backend)
    for scale in (1, 2):  # the second call reuses the trace
        compiled(IMAGE * scale)
        torch.testing.assert_close(tap.read()["stem"], model.stem(IMAGE * scale))
    with pytest.raises(ValueError, match="Attach first, then compile"):
        FeatureTap(compiled, "stem")
    torch._dynamo.reset()
    fresh = torch.compile(Detector(), backend=backend)  # compiled but not traced: still in time
    with FeatureTap(fresh, "stem") as late:
        fresh(IMAGE)
        assert late.read()["stem"].shape == (2, 4, 16, 24)


def test_find_pyramids_measures_strides_and_changes_nothing():
    model = Detector("dict").train()
    model.stem.eval()  # a frozen part keeps its own mode
    random = torch.get_rng_state()
    found = find_pyramids(model, IMAGE)
    assert found == [Pyramid("neck", (4.0, 8.0, 16.0), (5, 6, 7))]
    assert model.training and model.neck.training and not model.stem.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(random, torch.get_rng_state())


def test_find_pyramids_on_a_size_that_does_not_divide():
    model = Detector()
    (pyramid,) = find_pyramids(model, torch.rand(1, 3, 100, 76))
    assert pyramid.strides == (4.0, 8.0, 16.0)


def test_evaluating_restores_each_module_even_after_an_error():
    model = Detector().train()
    model.head.eval()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not model.training
        raise RuntimeError
    assert model.training and not model.head.training
