"""A record is what the module put out at that moment, and of the pictures it is taken for."""

import copy
import dataclasses
import gc
import pickle
import weakref
from collections import OrderedDict, UserDict, UserList, deque, namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from global_kd import FeatureTap
from global_kd.hooks import (
    class_names,
    evaluating,
    feature_maps,
    find_pyramids,
    input_channels,
    quiet,
)
from global_kd.hooks.record import snapshot

X = torch.randn(2, 3, 8, 8)


@dataclasses.dataclass
class Data:
    maps: list


@dataclasses.dataclass(frozen=True)
class Frozen:
    maps: list


@dataclasses.dataclass(slots=True)
class Slotted:
    maps: list


class Levels:
    def __init__(self, maps):
        self.feature_maps = maps


class Nested:
    def __init__(self, tensors):
        self.tensors = tensors


class Closed:
    """No data class, and without a dictionary."""

    __slots__ = ("maps", "never")

    def __init__(self, maps):
        self.maps = maps


class MyList(list):
    pass


Named = namedtuple("Named", "maps note")


def spoil_list(x):
    x[0] = x[0] * 0
    x.append(x[0])


def spoil_object(x):
    spoil_list(x.maps)
    if not isinstance(x, Frozen | tuple):
        x.maps = []


# How a neck may hand its maps on, and how a head may overwrite what it was given.
CONTAINERS = {
    "namespace": (lambda m: SimpleNamespace(feature_maps=m), lambda x: spoil_list(x.feature_maps)),
    "list": (list, spoil_list),
    "list subclass": (MyList, spoil_list),
    "deque": (deque, spoil_list),
    "UserList": (UserList, spoil_list),
    "namespace of maps": (lambda m: SimpleNamespace(p3=m[0], p4=m[1]), lambda x: vars(x).clear()),
    "slots": (Closed, lambda x: spoil_list(x.maps)),
    "list in tuple": (lambda m: (m, 1), lambda x: spoil_list(x[0])),
    "tuple in list": (lambda m: [tuple(m)], lambda x: x.clear()),
    "named tuple": (lambda m: Named(m, "note"), spoil_object),
    "dict": (lambda m: {"a": m[0], "b": m[1]}, lambda x: x.update(a=x["a"] * 0, c=x["a"])),
    "OrderedDict": (lambda m: OrderedDict(a=m[0], b=m[1]), lambda x: x.popitem()),
    "UserDict": (lambda m: UserDict(a=m), lambda x: spoil_list(x["a"])),
    "dict of lists": (lambda m: {"a": m}, lambda x: spoil_list(x["a"])),
    "data class": (Data, spoil_object),
    "frozen data class": (Frozen, spoil_object),
    "data class with slots": (Slotted, spoil_object),
    "feature_maps": (Levels, lambda x: spoil_list(x.feature_maps)),
    "feature_maps replaced": (Levels, lambda x: setattr(x, "feature_maps", [])),
    "nested tensors": (
        lambda m: [Nested(x) for x in m],
        lambda x: setattr(x[0], "tensors", x[0].tensors * 0),
    ),
    "namespace in dict": (
        lambda m: {"a": Levels(Levels(m))},
        lambda x: spoil_list(x["a"].feature_maps.feature_maps),
    ),
}


class Neck(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 4, s, s) for s in (1, 2))
        self.wrap = wrap

    def forward(self, x):
        return self.wrap([conv(x) for conv in self.convs])


class Head(nn.Module):
    def __init__(self, spoil):
        super().__init__()
        self.spoil, self.weight = spoil, nn.Parameter(torch.ones(1))

    def forward(self, x):
        first = feature_maps(x)[0]
        self.spoil(x)
        return first.mean() * self.weight


class Model(nn.Module):
    def __init__(self, wrap=list, spoil=lambda x: None):
        super().__init__()
        self.neck, self.head = Neck(wrap), Head(spoil)

    def forward(self, x):
        return self.head(self.neck(x))


