"""What torchvision's heads tell: held against the models' own forward passes."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import mobilenet_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers

from global_kd import Distiller, Targets
from global_kd.detectors import View, detector_of
from global_kd.detectors.protocol import Sampled
from global_kd.hooks import FeatureTap, evaluating, infer_strides
from global_kd.losses import SoftLabels
from global_kd.step import Grid, pair_dense, shared_locations

from .detectors import KINDS, NUM_CLASSES, Backbone, detector, scenes

DENSE = ("retinanet", "fcos", "ssd")
FACTS = frozenset({"dense", "boxes", "priors", "assigned", "positives"})


def facts_of(kind):
    return FACTS | {"regions"} if kind == "faster_rcnn" else FACTS


def trembling(kind, *args, **options):
    """A detector whose heads are far from their uniform initial state."""
    torch.manual_seed(0)
    model = detector(kind, *args, **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith("backbone"):
                p += 0.1 * torch.randn_like(p)
    return model


def train(model, facts, batch=None):
    """One training forward under the taps of these facts: its reader, and what it saw."""
    reader = detector_of(model)
    tap = FeatureTap(
        model, {**reader.taps, **reader.taps_for(facts)}, inputs=_inputs(reader, facts)
    )
    images, targets = batch or scenes()
    model.train()
    with tap:
        torch.manual_seed(1)  # of the samplers
        losses = model(images, targets)
        return reader, reader.read(tap.read(), images, targets, facts), losses


def _inputs(reader, facts):
    names = {**reader.taps, **reader.taps_for(facts)}
    return [name for name in reader.inputs if name in names]


def example_look(model, seed=2, size=(64, 96)):
    g = torch.Generator().manual_seed(seed)
    reader = detector_of(model)
    size = (64, 96) if reader.kind.endswith("ssd") else size
    view = View(torch.randn(2, 3, *size, generator=g), [size, (size[0] - 10, size[1] - 20)])
    return reader, reader.look(view)


def own_outputs(model, maps):
    """Logits and codes of boxes of the model's own dense head."""
    if hasattr(model, "rpn"):
        logits, codes = concat_box_prediction_layers(*model.rpn.head(list(maps)))
        return logits.view(len(maps[0]), -1, 1), codes.view(len(maps[0]), -1, 4)
    found = model.head(list(maps))
    return found["cls_logits"], found["bbox_regression"]


def own_anchors(model, look):
    generator = model.rpn.anchor_generator if hasattr(model, "rpn") else model.anchor_generator
    sizes = [look.view.size] * len(look.view.images)
    return generator(ImageList(look.view.images, sizes), list(look.maps))


# --- dense ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_dense_is_the_models_own_head_with_its_own_anchors(kind):
    model = trembling(kind).eval()
    reader, look = example_look(model)
    dense = reader.dense(look, frozenset({"boxes", "priors"}))
    logits, codes = own_outputs(model, look.maps)
    anchors = own_anchors(model, look)
    assert torch.equal(dense.logits, logits)
    assert torch.equal(dense.priors, anchors[0])
    for boxes, code, own in zip(dense.boxes, codes, anchors, strict=True):
        if kind == "faster_rcnn":
            expected = model.rpn.box_coder.decode_single(code, own)
        elif kind == "fcos":
            expected = model.box_coder.decode(code, own)
        else:
            expected = model.box_coder.decode_single(code, own)
        torch.testing.assert_close(boxes, expected, rtol=0, atol=0)
    sizes = [(x.shape[2], x.shape[3]) for x in look.maps]
    assert tuple(g.stride for g in dense.grids) == infer_strides(look.view.size, sizes)
    assert [(g.height, g.width) for g in dense.grids] == sizes
    assert dense.activation == ("softmax" if kind == "ssd" else "sigmoid")
    assert dense.background == (0 if kind == "ssd" else None)
    bare = reader.dense(look)
    assert bare.boxes is None and bare.priors is None and bare.bins is None


