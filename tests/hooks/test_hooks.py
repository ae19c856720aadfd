"""Hooks: what they read, what they refuse, and that they leave nothing behind."""

import copy
import dataclasses
import gc
import io
import pickle
import weakref
from collections import deque
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

from global_kd import FeatureTap, Pyramid, find_pyramids
from global_kd.hooks import (
    evaluating,
    feature_maps,
    level_shapes,
    pyramid_maps,
    tokens_to_maps,
)


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
    assert torch.equal(read["image"][0], IMAGE)
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
        model(IMAGE)
        model(IMAGE * 2)
        assert torch.equal(tap.read(IMAGE * 2)["stem"], model.stem(IMAGE * 2))


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


def test_a_silent_tap_tells_a_module_that_was_exchanged():
    model = Detector()
    with FeatureTap(model, "stem") as tap:
        copy.deepcopy(model)(IMAGE)
        with pytest.raises(ValueError, match="this Detector itself first .*a copy has no taps"):
            tap.read()
        model.stem = copy.deepcopy(model.stem)
        model(IMAGE)
        with pytest.raises(ValueError, match="Detector has had another module there since"):
            tap.read()
        del model.stem
        with pytest.raises(ValueError, match="Detector has had another module there since"):
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
        tap.clear()
        model(torch.rand(2, 3, 320, 480))
        assert len(pickle.dumps(model)) == size
        # A whole pickled student, as Ultralytics saves it, loads where this package is not.
        assert b"global_kd" not in pickle.dumps(model.stem)
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


def test_a_model_checkpointed_as_a_whole_is_not_recorded_again():
    model = Detector()
    with FeatureTap(model, "stem") as tap:
        loss = checkpoint(model, IMAGE, use_reentrant=False).sum()
        assert tap.read()["stem"].requires_grad
        loss.backward()
        with pytest.raises(ValueError, match="never fired"):
            tap.read()


def test_train_and_eval_mode_are_recorded_apart():
    model = Detector()
    with FeatureTap(model, "stem") as tap:
        model.train()(IMAGE)
        model.eval()(torch.zeros_like(IMAGE))
        model.train()
        torch.testing.assert_close(tap.read()["stem"], model.stem(IMAGE))
        with pytest.raises(ValueError, match="never fired"):
            tap.read()  # both are forgotten
        model.eval()(IMAGE)
        model.train()  # nothing was recorded in this mode: the other's
        torch.testing.assert_close(tap.read()["stem"], model.stem(IMAGE))


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


class Stages(nn.Module):
    """A backbone: three levels of rising width."""

    def __init__(self, channels=(4, 6, 8)):
        super().__init__()
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(3, channels[0], 4, stride=4),
                nn.Conv2d(channels[0], channels[1], 3, stride=2, padding=1),
                nn.Conv2d(channels[1], channels[2], 3, stride=2, padding=1),
            ]
        )

    def forward(self, x):
        maps = []
        for conv in self.convs:
            x = conv(x)
            maps.append(x)
        return maps


class TopDown(nn.Module):
    """A neck, maps of equal width from coarse to fine."""

    def __init__(self, channels=(4, 6, 8), width=5):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)

    def forward(self, maps):
        levels = [lateral(x) for lateral, x in zip(self.lateral, maps)]
        for i in (1, 0):
            levels[i] = levels[i] + nn.functional.interpolate(levels[i + 1], scale_factor=2)
        return levels


class RawHead(nn.Module):
    """Predictions, a list of maps too, as many and of equal width."""

    def __init__(self, channels=(5, 5, 5)):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, 9, 1) for c in channels)

    def forward(self, maps):
        return [conv(x) for conv, x in zip(self.convs, maps)]


class Decode(nn.Module):
    """One tensor (B, N, 9) of all predictions."""

    def forward(self, maps):
        return torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)


STRIDES = (4.0, 8.0, 16.0)