@pytest.mark.parametrize("clone", [None, True, False])
@pytest.mark.parametrize("inputs", [False, True], ids=["outputs", "inputs"])
@pytest.mark.parametrize("name", CONTAINERS)
def test_what_overwrites_containers_does_not_reach_the_record(name, inputs, clone):
    model = Model(*CONTAINERS[name])
    where = {"inputs": ["maps"]} if inputs else {}
    paths = {"maps": "head" if inputs else "neck"}
    want = [conv(X) for conv in model.neck.convs]
    with FeatureTap(model, paths, clone=clone, **where) as tap:
        for _ in range(3):
            model(X)
            read = tap.read(X)["maps"]
            maps = feature_maps(read)
            assert len(maps) == 2 and all(map(torch.equal, maps, want))
            value = read[0] if inputs else read
            assert type(value) is type(model.neck(X))
        looked = feature_maps(tap.run(X)["maps"])
        assert len(looked) == 2 and all(map(torch.equal, looked, want))


def test_a_snapshot_copies_what_is_held_twice_once_and_leaves_the_rest():
    a, config = torch.rand(1), SimpleNamespace(deep=None)
    config.deep = config  # an object that holds itself
    value = {"first": [a], "again": a, "module": nn.ReLU(), "config": config, "size": a.shape}
    value["itself"] = value
    taken = snapshot(value, clone=True)
    assert taken["first"][0] is taken["again"] and taken["again"] is not a
    assert taken["itself"] is taken
    assert taken["module"] is value["module"] and taken["size"] == a.shape
    assert taken["config"].deep is taken["config"] is not config


# --- in place ---------------------------------------------------------------------------------


def relu_(x):
    x[0].relu_()


class Conv(nn.Sequential):
    """Convolution, ReLU in place: a tap on the convolution."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("build", "path", "want"),
    [
        (Conv, "0", lambda m: m[0](X)),
        (lambda: Model(list, relu_), "neck", lambda m: m.neck.convs[0](X)),
    ],
    ids=["the next module", "inside the head"],
)
def test_a_write_in_place_does_not_reach_the_record(build, path, want, grad):
    """From the first step on, and the same as a look that stops at the tap."""
    model = build()
    with FeatureTap(model, path) as tap, torch.set_grad_enabled(grad):
        for _ in range(3):
            model(X)
            read = feature_maps(tap.read()[path])[0]
            assert torch.equal(read, want(model))
            assert torch.equal(feature_maps(tap.run(X)[path])[0], read)
            assert read.requires_grad is grad


def test_values_of_a_mapping_are_those_of_that_moment():
    """``return features.values()``: a view, which shows what the mapping holds later."""
    held = {"p3": torch.rand(1, 2, 4, 4), "p4": torch.rand(1, 2, 2, 2)}
    want = list(held.values())
    kept = snapshot(held.values())
    held["p3"] = held["p3"] * 0
    held["p5"] = held["p4"]
    assert [x is y for x, y in zip(feature_maps(kept), want, strict=True)] == [True, True]


def through_data(maps):
    maps[0].data.mul_(0)


def through_numpy(maps):
    values = maps[0].detach().numpy()
    values *= 0


@pytest.mark.parametrize("spoil", [through_data, through_numpy])
def test_a_write_that_nobody_counts_does_not_reach_the_record(spoil):
    """Past the version counter: the clone of the first forward tells, and all later ones clone."""
    model = Model(list, spoil)
    want = model.neck.convs[0](X)
    with FeatureTap(model, "neck") as tap:
        for _ in range(3):
            model(X)
            assert torch.equal(tap.read()["neck"][0], want)
            assert torch.equal(tap.run(X)["neck"][0], want)


def test_an_input_that_its_module_writes_in_place():
    model = Conv()
    with FeatureTap(model, {"x": "1"}, inputs=["x"]) as tap:
        for _ in range(2):
            model(X)
            assert torch.equal(tap.read()["x"][0], model[0](X))


def test_a_write_after_the_forward_does_not_reach_the_record():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    with FeatureTap(model, "0") as tap, torch.no_grad():
        want = model(X)
        tap.clear()
        for _ in range(2):
            model(X).zero_()
            assert torch.equal(tap.read()["0"], want)


def test_two_levels_of_one_look_are_written_between_them():
    """A run stops at the last tap; the first was written by then."""
    model = Conv()
    with FeatureTap(model, ["0", "2"]) as tap, torch.no_grad():
        for _ in range(2):
            assert torch.equal(tap.run(X)["0"], nn.Sequential.__getitem__(model, 0)(X))


def test_inference_mode_counts_no_writes_and_is_right():
    model = Conv().eval()
    with FeatureTap(model, "0") as tap, torch.inference_mode():
        for _ in range(2):
            model(X)
            assert torch.equal(tap.read()["0"], model[0](X))


def test_gradients_through_a_clone_are_those_of_the_tensor():
    model, twin = Conv(), Conv()
    twin.load_state_dict(model.state_dict())
    with FeatureTap(model, "0") as tap:
        model(X)
        tap.read()["0"].square().sum().backward()
    twin[0](X).square().sum().backward()
    assert torch.equal(model[0].weight.grad, twin[0].weight.grad)


def test_what_is_never_written_is_cloned_once_only(monkeypatch):
    """And even then the model's own tensor is given: the first step sums gradients as any other."""
    kept, clones = [], []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda x: clones.append(x) or clone(x))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    model[0].register_forward_hook(lambda module, args, output: kept.append(output))
    with FeatureTap(model, "0") as tap:
        for step in range(3):
            model(X)
            assert tap.read()["0"] is kept[step]
    assert len(clones) == 1