@pytest.mark.parametrize("kind", KINDS)
def test_post_processing_starts_from_these_boxes(kind, monkeypatch):
    """What a detector decodes in a forward pass in eval mode is among ours, bit for bit."""
    model = trembling(kind, **({} if kind == "faster_rcnn" else {"score_thresh": 0.0})).eval()
    reader, look = example_look(model)
    ours = reader.dense(look, frozenset({"boxes"})).boxes.flatten(0, 1)
    coder = model.rpn.box_coder if kind == "faster_rcnn" else model.box_coder
    name = "decode" if kind in ("faster_rcnn", "fcos") else "decode_single"
    decode, decoded = getattr(coder, name), []

    def spy(codes, anchors):
        decoded.append(decode(codes, anchors))
        return decoded[-1]

    monkeypatch.setattr(coder, name, spy)
    assert len(reader.detections(look.view)) == 2
    theirs = torch.cat([x.reshape(-1, 4) for x in decoded])
    assert len(theirs) > 100
    nearest = torch.cdist(theirs.double(), ours.double(), p=torch.inf).amin(dim=1)
    assert nearest.max() < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_the_grid_is_the_prior_of_that_cell(kind):
    """Rows run over cells row by row, the anchors of a cell side by side: centres tell."""
    model = trembling(kind)
    reader, look = example_look(model)
    dense = reader.dense(look, frozenset({"priors"}))
    centres = (dense.priors[:, :2] + dense.priors[:, 2:]) / 2
    for grid, at in zip(dense.grids, centres.split([g.rows for g in dense.grids]), strict=True):
        at = at.view(grid.height, grid.width, grid.anchors, 2)
        steps = torch.stack(
            torch.meshgrid(torch.arange(grid.height), torch.arange(grid.width), indexing="ij")
        ).flip(0)
        expected = steps.permute(1, 2, 0)[:, :, None] * grid.stride + at[0, 0, 0]
        torch.testing.assert_close(at, expected.expand_as(at), rtol=0, atol=1e-3)
    if kind == "fcos":
        width = dense.priors[:, 2] - dense.priors[:, 0]
        cells = [torch.full((g.rows,), 2 * g.stride) for g in dense.grids]  # as this model has them
        assert torch.equal(width, torch.cat(cells))


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_tapped_is_what_the_head_says_once_more(kind):
    model = trembling(kind)
    reader, seen, losses = train(model, facts_of(kind))
    inner = frozenset({"boxes", "priors"})
    tapped = reader.dense(seen.look, inner)
    calls = []
    hooks = [
        m.register_forward_hook(lambda *_: calls.append(1))
        for name, m in model.named_modules()
        if name.endswith(("classification_head", "regression_head", "rpn.head", "box_predictor"))
    ]
    again = reader.dense(seen.look, inner)
    assert not calls  # nothing ran
    for hook in hooks:
        hook.remove()
    untapped = copy.copy(seen.look)
    object.__setattr__(untapped, "tapped", None)
    anew = reader.dense(untapped, inner)
    for name in ("logits", "boxes", "priors"):
        assert torch.equal(getattr(again, name), getattr(tapped, name))
        torch.testing.assert_close(getattr(anew, name), getattr(tapped, name), rtol=1e-5, atol=1e-5)
    assert anew.grids == tapped.grids
    # The gradient of what was tapped reaches head and backbone, beside the detector's own.
    (tapped.logits.square().mean() + tapped.boxes.square().mean() + sum(losses.values())).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "conv" in n)
    assert model.backbone.stem.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_taps_are_only_what_the_facts_need(kind):
    reader = detector_of(detector(kind))
    first = "rpn.head" if kind == "faster_rcnn" else "head.classification_head"
    assert reader.taps_for(frozenset()) == {}
    assert reader.taps_for(frozenset({"images", "teacher_dense"})) == {}
    assert set(reader.taps_for(frozenset({"dense"})).values()) == {first}
    anchors = "rpn.anchor_generator" if kind == "faster_rcnn" else "anchor_generator"
    assert set(reader.taps_for(frozenset({"assigned"})).values()) == {anchors}
    boxes = {first, anchors} | (set() if kind == "faster_rcnn" else {"head.regression_head"})
    assert set(reader.taps_for(frozenset({"dense", "boxes"})).values()) == boxes
    assert ("regions" in reader.gives) == (kind == "faster_rcnn")
    assert FACTS | {"images", "teacher_head"} <= reader.gives
    assert reader.family == ("two-stage" if kind == "faster_rcnn" else "one-stage")


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_on_other_maps_gives_them_gradients(kind):
    model = trembling(kind).eval()
    reader, look = example_look(model)
    inner = frozenset({"boxes"})
    same = reader.head(list(look.maps), look, inner)
    dense = reader.dense(look, inner)
    assert torch.equal(same.logits, dense.logits) and torch.equal(same.boxes, dense.boxes)
    maps = [x.detach().clone().requires_grad_() for x in look.maps]
    before = [x.detach().clone() for x in maps]
    other = reader.head(maps, look, inner)
    (other.logits.square().sum() + other.boxes.square().sum()).backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in maps)
    # No operation in place reached the maps.
    assert all(torch.equal(x, y) for x, y in zip(maps, before, strict=True))