@pytest.mark.parametrize(
    "tail", [[RawHead(), Decode()], [RawHead()]], ids=["decoded", "raw predictions"]
)
def test_the_neck_comes_before_backbone_and_predictions(tail):
    model = nn.Sequential(Stages(), TopDown(), *tail)
    neck, *others = find_pyramids(model, IMAGE)
    assert neck == Pyramid("1", STRIDES, (5, 5, 5))
    assert neck.confidence == 1.0
    assert all(p.confidence < neck.confidence for p in others)
    assert {p.path: p.confidence for p in others}["0"] == 0.38  # half of 0.75: a stage on the way


def test_a_backbone_with_its_neck_alone_gives_the_neck():
    first, second = find_pyramids(nn.Sequential(Stages(), TopDown()), IMAGE)
    assert (first.path, second.path) == ("1", "0")
    assert first.confidence == second.confidence == 0.75  # it might have been a head: a tie


def test_maps_that_only_a_module_takes_in_are_found_there():
    class Graph(nn.Module):  # as Ultralytics: no module puts out the list, the head replaces it
        def __init__(self):
            super().__init__()
            self.convs, self.detect = Stages().convs, Detect()

        def forward(self, x):
            maps = [x := conv(x) for conv in self.convs]
            return self.detect(maps)

    class Detect(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = RawHead((4, 6, 8))

        def forward(self, maps):
            for i, conv in enumerate(self.head.convs):
                maps[i] = conv(maps[i])  # the caller's list
            return Decode()(maps), maps

    found = find_pyramids(Graph(), IMAGE)
    assert found[0] == Pyramid("detect", STRIDES, (4, 6, 8), "input")
    assert found[1:] == [Pyramid("detect", STRIDES, (9, 9, 9))]
    assert found[0].confidence > found[1].confidence


class Encoder(nn.Module):
    """Two layers over the cells of all levels."""

    def __init__(self, wrap=False):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.wrap = wrap

    def forward(self, tokens):
        for layer in self.layers:
            tokens = layer(tokens)
        return {"last_hidden_state": tokens, "attentions": None} if self.wrap else tokens


class SetDetector(nn.Module):
    """In the way of Deformable DETR: projections, encoder, decoder with queries."""

    def __init__(self, wrap=False):
        super().__init__()
        self.backbone = Stages()
        self.project = nn.ModuleList(nn.Conv2d(c, 5, 1) for c in (4, 6, 8))
        self.encoder = Encoder(wrap)
        self.decoder = nn.MultiheadAttention(5, 1, batch_first=True)
        self.score = nn.Linear(5, 9)

    def forward(self, x):
        maps = [project(m) for project, m in zip(self.project, self.backbone(x))]
        tokens = self.encoder(torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1))
        if self.encoder.wrap:
            tokens = tokens["last_hidden_state"]
        self.score(tokens)  # as long as the maps, and no place to distil
        queries = tokens.new_zeros(len(tokens), 7, 5)
        return self.score(self.decoder(queries, tokens, tokens)[0])


@pytest.mark.parametrize("wrap", [False, True])
def test_tokens_of_an_encoder_are_found_and_read(wrap):
    model = SetDetector(wrap).eval()
    first, second = find_pyramids(model, IMAGE)
    assert first == Pyramid("encoder", STRIDES, (5, 5, 5), "tokens")
    assert first.confidence == 1.0
    assert second.path == "backbone"
    with FeatureTap(model, "encoder") as tap:
        recorded = tap.run(IMAGE)["encoder"]
    maps = pyramid_maps(first, recorded, IMAGE.shape[-2:])
    assert [tuple(x.shape) for x in maps] == [(2, 5, 8, 12), (2, 5, 4, 6), (2, 5, 2, 3)]