def test_a_write_where_there_was_none_before_is_an_error_once():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    with FeatureTap(model, "0") as tap:
        model(X)
        tap.read()
        model[1].inplace = True
        model(X)
        with pytest.raises(ValueError, match=r"tap '0': expected .*in place.*clone=True"):
            tap.read()
        model(X)
        assert torch.equal(tap.read()["0"], model[0](X))
    with FeatureTap(model, "0", clone=False) as tap:
        model(X)
        with pytest.raises(ValueError, match=r"tap '0': expected .*in place.*clone=True"):
            tap.read()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_in_one_graph_that_is_traced_once(backend):
    def head(x):
        x["a"][0].relu_()
        x["a"].clear()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Model(lambda m: {"a": [*m], "pair": (m[0], m[1])}, head)
    tap = FeatureTap(model, {"out": "neck", "in": "head"}, inputs=["in"])
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for step in range(4):
        x = X + step
        compiled(x)
        read = tap.read(x)
        want = [conv(x) for conv in model.neck.convs]
        for value in (read["out"], read["in"][0]):
            maps = feature_maps(value)
            assert len(maps) == 2  # each once, though it is held twice
            for one, other in zip(maps, want, strict=True):
                torch.testing.assert_close(one, other)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("how", ["itself", "within a function"])