# --- assigned -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_assigned_is_what_the_models_own_loss_trains(kind):
    model, seen_by_loss = trembling(kind), []
    if kind == "faster_rcnn":
        compute = model.rpn.assign_targets_to_anchors

        def assign(anchors, targets):
            labels, boxes = compute(anchors, targets)
            seen_by_loss.append((labels, boxes))
            return labels, boxes

        model.rpn.assign_targets_to_anchors = assign
    elif kind == "ssd":
        compute_loss = model.compute_loss

        def compute(targets, outputs, anchors, matched):
            seen_by_loss.append(matched)
            return compute_loss(targets, outputs, anchors, matched)

        model.compute_loss = compute
    else:
        compute_loss = model.head.compute_loss

        def compute(targets, outputs, anchors, matched):
            seen_by_loss.append(matched)
            return compute_loss(targets, outputs, anchors, matched)

        model.head.compute_loss = compute
    reader, seen, _ = train(model, facts_of(kind))
    truth, assigned = seen.truth, seen.assigned
    assert assigned.dtype == torch.int64
    assert assigned.shape == reader.dense(seen.look).logits.shape[:2]
    if kind == "faster_rcnn":
        for row, labels, boxes in zip(assigned, *seen_by_loss[0], strict=True):
            assert torch.equal(row >= 0, labels == 1)
            assert torch.equal(row == -1, labels == 0)
            assert torch.equal(row == -2, labels == -1)
            assert torch.equal(truth.boxes[row[row >= 0]], boxes[labels == 1])
        assert (assigned == -2).any()  # between the thresholds
    else:
        for i, (row, matched) in enumerate(zip(assigned, seen_by_loss[0], strict=True)):
            own = truth.boxes[truth.image_index == i]
            assert torch.equal(row < 0, matched < 0)
            assert torch.equal(row[row < 0], matched[matched < 0])
            assert torch.equal(truth.boxes[row[row >= 0]], own[matched[matched >= 0]])
    # Every index belongs to the image of its row; the image without boxes is background.
    image = torch.arange(len(assigned))[:, None].expand_as(assigned)
    assert torch.equal(truth.image_index[assigned[assigned >= 0]], image[assigned >= 0])
    assert (assigned[-1] == -1).all()
    assert len(truth.boxes[assigned[assigned >= 0]].unique(dim=0)) > 1
    # Not asked for, not given.
    assert train(model, frozenset({"dense"}))[1].assigned is None


# --- pairs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_as_teacher_says_the_same_at_every_location(kind):
    student = trembling(kind)
    teacher = copy.deepcopy(student).eval()
    reader, seen, _ = train(student, facts_of(kind))
    theirs = detector_of(teacher)
    inner = frozenset({"boxes"})
    look = theirs.look(seen.look.view)
    mine, other, rows = pair_dense(reader.dense(seen.look, inner), theirs.dense(look, inner))
    assert rows is None
    torch.testing.assert_close(mine.logits, other.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.boxes, other.boxes, rtol=1e-5, atol=1e-3)
    soft, rows = theirs.soft_labels(look, seen.sampled)
    own = seen.sampled.logits if rows is None else seen.sampled.logits[rows]
    assert len(own) > 0
    torch.testing.assert_close(soft, own, rtol=1e-5, atol=1e-5)