def test_tokens_to_maps_undoes_flattening():
    maps = [torch.rand(2, 3, h, w) for h, w in ((4, 6), (2, 3), (1, 2))]
    tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)
    shapes = [(4, 6), (2, 3), (1, 2)]
    assert all(map(torch.equal, tokens_to_maps(tokens, shapes), maps))
    with pytest.raises(ValueError, match=r"expected \(B, 30, C\).*but got \(2, 32, 3\)"):
        tokens_to_maps(tokens, shapes[:2])
    with pytest.raises(ValueError, match=r"but got \(2, 3, 4, 6\)"):
        tokens_to_maps(maps[0], shapes[:1])


def test_level_shapes_round_up():
    assert level_shapes((100, 150), (8.0, 64.0)) == [(13, 19), (2, 3)]


def test_pyramid_maps_reads_every_source_finest_first():
    maps = [torch.rand(1, 3, s, s) for s in (2, 4)]
    for source, recorded in (("output", {"a": maps}), ("input", (torch.zeros(3), None, maps))):
        read = pyramid_maps(Pyramid("x", (8.0, 16.0), (3, 3), source), recorded, (32, 32))
        assert [x.shape[-1] for x in read] == [4, 2]
    for source, recorded in (("output", maps[0]), ("input", ()), ("tokens", maps)):
        with pytest.raises(ValueError, match=f"in the {source} of 'x'"):
            pyramid_maps(Pyramid("x", (8.0, 16.0), (3, 3), source), recorded, (32, 32))


def test_feature_maps_sees_through_nesting_and_gives_each_map_once():
    class Nested:  # as DETR's NestedTensor
        def __init__(self, tensors):
            self.tensors, self.mask = tensors, tensors[:, 0] > 0

    a, b, mask = torch.rand(1, 2, 4, 4), torch.rand(1, 2, 2, 2), torch.ones(1, 4, 4)
    assert list(map(id, feature_maps([(a, mask), (b, mask)]))) == [id(a), id(b)]
    assert list(map(id, feature_maps({"levels": [Nested(a), b], "last": b}))) == [id(a), id(b)]
    assert list(map(id, feature_maps(deque([a, b])))) == [id(a), id(b)]
    assert list(map(id, feature_maps(SimpleNamespace(p3=a, p4=[b], n=3)))) == [id(a), id(b)]
    assert feature_maps([Output, nn.ReLU(), None, "text"]) == []  # a class is no data


@pytest.mark.parametrize("size", [(32, 48), (100, 76), (40, 40)])
def test_one_scale_is_no_pyramid(size):
    class Plain(nn.Module):  # a plain DETR: one map, flattened
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(*Stages().convs)
            self.decoder = nn.MultiheadAttention(8, 1, batch_first=True)

        def forward(self, x):
            tokens = self.backbone(x).flatten(2).transpose(1, 2)
            return self.decoder(tokens.new_zeros(len(tokens), 7, 8), tokens, tokens)[0]

    assert find_pyramids(Plain(), torch.rand(1, 3, *size)) == []


@pytest.mark.parametrize("size", [(8, 32), (8, 8)])  # only the width, nothing is left to halve
def test_levels_of_a_single_cell_keep_their_strides(size):
    model = nn.Sequential(Stages((5, 5, 5)), RawHead(), Decode())
    (pyramid,) = [p for p in find_pyramids(model, torch.rand(1, 3, *size)) if p.path == "0"]
    assert pyramid.strides == STRIDES


def test_a_stem_that_keeps_three_channels_is_no_image():
    model = nn.Sequential(nn.Conv2d(3, 3, 2, stride=2), Stages(), RawHead((4, 6, 8)), Decode())
    assert find_pyramids(model, IMAGE)[0].strides == (8.0, 16.0, 32.0)


def test_a_whole_detector_that_also_puts_out_its_maps_is_not_their_place():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Sequential(Stages(), TopDown()), RawHead()

        def forward(self, x):
            maps = self.body(x)
            return {"features": maps, "scores": Decode()(self.head(maps))}

    first = find_pyramids(nn.ModuleDict({"net": Whole()})["net"], IMAGE)[0]
    inside = find_pyramids(nn.Sequential(Whole(), nn.Identity()), IMAGE)[0]
    assert (first.path, inside.path) == ("body", "0.body")  # the last before the head takes them