def test_a_compiled_model_is_not_traced_anew_for_every_batch(how):
    """More steps than torch.compile makes programs of one piece of code, each with a new tensor."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    model = Model(lambda m: {"a": [*m]}, lambda x: None)
    called = model if how == "itself" else lambda x: model(x)
    with FeatureTap(model, "neck") as tap:
        compiled = torch.compile(called, backend=backend, fullgraph=True)
        for step in range(12):
            x = X + step
            compiled(x)
            for one, conv in zip(feature_maps(tap.read(x)), model.neck.convs, strict=True):
                torch.testing.assert_close(one, conv(x))
    assert len(graphs) <= 2


# --- which pictures ---------------------------------------------------------------------------


def test_a_record_knows_the_tensors_it_was_made_from():
    model = Model()
    other = torch.rand_like(X)
    with FeatureTap(model, "neck") as tap:
        assert tap.saw(X) is None  # nothing ran
        model(X)
        assert tap.saw(X) is True
        assert tap.saw([{"image": X}]) is True
        assert tap.saw(X.clone()) is True  # the same picture
        assert tap.saw(X[:]) is True
        assert tap.saw(other) is False
        assert tap.saw([X, other]) is False
        assert tap.saw(list(X)) is None  # another shape: it cannot be told
        assert tap.saw(X.double()) is None
        with pytest.raises(ValueError, match="images: expected what the model was given"):
            tap.read(other)


def test_a_batch_that_is_filled_anew_is_another_one():
    model, buffer = Model(), X.clone()
    with FeatureTap(model, "neck") as tap:
        model(buffer)
        buffer.copy_(torch.rand_like(X))
        assert tap.saw(buffer) is False


def test_a_model_may_normalise_its_input_in_place():
    class Normalising(Model):
        def forward(self, x):
            return super().forward(x.sub_(0.5))

    model, batch = Normalising(), X.clone()
    with FeatureTap(model, "neck") as tap:
        model(batch)
        assert tap.saw(batch) is True


def test_arguments_by_name_and_in_containers_are_seen():
    class Batched(Model):
        def forward(self, *, batch):
            return super().forward(torch.stack(batch["images"]))

    model, images = Batched(), list(X)
    with FeatureTap(model, "neck") as tap:
        model(batch={"images": images})
        assert tap.saw(images) is True
        assert tap.saw([torch.rand(3, 8, 8)]) is False


def test_two_training_forwards_before_one_reading_are_an_error():
    model = Model()
    with FeatureTap(model, "neck") as tap:
        model(X[:1])
        model(X[1:])
        with pytest.raises(ValueError, match="one training forward between two readings"):
            tap.read(X)  # of two chunks
        model(X)
        tap.read()  # and that was that
        model(torch.rand_like(X))
        model(X)
        tap.read(X)  # seen to be the last
        model(X)
        tap.clear()
        model(X)
        tap.read()
        with evaluating(model):
            model(X)
            model(X)
        model(X)
        tap.read()  # evaluations do not count
    with FeatureTap(model, "neck", accumulate=True) as tap:
        model(X[:1])
        model(X)
        assert len(feature_maps(tap.read()["neck"])[0]) == 2


def test_a_forward_that_broke_off_does_not_count():
    model = Model(list, lambda x: x[5])
    with FeatureTap(model, "neck") as tap:
        with pytest.raises(IndexError):
            model(X)
        model.head.spoil = lambda x: None
        model(X)
        assert tap.read()


# --- one model, several taps ------------------------------------------------------------------


def test_a_look_leaves_no_record_in_other_taps_of_the_model():
    model, other = Model(), torch.rand_like(X)
    student = FeatureTap(model, "neck")
    inner = FeatureTap(model.neck, "convs.0")
    teacher = FeatureTap(model, "head")
    model(X)
    teacher.run(other)
    find_pyramids(model, other)
    with quiet(model):
        model(other)
    assert torch.equal(feature_maps(student.read(X)["neck"])[0], model.neck.convs[0](X))
    inner.clear()
    with evaluating(model):
        teacher.run(other)
    for tap in (student, inner):
        with pytest.raises(ValueError, match="never fired"):
            tap.read()
    model(X)
    assert student.read() and inner.read()  # and they listen again


def test_a_look_of_its_own_does_not_count_as_a_training_forward():
    model = Model()
    with FeatureTap(model, "neck") as tap:
        tap.run(X)
        tap.run(X)
        model(X)
        tap.read()
        model(X)
        with evaluating(model):
            tap.run(torch.rand_like(X))
        assert torch.equal(feature_maps(tap.read(X)["neck"])[0], model.neck.convs[0](X))


def hooks_in(model):
    names = [n for n in vars(nn.Module()) if "hook" in n]
    return [(m, n) for m in model.modules() for n in names if getattr(m, n)]


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "old pickle": lambda m: pickle.loads(pickle.dumps(m, protocol=2)),
    "python pickle": lambda m: pickle._loads(pickle._dumps(m)),
    "deepcopy of a copy": lambda m: copy.deepcopy(copy.deepcopy(m)),
    "averaged": lambda m: torch.optim.swa_utils.AveragedModel(m).module,
}


def seen_by_others(module, args, output):
    """A hook of somebody else; at module level, so that it can be pickled."""


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("way", COPIES)
def test_copies_hold_no_hook_at_all(way):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    foreign = model[0].register_forward_hook(seen_by_others)
    with FeatureTap(model, {"a": "0", "b": "2"}, inputs=["b"]):
        model(X)
        twin = COPIES[way](model)
    assert [(type(m), n) for m, n in hooks_in(twin)] == [(nn.Conv2d, "_forward_hooks")]
    assert list(twin[0]._forward_hooks.values()) == [seen_by_others]
    foreign.remove()
    assert not hooks_in(model)
    dictionaries = [x for m in model.modules() for x in vars(m).values() if hasattr(x, "__dict__")]
    assert len(dictionaries) > 9 and not any(vars(x) for x in dictionaries if isinstance(x, dict))
    twin[0]._forward_hooks.clear()
    assert torch.equal(torch.jit.script(twin)(X), model(X))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripting_a_model_with_hooks_says_what_to_script_instead():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with FeatureTap(model, "0"):
        with pytest.raises(AttributeError, match=r"jit.script .* copy.deepcopy\(.*kd.detach\(\)"):
            torch.jit.script(model)
        assert torch.equal(torch.jit.script(copy.deepcopy(model))(X), model(X))
    assert torch.equal(torch.jit.script(model)(X), model(X))


def test_the_handles_of_others_still_work():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    calls = []
    before = model[0].register_forward_hook(lambda *_: calls.append("before"))
    tap = FeatureTap(model, "0")
    after = model[0].register_forward_hook(lambda *_: calls.append("after"))
    model(X)
    before.remove()
    tap.remove()
    model(X)
    assert calls == ["before", "after", "after"]
    after.remove()
    assert not hooks_in(model)


def test_a_tap_that_nobody_holds_takes_its_hooks_off():
    model = Model()
    tap = FeatureTap(model, "neck")
    model(X)
    kept = weakref.ref(feature_maps(tap._recorder.records[True]["neck"][0].value)[0])
    del tap
    gc.collect()
    assert not hooks_in(model)
    assert kept() is None


def test_a_dropped_tap_does_not_keep_its_model():
    model = Model()
    tap, reference = FeatureTap(model, "neck"), weakref.ref(model)
    del tap, model
    gc.collect()
    assert reference() is None


# --- channels of the image --------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4, 13])
def test_the_model_tells_how_many_channels_it_takes(channels):
    assert input_channels(nn.Sequential(nn.BatchNorm2d(9), nn.Conv2d(channels, 8, 3))) == channels
    assert input_channels(nn.DataParallel(nn.Conv2d(channels, 8, 3))) == channels

    class Focus(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4 * channels, 8, 1)

    assert input_channels(Focus()) == channels
    unshuffled = nn.Sequential(nn.PixelUnshuffle(3), nn.Conv2d(9 * channels, 8, 1))
    assert input_channels(unshuffled) == channels


def test_configurations_tell_it_first():
    model = nn.Sequential(nn.Conv2d(16, 8, 3))
    assert input_channels(nn.Linear(4, 4)) == 3
    model.yaml = {"ch": 5}
    assert input_channels(model) == 5
    model.config = SimpleNamespace(num_channels=2)
    assert input_channels(model) == 2
    pixels = nn.Sequential(nn.Conv2d(16, 8, 3))
    pixels.register_buffer("pixel_mean", torch.zeros(4, 1, 1))
    assert input_channels(pixels) == 4


def test_what_a_model_calls_its_classes():
    model = nn.Linear(2, 2)
    assert class_names(model) is None
    model.names = {1: "dog", 0: "cat"}
    assert class_names(nn.DataParallel(model)) == ("cat", "dog")
    model.config = SimpleNamespace(id2label={0: "car"})
    assert class_names(model) == ("car",)