def mobile_retinanet():
    """Four levels; at this size two of them have one grid."""
    torch.manual_seed(0)
    backbone = mobilenet_backbone(
        backbone_name="mobilenet_v3_large", weights=None, fpn=True, norm_layer=nn.BatchNorm2d,
        trainable_layers=6, returned_layers=[3, 4, 5],
    )  # fmt: skip
    anchors = AnchorGenerator(((16, 24),) * 4, ((1.0,),) * 4)
    model = RetinaNet(backbone, NUM_CLASSES, anchor_generator=anchors, min_size=64, max_size=96)
    with torch.no_grad():
        for p in model.head.parameters():
            p += 0.02 * torch.randn_like(p)
    return model


def test_levels_of_one_grid_are_not_mistaken_for_each_other():
    student = mobile_retinanet()
    teacher = copy.deepcopy(student)
    for m in [*student.modules(), *teacher.modules()]:
        if isinstance(m, nn.BatchNorm2d):  # both modes compute the same
            m.momentum, m.track_running_stats = 0.0, False
            m.running_mean = m.running_var = None
    images, targets = scenes()
    targets[0] = {"boxes": torch.tensor([[5.0, 5, 45, 45]]), "labels": torch.tensor([1])}
    reader, seen, _ = train(student, FACTS, (images, targets))
    grids = reader.dense(seen.look).grids
    assert len({(g.height, g.width) for g in grids}) < len(grids)
    assert (seen.assigned >= 0).any()
    theirs = detector_of(teacher)
    look = theirs.look(seen.look.view)
    soft, rows = theirs.soft_labels(look, seen.sampled)
    assert rows is None or len(rows) == len(seen.sampled.logits)
    assert len(soft) > 0
    levels = torch.cat([torch.full((g.rows,), i) for i, g in enumerate(grids)])
    on_twins = [i for i, g in enumerate(grids)
                if sum((h.height, h.width) == (g.height, g.width) for h in grids) > 1]  # fmt: skip
    trained = levels[seen.sampled.raw[1]]
    assert set(trained.tolist()) & set(on_twins)
    torch.testing.assert_close(soft, seen.sampled.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (20, 31)])
def test_levels_keep_their_strides_on_images_of_a_single_cell(size):
    """Strides 4 to 32 and 32 again: of 32 pixels the last two have one cell, as 64 would have."""
    student = detector("retinanet", min_size=32, max_size=32)
    student.backbone.down.append(nn.Conv2d(8, 8, 3, stride=2, padding=1))
    student.backbone.down.append(nn.Conv2d(8, 8, 3, padding=1))
    student.anchor_generator = AnchorGenerator(((8,), (16,), (32,), (32,), (32,)), ((1.0,),) * 5)
    kd = Distiller(student, detector("retinanet"), SoftLabels())
    image = torch.rand(3, *size)
    target = {"boxes": torch.tensor([[0.0, 0, size[1], size[0]]]), "labels": torch.tensor([1])}
    student.train()([image], [target])
    kd([image], [target])
    reader = kd._pair.student
    grids = reader.dense(reader.look(reader.see([image]))).grids
    assert [(g.stride, g.height) for g in grids[-2:]] == [(32, 1), (32, 1)]
    assert kd._pair.strides[0] == [4, 8, 16, 32, 32]


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_a_teacher_padded_further_gives_soft_labels_of_the_same_cells(kind):
    student = trembling(kind)
    teacher = copy.deepcopy(student).eval()
    _, seen, _ = train(student, FACTS)
    reader, view = detector_of(teacher), seen.look.view
    padded = torch.nn.functional.pad(view.images, (0, 64, 0, 32))
    wide = reader.look(View(padded, view.sizes))
    near = reader.look(view)
    soft, rows = reader.soft_labels(wide, seen.sampled)
    assert rows is None or len(rows) == len(seen.sampled.logits)
    # By hand: the cell at the same row, column and anchor of the same level.
    numbers, locations, grids = seen.sampled.raw
    dense = reader.dense(wide)
    expected = []
    for image, location in zip(numbers.tolist(), locations.tolist(), strict=True):
        first = mine = 0
        for a, b in zip(grids, dense.grids, strict=True):
            if location < mine + a.rows:
                cell, anchor = divmod(location - mine, a.anchors)
                y, x = divmod(cell, a.width)
                expected.append(dense.logits[image, first + (y * b.width + x) * b.anchors + anchor])
                break
            mine, first = mine + a.rows, first + b.rows
    assert torch.equal(soft, torch.stack(expected))
    assert near.maps[0].shape != wide.maps[0].shape