def test_a_part_of_a_pyramid_is_not_listed():
    class Crops(nn.Module):
        def forward(self, maps):
            return maps[0].mean()

    class TwoStage(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Sequential(Stages(), TopDown()), RawHead()
            self.crops = Crops()

        def forward(self, x):
            maps = self.body(x)
            return Decode()(self.head(maps)), self.crops(maps[:2])

    assert "crops" not in {p.path for p in find_pyramids(TwoStage(), IMAGE)}


@pytest.mark.parametrize("listed", [False, True])
def test_of_two_pyramids_taken_in_together_the_first_is_read(listed):
    class Fuse(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv2d(5, 9, 1)

        def forward(self, left, right):
            return Decode()([self.head(a + b) for a, b in zip(left, right)])

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.fuse = Stages((5,) * 3), Stages((5,) * 3), Fuse()

        def forward(self, x):
            y = x
            left = [y := conv(y) for conv in self.left.convs]
            if listed:
                return self.fuse(left, self.right(x))
            return self.fuse(left, [x := conv(x) for conv in self.right.convs])

    found = {p.path: p for p in find_pyramids(Both(), IMAGE) if p.path in ("fuse", "right")}
    assert found["fuse"].source == "input"
    assert set(found) == ({"fuse", "right"} if listed else {"fuse"})
    assert all(p.confidence == (0.5 if listed else 1.0) for p in found.values())


def test_an_image_packed_into_channels_counts_with_its_own_pixels():
    class Focus(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = Stages((12, 6, 8))
            self.stages.convs[0] = nn.Conv2d(12, 12, 1)

        def forward(self, x):
            return self.stages(nn.functional.pixel_unshuffle(x, 2))

    (pyramid,) = find_pyramids(nn.Sequential(Focus(), RawHead((12, 6, 8)), Decode()), IMAGE)[:1]
    assert pyramid.strides == (2.0, 4.0, 8.0)


def test_an_image_resized_inside_counts_as_resized():
    class Resizing(nn.Module):
        def __init__(self):
            super().__init__()
            self.resize, self.neck = nn.Upsample(scale_factor=2), nn.Sequential(Stages())

        def forward(self, images):  # a list of (C, H, W), as torchvision takes
            return self.neck(self.resize(torch.stack(images)))

    (pyramid,) = find_pyramids(Resizing(), [IMAGE[0]])
    assert pyramid.strides == STRIDES


def test_two_pyramids_that_the_heads_share_are_both_doubted():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = Stages((5, 5, 5)), Stages((5, 5, 5))
            self.heads = nn.ModuleList([RawHead(), RawHead()])

        def forward(self, x):
            left, right = self.left(x), self.right(x)
            return sum(Decode()(head(maps)) for head, maps in zip(self.heads, (left, right)))

    found = {p.path: p for p in find_pyramids(Twins(), IMAGE)}
    assert found["left"].confidence == found["right"].confidence == 0.5
    assert "left (output) goes on after it" in found["right"].reason


def test_levels_that_go_nowhere_are_doubted():
    (pyramid,) = find_pyramids(Detector(), IMAGE)  # its head uses one level of three
    assert pyramid.confidence == 0.42
    assert pyramid.reason == "3 levels, unequal channels, 33% of them used by head"


def test_a_module_that_runs_twice_is_left_out():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages, self.neck = Stages(), TopDown()
            self.head = nn.Sequential(RawHead(), Decode())

        def forward(self, x):
            return self.head(self.neck(self.stages(x))), self.stages(x.flip(-1))

    found = find_pyramids(Twice(), IMAGE)
    places = [(p.path, p.source) for p in found]
    assert places == [("neck", "output"), ("head.0", "output"), ("neck", "input")]
    for pyramid in found:  # what is listed can be tapped
        with FeatureTap(Twice(), pyramid.path) as tap:
            tap.run(IMAGE)


def test_find_pyramids_keeps_the_random_state_and_no_activation():
    alive, most = weakref.WeakSet(), 0

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.necks = nn.ModuleList(Neck() for _ in range(6))

        def forward(self, x):
            nonlocal most
            for neck in self.necks:
                maps = neck(torch.rand(1, 4, 64, 64))
                alive.update(maps)
                most = max(most, len(alive))
            return maps[0]

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Noisy())
    random = torch.get_rng_state()
    assert len(find_pyramids(model, IMAGE)) == 6
    assert torch.equal(random, torch.get_rng_state())
    assert most == 3  # the maps of one neck at a time
    assert not alive


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_parts_are_passed_over():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(map(torch.jit.script, Stages().convs))
            self.neck, self.head = TopDown(), RawHead()

        def forward(self, x):
            return Decode()(self.head(self.neck([x := conv(x) for conv in self.convs])))

    assert find_pyramids(Graph(), IMAGE)[0] == Pyramid("neck", STRIDES, (5, 5, 5))


def test_an_error_in_the_forward_leaves_no_hooks():
    model = nn.Sequential(Stages(), nn.Linear(3, 3)).train()
    with pytest.raises(TypeError):
        find_pyramids(model, IMAGE)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(m.training for m in model.modules())


TORCHVISION = [  # builder, options, strides, channels of the pyramid that the heads use
    ("fasterrcnn_resnet50_fpn", {}, (4, 8, 16, 32, 64), (256,) * 5),
    ("fasterrcnn_mobilenet_v3_large_320_fpn", {}, (32, 32, 64), (256,) * 3),  # one size twice
    ("maskrcnn_resnet50_fpn", {}, (4, 8, 16, 32, 64), (256,) * 5),
    ("retinanet_resnet50_fpn", {}, (8, 16, 32, 64, 128), (256,) * 5),
    ("fcos_resnet50_fpn", {}, (8, 16, 32, 64, 128), (256,) * 5),
    (  # sizes 38, 19, 10, 5, 3, 1: the last is no half, rounded up, of the one before
        "ssd300_vgg16",
        {},
        (8, 16, 32, 64, 128, 300),
        (512, 1024, 512, 256, 256, 256),
    ),
    (
        "ssdlite320_mobilenet_v3_large",
        {},
        (16, 32, 64, 128, 256, 512),
        (672, 480, 512, 256, 256, 128),
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, options, strides, channels", TORCHVISION)
def test_torchvision_detectors_give_what_their_heads_use(name, options, strides, channels):
    if "fpn" in name:
        options = options | {"min_size": 160, "max_size": 192}
    build = getattr(torchvision.models.detection, name)
    model = build(weights=None, weights_backbone=None, **options)
    model.train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    first, *others = find_pyramids(model, [torch.rand(3, 100, 120)])
    assert first == Pyramid("backbone", strides, channels)
    assert first.confidence == (1.0 if "fpn" in name else 0.75)
    assert all(p.confidence <= first.confidence / 2 for p in others)
    assert {p.path for p in others} <= {"backbone.body"}
    assert model.training
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_inputs_are_recorded_before_their_module_overwrites_them():
    """As Ultralytics' heads do: the list that came in leaves holding predictions."""

    class Head(torch.nn.Module):
        def forward(self, maps):
            for i, x in enumerate(maps):
                maps[i] = x * 0
            return maps

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = Head()

        def forward(self, x):
            return self.head([x, x + 1])

    model, x = Model(), torch.ones(1, 1, 2, 2)
    with FeatureTap(model, "head", inputs=["head"]) as tap:
        model(x)
        assert [y.mean().item() for y in tap.read()["head"][0]] == [1, 2]
        assert [y.mean().item() for y in tap.run(x)["head"][0]] == [1, 2]