def test_levels_that_only_the_student_has_are_left_out():
    student = trembling("retinanet")
    teacher = copy.deepcopy(student)
    forward = teacher.backbone.forward
    teacher.backbone.forward = lambda x: dict(list(forward(x).items())[1:])
    sizes = student.anchor_generator.sizes[1:], student.anchor_generator.aspect_ratios[1:]
    teacher.anchor_generator = AnchorGenerator(*sizes)
    images, targets = scenes()
    small = torch.tensor([[8.0, 8, 15, 15]])
    targets[0] = {"boxes": torch.cat([small, targets[0]["boxes"]]),
                  "labels": torch.cat([torch.tensor([1]), targets[0]["labels"]])}  # fmt: skip
    _, seen, _ = train(student, FACTS, (images, targets))
    reader = detector_of(teacher)
    soft, rows = reader.soft_labels(reader.look(seen.look.view), seen.sampled)
    _, locations, grids = seen.sampled.raw
    assert torch.equal(rows, (locations >= grids[0].rows).nonzero()[:, 0])
    assert 0 < len(rows) < len(seen.sampled.box)
    torch.testing.assert_close(soft, seen.sampled.logits[rows], rtol=1e-5, atol=1e-5)


def test_unlike_numbers_of_anchors_are_named():
    torch.manual_seed(0)
    anchors = AnchorGenerator(((8, 12), (16, 24), (32, 48)), ((1.0,),) * 3)
    teacher = RetinaNet(Backbone(8), NUM_CLASSES, anchor_generator=anchors)
    _, seen, _ = train(trembling("retinanet"), FACTS)
    reader = detector_of(teacher)
    with pytest.raises(ValueError, match="1 anchors a cell, the teacher 2"):
        reader.soft_labels(reader.look(seen.look.view), seen.sampled)


def test_shared_locations_found_in_inference_mode_serve_a_step_with_gradients():
    student, teacher = (Grid(8, 3, 4), Grid(16, 2, 2)), (Grid(8, 2, 5), Grid(32, 1, 1))
    with torch.inference_mode():
        shared_locations(student, teacher, torch.device("cpu"))
    mine, theirs, grids = shared_locations(student, teacher, torch.device("cpu"))
    assert mine.tolist() == [0, 1, 2, 3, 4, 5, 6, 7] and grids == (Grid(8, 2, 4),)
    assert theirs.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    x = torch.ones(1, 16, 2, requires_grad=True)
    x[:, mine].sum().backward()
    assert x.grad.sum() == 16


# --- regions --------------------------------------------------------------------------------------


def test_regions_are_the_outputs_of_the_second_stage_on_its_sampled_proposals():
    model, recorded = trembling("faster_rcnn"), {}
    heads = model.roi_heads
    select = heads.select_training_samples

    def spy(proposals, targets):
        recorded["drawn"] = select(proposals, targets)
        return recorded["drawn"]

    heads.select_training_samples = spy
    heads.box_predictor.register_forward_hook(lambda m, a, out: recorded.setdefault("out", out))
    reader, seen, _ = train(model, facts_of("faster_rcnn"))
    proposals, matched, labels, _ = recorded["drawn"]
    drawn, box = seen.proposals
    assert torch.equal(drawn.boxes, torch.cat(proposals))
    assert torch.equal(drawn.labels, torch.cat(labels))
    counts = torch.tensor([len(p) for p in proposals])
    assert torch.equal(drawn.image_index, torch.arange(3).repeat_interleave(counts))
    assert torch.equal(box >= 0, torch.cat(labels) > 0)
    assert set(box[box < 0].tolist()) == {-1}  # the sampler takes none that is ignored
    first = torch.tensor([0, 2, 4]).repeat_interleave(counts)
    assert torch.equal(box[box >= 0], (torch.cat(matched) + first)[box >= 0])
    assert torch.equal(seen.truth.labels[box[box >= 0]], drawn.labels[box >= 0])
    logits, codes = recorded["out"]
    tapped = reader.regions(seen.look, drawn)
    assert tapped.logits is logits
    expected = heads.box_coder.decode(codes, proposals)[:, 1:]
    assert torch.equal(tapped.boxes, expected)
    assert (tapped.activation, tapped.background) == ("softmax", 0)
    # Equal boxes that are not the same object: the head runs once more, with gradients.
    same = Targets(drawn.boxes, drawn.labels, drawn.image_index)
    anew = reader.regions(seen.look, same)
    assert anew.logits is not logits
    torch.testing.assert_close(anew.logits, tapped.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(anew.boxes, tapped.boxes, rtol=1e-5, atol=1e-4)
    (anew.logits.square().mean() + anew.boxes.square().mean()).backward()
    assert model.backbone.stem.weight.grad.abs().sum() > 0
    assert heads.box_head.fc6.weight.grad.abs().sum() > 0
    # Only what was asked for.
    _, alone, _ = train(model, frozenset({"regions"}))
    assert alone.sampled is None and alone.proposals is not None
    _, alone, _ = train(model, frozenset({"positives"}))
    assert alone.proposals is None
    assert torch.equal(alone.sampled.proposals.boxes, drawn.boxes[box >= 0])
    assert torch.equal(alone.sampled.box, box[box >= 0])
    torch.testing.assert_close(alone.sampled.logits, logits[box >= 0], rtol=1e-5, atol=1e-5)


def test_regions_keep_the_order_of_the_boxes_and_bear_images_without():
    model = trembling("faster_rcnn").eval()
    reader, look = example_look(model)
    g = torch.Generator().manual_seed(3)
    corner = torch.rand(9, 2, generator=g) * 40
    boxes = torch.cat([corner, corner + 5 + 20 * torch.rand(9, 2, generator=g)], dim=1)
    image = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 1])
    mixed = reader.regions(look, Targets(boxes, torch.zeros_like(image), image))
    for i in range(9):
        one = Targets(boxes[i : i + 1], image[:1] * 0, image[i : i + 1])
        alone = reader.regions(look, one)
        torch.testing.assert_close(alone.logits[0], mixed.logits[i], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone.boxes[0], mixed.boxes[i], rtol=1e-4, atol=1e-3)
    none = reader.regions(look, Targets(boxes[:0], image[:0], image[:0]))
    assert none.logits.shape == (0, NUM_CLASSES)
    assert none.boxes.shape == (0, NUM_CLASSES - 1, 4)
    none.logits.sum().backward()


def test_the_detectors_own_detections_come_from_these_regions():
    """Softmax, clip, threshold and suppression on top of them give what the model finds."""
    model = trembling("faster_rcnn").eval()
    reader, look = example_look(model)
    with torch.no_grad():
        proposals = reader.proposals(look)
        out = reader.regions(look, proposals)
    found = reader.detections(look.view)
    for i, image in enumerate(found):
        assert len(image.boxes) > 0
        mine = proposals.image_index == i
        height, width = look.view.sizes[i]
        boxes = out.boxes[mine].clamp(min=0)
        boxes[..., 0::2] = boxes[..., 0::2].clamp(max=width)
        boxes[..., 1::2] = boxes[..., 1::2].clamp(max=height)
        scores = out.logits[mine].softmax(dim=1)[:, 1:]
        for box, score, label in zip(image.boxes, image.scores, image.labels, strict=True):
            distance = (boxes[:, label - 1] - box).abs().amax(dim=1)
            distance = distance + (scores[:, label - 1] - score).abs()
            assert distance.min() < 1e-3


@pytest.mark.parametrize("training", [False, True])
def test_proposals_are_those_of_the_region_proposal_network_in_eval_mode(training):
    model = trembling("faster_rcnn", rpn_post_nms_top_n_test=30, rpn_post_nms_top_n_train=7)
    reader, look = example_look(model)
    with torch.no_grad(), evaluating(model):
        own, _ = model.rpn(ImageList(look.view.images, look.view.sizes), look.raw)
    model.train(training)
    proposals = reader.proposals(look)
    assert all(m.training == training for m in model.modules())
    torch.testing.assert_close(proposals.boxes, torch.cat(own), rtol=1e-6, atol=1e-5)
    assert proposals.image_index.tolist() == [0] * len(own[0]) + [1] * len(own[1])
    assert len(own[0]) > 7 and not proposals.labels.any()
    assert not proposals.boxes.requires_grad


@pytest.mark.parametrize("kind", DENSE)
def test_one_stage_detectors_have_no_regions(kind):
    reader, look = example_look(detector(kind))
    boxes = Targets(torch.zeros(0, 4), *[torch.zeros(0, dtype=torch.int64)] * 2)
    with pytest.raises(NotImplementedError, match="gives no regions"):
        reader.regions(look, boxes)
    with pytest.raises(NotImplementedError, match="gives no regions"):
        reader.proposals(look)


# --- inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("cls", [FasterRCNN, RetinaNet, FCOS])
def test_the_example_has_as_many_channels_as_the_model_takes(cls, channels):
    backbone = Backbone(32)
    backbone.stem = nn.Conv2d(channels, 32, 4, stride=4)
    anchors = AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
    name = "rpn_anchor_generator" if cls is FasterRCNN else "anchor_generator"
    model = cls(
        backbone, NUM_CLASSES, image_mean=[0.0] * channels, image_std=[1.0] * channels,
        **{name: anchors},
    )  # fmt: skip
    reader = detector_of(model)
    view = reader.example()
    assert view.images.shape[1] == channels
    assert len(reader.look(view).maps) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_in_half_precision_takes_boxes_in_full(dtype):
    student = trembling("faster_rcnn")
    teacher = copy.deepcopy(student).to(dtype).eval()
    mine, seen, _ = train(student, facts_of("faster_rcnn"))
    reader = detector_of(teacher)
    with torch.no_grad():
        look = reader.look(seen.look.view)
        assert look.maps[0].dtype == dtype
        soft, _ = reader.soft_labels(look, seen.sampled)
        out = reader.regions(look, seen.proposals[0])
        dense = reader.dense(look, frozenset({"boxes", "priors"}))
        proposals = reader.proposals(look)
    assert soft.dtype == out.logits.dtype == dense.logits.dtype == dtype
    tolerance = {"rtol": 0.05, "atol": 0.1}
    torch.testing.assert_close(soft.float(), seen.sampled.logits, **tolerance)
    torch.testing.assert_close(
        out.logits.float(), mine.regions(*seen_pair(seen)).logits, **tolerance
    )
    # Boxes stay in full precision: half of it knows no fractions of large coordinates.
    assert dense.boxes.dtype == dense.priors.dtype == out.boxes.dtype == torch.float32
    assert proposals.boxes.dtype == torch.float32 and len(proposals) > 0
    torch.testing.assert_close(
        dense.priors, mine.dense(seen.look, frozenset({"priors"})).priors, rtol=0, atol=0
    )


def seen_pair(seen):
    return seen.look, seen.proposals[0]


def test_rows_of_a_sampled_record_without_positives_are_fine():
    """A batch without boxes: empty soft labels, no error."""
    images, targets = scenes()
    empty = [{name: x[:0] for name, x in t.items()} for t in targets]
    for kind in KINDS:
        model = trembling(kind)
        reader, seen, _ = train(model, facts_of(kind), (images, empty))
        assert isinstance(seen.sampled, Sampled) and len(seen.sampled.box) == 0
        look = reader.look(seen.look.view)
        soft, _ = reader.soft_labels(look, seen.sampled)
        assert soft.shape == (0, NUM_CLASSES)
        assert (seen.assigned == -1).all()
        if kind == "faster_rcnn":
            assert (seen.proposals[1] == -1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_in_half_precision_detects(kind, dtype):
    """Its own suppression knows no half precision on CPUs; hooks are gone afterwards."""
    model = trembling(kind).eval()
    if kind == "faster_rcnn":
        model.roi_heads.score_thresh = 0.0
        model.roi_heads.mask_roi_pool = copy.deepcopy(model.roi_heads.box_roi_pool)
        model.roi_heads.mask_head = nn.Conv2d(8, 8, 1)
        model.roi_heads.mask_predictor = nn.Conv2d(8, NUM_CLASSES, 1)
    else:
        model.score_thresh = 0.0
    reader, look = example_look(model)
    expected = reader.detections(look.view)
    half = copy.deepcopy(model).to(dtype)
    found = detector_of(half).detections(look.view)
    for ours, full in zip(found, expected, strict=True):
        assert len(ours.boxes) > 0
        assert ours.boxes.dtype == ours.scores.dtype == torch.float32
        torch.testing.assert_close(ours.scores[:3], full.scores[:3], rtol=0.05, atol=0.02)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in half.modules())
