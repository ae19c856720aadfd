"""What Detectron2's heads say, against Detectron2's own training and inference."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from global_kd.hooks import FeatureTap
from global_kd.step import pair_dense
from global_kd.targets import Targets

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.structures import Boxes, ImageList, Instances  # noqa: E402
from detectron2.utils.events import EventStorage  # noqa: E402

from global_kd.detectors.detectron2 import Detectron2Detector  # noqa: E402
from global_kd.detectors.pixels import View  # noqa: E402

from .cases_detectron2 import NUM_CLASSES, build  # noqa: E402
from .test_detectron2 import DENSE, KINDS, TWO_STAGE, batch, detector, tiny_config  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

ALL = frozenset({"boxes", "priors"})
EVERYTHING = frozenset({"positives", "dense", "boxes", "priors", "assigned", "regions"})


def regressing(kind, **options):
    """A detector whose boxes move before any training."""
    torch.manual_seed(0)
    model = detector(kind, **options)
    for name, parameter in model.named_parameters():
        if name.endswith(("bbox_pred.weight", "anchor_deltas.weight", "objectness_logits.weight")):
            nn.init.normal_(parameter, std=0.05)
    return model


def trained(model, images, facts=EVERYTHING):
    """A training forward as the taps see it: reader, what was tapped, what was read."""
    reader = Detectron2Detector(model)
    paths = {**reader.taps, **reader.taps_for(facts)}
    inputs = [name for name in reader.inputs if name in paths]
    with FeatureTap(model, paths, inputs=inputs) as tap, EventStorage():
        model(images)
        return reader, reader.read(tap.read(), images, None, facts)


def trunk(model):
    """A weight deep in the backbone."""
    name = "res4.0.conv1.weight"
    return next(p for n, p in model.backbone.named_parameters() if n.endswith(name))


def image_list(view):
    return ImageList(view.images, [tuple(s) for s in view.sizes])


def truth_of(images):
    return [x["instances"] for x in images]


def owner(model):
    return getattr(model, "proposal_generator", model)


def levels_of(model):
    return owner(model).in_features if owner(model) is not model else model.head_in_features


def dense_outputs(model, look):
    maps = [look.raw[name] for name in levels_of(model)]
    head = model.head if owner(model) is model else model.proposal_generator.rpn_head
    return head(maps), owner(model).anchor_generator(maps)


def rows(level, columns):
    """By the definition: row by row of cells, the anchors of a cell side by side."""
    b, _, height, width = level.shape
    anchors = level.shape[1] // columns
    cells = [
        level[:, a * columns : (a + 1) * columns, y, x]
        for y in range(height)
        for x in range(width)
        for a in range(anchors)
    ]
    return torch.stack(cells, dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_is_what_the_head_says_and_the_generator_lays(kind):
    model, images = regressing(kind).eval(), batch(kind)
    reader = Detectron2Detector(model)
    with torch.no_grad():
        look = reader.observe(images, None).look
        dense = reader.dense(look, ALL)
        (logits, *_), anchors = dense_outputs(model, look)
        columns = 1 if kind in TWO_STAGE else NUM_CLASSES
        assert torch.equal(dense.logits, torch.cat([rows(x, columns) for x in logits], dim=1))
        assert torch.equal(dense.priors, Boxes.cat(anchors).tensor)
        assert dense.activation == "sigmoid" and dense.background is None
        for grid, level, boxes in zip(dense.grids, logits, anchors, strict=True):
            assert (grid.height, grid.width) == tuple(level.shape[2:])
            assert grid.rows == len(boxes)
            assert look.view.size[0] <= grid.height * grid.stride < look.view.size[0] + grid.stride
        plain = reader.dense(look)
        assert plain.boxes is None and plain.priors is None
        assert torch.equal(plain.logits, dense.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_are_those_that_inference_starts_from(kind, monkeypatch):
    model, images = regressing(kind).eval(), batch(kind)
    reader = Detectron2Detector(model)
    look = reader.observe(images, None).look
    seen = []
    if kind in TWO_STAGE:
        rpn = model.proposal_generator
        decode = rpn._decode_proposals
        monkeypatch.setattr(
            rpn, "_decode_proposals", lambda *a: seen.append(decode(*a)) or seen[-1]
        )
        expected = lambda: torch.cat(seen[0], dim=1)  # noqa: E731
    else:

        def transform(anchors, scores, deltas, *_):
            apply = model.box2box_transform.apply_deltas
            seen.append(torch.cat([apply(d, a.tensor) for a, d in zip(anchors, deltas)]))
            return Instances(
                (1, 1),
                pred_boxes=Boxes(seen[-1][:0]),
                scores=scores[0][:0, 0],
                pred_classes=torch.zeros(0, dtype=torch.int64),
            )

        monkeypatch.setattr(model, "_decode_multi_level_predictions", transform)
        expected = lambda: torch.stack(seen)  # noqa: E731
    with torch.no_grad():
        model([{"image": x["image"]} for x in images])
        dense = reader.dense(look, ALL)
    torch.testing.assert_close(dense.boxes, expected(), rtol=0, atol=1e-4)
    assert (dense.boxes - dense.priors).abs().max() > 1  # they have moved


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_tapped_is_what_would_be_computed(kind):
    model, images = regressing(kind), batch(kind)
    reader, seen = trained(model, images)
    tapped = reader.dense(seen.look, ALL)
    again = reader.head(seen.look.maps, seen.look, ALL)
    for name in ("logits", "boxes", "priors"):
        torch.testing.assert_close(getattr(tapped, name), getattr(again, name))
    assert tapped.grids == again.grids
    assert tapped.logits.requires_grad and tapped.boxes.requires_grad
    assert not tapped.priors.requires_grad
    (tapped.logits.sum() + tapped.boxes.sum()).backward()
    assert trunk(model).grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_maps_through_the_head(kind):
    model = regressing(kind).eval().requires_grad_(False)
    reader = Detectron2Detector(model)
    look = reader.observe(batch(kind), None).look
    maps = [x.detach().requires_grad_() for x in look.maps]
    dense = reader.head(maps, look, ALL)
    (dense.logits.sum() + dense.boxes.sum()).backward()
    for name, x in zip(reader._levels, maps, strict=True):
        assert (x.grad is not None and x.grad.abs().sum() > 0) == (name in levels_of(model))


@pytest.mark.parametrize("kind", DENSE)
def test_a_dense_student_is_assigned_what_it_trains(kind):
    model, images = regressing(kind), batch(kind)
    _, seen = trained(model, images)
    _, anchors = dense_outputs(model, seen.look)
    labels, boxes = (torch.stack(x) for x in model.label_anchors(anchors, truth_of(images)))
    box = seen.assigned
    assert torch.equal(box == -1, labels == NUM_CLASSES)
    assert torch.equal(box == -2, labels == -1)
    positive = box >= 0
    assert positive.any() and (kind == "fcos" or (box == -2).any())
    assert torch.equal(seen.truth.labels[box[positive]], labels[positive])
    assert torch.equal(seen.truth.boxes[box[positive]], boxes[positive])
    image = torch.arange(len(images))[:, None].expand_as(box)
    assert torch.equal(seen.truth.image_index[box[positive]], image[positive])
    assert torch.equal(seen.sampled.box, box[positive])


@pytest.mark.parametrize("kind", TWO_STAGE)
@pytest.mark.parametrize("boundary", [-1, 8])
def test_a_proposal_network_is_assigned_everything_that_it_may_sample(kind, boundary, monkeypatch):
    model, images = regressing(kind), batch(kind)
    rpn = model.proposal_generator
    rpn.anchor_boundary_thresh = boundary
    _, seen = trained(model, images)
    _, anchors = dense_outputs(model, seen.look)
    monkeypatch.setattr(rpn, "_subsample_labels", lambda labels: labels)
    labels, boxes = (
        torch.stack(x) for x in rpn.label_and_sample_anchors(anchors, truth_of(images))
    )
    box = seen.assigned
    for mark, label in ((-1, 0), (-2, -1)):
        assert torch.equal(box == mark, labels == label)
    positive = box >= 0
    assert positive.any() and (box == -1).any()
    assert torch.equal(seen.truth.boxes[box[positive]], boxes[positive])
    image = torch.arange(len(images))[:, None].expand_as(box)
    assert torch.equal(seen.truth.image_index[box[positive]], image[positive])


@pytest.mark.parametrize("kind", TWO_STAGE)
def test_reading_draws_no_random_number_and_remembers_nothing(kind):
    model, images = regressing(kind), batch(kind)
    reader = Detectron2Detector(model)
    paths = {**reader.taps, **reader.taps_for(EVERYTHING)}
    tap = FeatureTap(model, paths, inputs=[name for name in reader.inputs if name in paths])
    with EventStorage():
        model(images)
    state = torch.get_rng_state()
    seen = reader.read(tap.read(), images, None, EVERYTHING)
    reader.dense(seen.look, ALL)
    reader.regions(seen.look, seen.proposals[0])
    reader.proposals(seen.look)
    assert torch.equal(state, torch.get_rng_state())
    assert all(m.training for m in model.modules())
    tap.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def own_outputs(model, look, boxes):
    """Class logits and decoded boxes (N, K, 4) as the ROI heads' inference makes them."""
    heads, names = model.roi_heads, model.roi_heads.in_features
    proposals = []
    for i, size in enumerate(look.view.sizes):
        one = Instances(tuple(size))
        one.proposal_boxes = Boxes(boxes.boxes[boxes.image_index == i])
        proposals.append(one)
    maps = [look.raw[name] for name in names]
    if hasattr(heads, "num_cascade_stages"):
        predictor, found = heads.box_predictor[0], heads._run_stage(maps, proposals, 0)
    elif hasattr(heads, "res5"):
        predictor = heads.box_predictor
        pooled = heads._shared_roi_transform(maps, [x.proposal_boxes for x in proposals])
        found = predictor(pooled.mean(dim=[2, 3]))
    else:
        predictor = heads.box_predictor
        found = predictor(
            heads.box_head(heads.box_pooler(maps, [x.proposal_boxes for x in proposals]))
        )
    decoded = torch.cat(predictor.predict_boxes(found, proposals))
    return found[0], decoded.view(len(decoded), -1, 4)


@pytest.mark.parametrize("kind", TWO_STAGE)
def test_regions_are_what_the_roi_heads_say(kind):
    model, images = regressing(kind).eval(), batch(kind)
    reader = Detectron2Detector(model)
    with torch.no_grad():
        look = reader.observe(images, None).look
        proposals = reader.proposals(look)
        mixed = torch.randperm(len(proposals), generator=torch.Generator().manual_seed(0))[:20]
        few = Targets(
            *(x[mixed] for x in (proposals.boxes, proposals.labels, proposals.image_index))
        )
        regions = reader.regions(look, few)
        order = few.image_index.argsort(stable=True)
        logits, boxes = own_outputs(model, look, few)
    torch.testing.assert_close(regions.logits[order], logits)
    torch.testing.assert_close(regions.boxes[order], boxes, rtol=1e-5, atol=1e-4)
    assert regions.activation == "softmax" and regions.background == NUM_CLASSES
    assert regions.logits.shape == (20, NUM_CLASSES + 1)
    assert regions.boxes.shape == (20, 1 if kind == "cascade" else NUM_CLASSES, 4)
    none = Targets(few.boxes[:0], few.labels[:0], few.image_index[:0])
    nothing = reader.regions(look, none)
    assert nothing.logits.shape == (0, NUM_CLASSES + 1)
    assert nothing.boxes.shape[0] == 0 and nothing.boxes.shape[1:] == regions.boxes.shape[1:]


@pytest.mark.parametrize("kind", TWO_STAGE)
def test_proposals_are_those_of_inference(kind):
    model, images = regressing(kind), batch(kind)
    reader = Detectron2Detector(model)
    look = reader.observe(images, None).look
    found = reader.proposals(look)
    assert all(m.training for m in model.modules())
    model.eval()
    with torch.no_grad():
        own, _ = model.proposal_generator(image_list(look.view), look.raw, None)
    assert torch.equal(found.boxes, torch.cat([x.proposal_boxes.tensor for x in own]))
    assert torch.equal(found.image_index.bincount(minlength=3), torch.tensor([len(x) for x in own]))
    assert len(found) > 3 and not found.labels.any() and not found.boxes.requires_grad


@pytest.mark.parametrize("kind", TWO_STAGE)
def test_the_proposals_that_a_student_trains_on(kind, monkeypatch):
    model, images = regressing(kind), batch(kind)
    sampled = []
    label = model.roi_heads.label_and_sample_proposals
    monkeypatch.setattr(
        model.roi_heads,
        "label_and_sample_proposals",
        lambda *a: sampled.extend(copy.copy(label(*a))) or sampled,
    )
    reader, seen = trained(model, images)
    proposals, box = seen.proposals
    classes = torch.cat([x.gt_classes for x in sampled])
    assert torch.equal(proposals.boxes, torch.cat([x.proposal_boxes.tensor for x in sampled]))
    assert torch.equal(box < 0, classes == NUM_CLASSES)
    assert (box >= 0).any() and (box == -1).any()
    assert torch.equal(proposals.labels[box >= 0], classes[box >= 0])
    gt = torch.cat(
        [(x.gt_boxes if x.has("gt_boxes") else x.proposal_boxes).tensor for x in sampled]
    )
    assert torch.equal(seen.truth.boxes[box[box >= 0]], gt[box >= 0])
    regions = reader.regions(seen.look, proposals)
    assert regions.logits is seen.look.tapped["predictions"][0]
    copied = Targets(proposals.boxes.clone(), proposals.labels, proposals.image_index)
    again = reader.regions(seen.look, copied)
    torch.testing.assert_close(regions.logits, again.logits)
    torch.testing.assert_close(regions.boxes, again.boxes, rtol=1e-5, atol=1e-4)
    for outputs in (again, regions):
        model.zero_grad()
        (outputs.logits.logsumexp(1).sum() + outputs.boxes.sum()).backward(retain_graph=True)
        assert trunk(model).grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["faster", "c4"])
def test_sigmoid_heads_leave_out_the_background(kind):
    cfg = tiny_config(kind)
    cfg.MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE = True
    torch.manual_seed(0)
    model = build(cfg)
    reader, seen = trained(model, batch(kind))
    regions = reader.regions(seen.look, seen.proposals[0])
    assert torch.equal(regions.logits, seen.look.tapped["predictions"][0][:, :-1])
    assert (regions.activation, regions.background) == ("sigmoid", None)


@pytest.mark.parametrize("kind", KINDS)
def test_taps_only_what_is_asked_for(kind):
    reader = Detectron2Detector(detector(kind))
    head = "proposal_generator.rpn_head" if kind in TWO_STAGE else "head"
    anchors = head.replace("rpn_head", "anchor_generator").replace("head", "anchor_generator")
    assert reader.taps_for(frozenset({"images", "targets"})) == {}
    assert set(reader.taps_for(frozenset({"dense"})).values()) == {head, anchors}
    assert set(reader.taps_for(frozenset({"assigned"})).values()) == {anchors}
    assert EVERYTHING - reader.gives == (set() if kind in TWO_STAGE else {"regions"})
    assert "teacher_head" in reader.gives and "images" in reader.gives
    if kind in DENSE:
        with pytest.raises(NotImplementedError, match="gives no regions"):
            reader.regions(None, None)


def other_padding(view, divisor):
    """The same images on a canvas that is larger at the right and bottom."""
    down, right = (-side % divisor for side in view.size)
    assert down or right
    return View(nn.functional.pad(view.images, (0, right, 0, down)), view.sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_as_teacher_says_the_same(kind):
    model, images = regressing(kind), batch(kind)
    reader, seen = trained(model, images)
    teacher = Detectron2Detector(copy.deepcopy(model).eval())
    with torch.no_grad():
        look = teacher.look(seen.look.view)
        theirs = teacher.dense(look, ALL)
        labels, rows = teacher.soft_labels(look, seen.sampled)
    mine, theirs, kept = pair_dense(reader.dense(seen.look, ALL), theirs)
    assert kept is None
    torch.testing.assert_close(mine.logits, theirs.logits)
    torch.testing.assert_close(mine.boxes, theirs.boxes, rtol=1e-5, atol=1e-3)
    assert len(labels) > 0
    wanted = seen.sampled.logits if rows is None else seen.sampled.logits[rows]
    assert len(wanted) == len(seen.sampled.logits)
    torch.testing.assert_close(wanted, labels)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_on_a_larger_canvas_pairs_by_stride(kind):
    model, images = regressing(kind), batch(kind)
    reader, seen = trained(model, images)
    teacher = Detectron2Detector(copy.deepcopy(model).eval())
    with torch.no_grad():
        look = teacher.look(other_padding(seen.look.view, 160))
        whole = teacher.dense(look, ALL)
        labels, rows = teacher.soft_labels(look, seen.sampled)
    student = reader.dense(seen.look, ALL)
    assert whole.grids != student.grids
    mine, theirs, kept = pair_dense(student, whole)
    assert torch.equal(mine.priors, theirs.priors)  # the same places
    assert mine.grids == theirs.grids
    if kind in DENSE:
        # The soft labels are those rows of the shared locations that the student trains.
        image, place = (seen.assigned >= 0).nonzero(as_tuple=True)
        where = torch.full_like(seen.assigned[0], -1)
        where[slice(None) if kept is None else kept] = torch.arange(mine.logits.shape[1])
        assert torch.equal(labels, theirs.logits[image[rows], where[place[rows]]])
        assert len(rows) == (where[place] >= 0).sum() > 0


@pytest.mark.parametrize("kind", DENSE)
def test_heads_without_a_common_place_are_named(kind):
    model, images = regressing(kind), batch(kind)
    _, seen = trained(model, images)
    mask, grids = seen.sampled.raw
    odd = replace(seen.sampled, raw=(mask, tuple(replace(g, stride=g.stride * 3) for g in grids)))
    teacher = Detectron2Detector(copy.deepcopy(model).eval())
    with pytest.raises(ValueError, match="no level of equal stride"):
        teacher.soft_labels(teacher.look(seen.look.view), odd)


@pytest.mark.parametrize("kind", ["faster", "retinanet", "fcos"])
def test_levels_come_finest_first_whatever_the_order_of_the_head(kind):
    model, images = regressing(kind), batch(kind)
    reader, seen = trained(model, images)
    plain, assigned = reader.dense(seen.look, ALL), seen.assigned
    part = owner(model)
    name = "in_features" if kind == "faster" else "head_in_features"
    setattr(part, name, list(reversed(getattr(part, name))))
    generator = part.anchor_generator
    generator.strides = list(reversed(generator.strides))
    generator.cell_anchors = type(generator.cell_anchors)(reversed(list(generator.cell_anchors)))
    torch.manual_seed(0)
    turned, seen = trained(model, images)
    dense = turned.dense(seen.look, ALL)
    assert [g.stride for g in dense.grids] == sorted(g.stride for g in dense.grids)
    assert dense.grids == plain.grids
    torch.testing.assert_close(dense.logits, plain.logits)
    torch.testing.assert_close(dense.boxes, plain.boxes, rtol=1e-5, atol=1e-3)
    if kind != "fcos":  # which knows its first and last level by their place
        assert torch.equal(seen.assigned, assigned)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_teacher_in_half_precision(kind, dtype):
    model, images = regressing(kind).eval(), batch(kind)
    reader = Detectron2Detector(model)
    half = Detectron2Detector(copy.deepcopy(model).to(dtype))
    view = reader.observe(images, None).look.view
    with torch.no_grad():
        look = half.look(view)  # float32 pixels
        dense = half.dense(look, ALL)
        full = reader.dense(reader.look(view), ALL)
        assert look.maps[0].dtype == dense.logits.dtype == dtype
        assert dense.boxes.dtype == torch.float32
        scale = full.logits.abs().max()
        torch.testing.assert_close(
            dense.logits.float() / scale, full.logits / scale, rtol=0, atol=0.05
        )
        if kind in TWO_STAGE:
            proposals = reader.proposals(reader.look(view))
            regions, exact = (r.regions(r.look(view), proposals) for r in (half, reader))
            scale = exact.logits.abs().max()
            torch.testing.assert_close(
                regions.logits.float() / scale, exact.logits / scale, rtol=0, atol=0.05
            )
            assert len(half.proposals(look)) > 0
    found = half.detections(view)
    assert len(found) == len(images)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in half.model.modules())


def test_other_numbers_of_channels():
    cfg = tiny_config("retinanet")
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [1.0] * 4, [2.0] * 4
    reader = Detectron2Detector(build(cfg))
    assert reader.example().images.shape[1] == 4
    assert reader.dense(reader.look(reader.example())).logits.shape[2] == NUM_CLASSES


def test_a_batch_without_any_object():
    for kind in KINDS:
        model, images = regressing(kind), batch(kind)
        for x in images:
            x["instances"] = x["instances"][:0]
        _, seen = trained(model, images)
        assert (seen.assigned == -1).all()
        assert len(seen.sampled.box) == 0 and seen.sampled.logits.requires_grad
        if kind in TWO_STAGE:
            proposals, box = seen.proposals
            assert len(proposals) > 0 and (box == -1).all() and not proposals.labels.any()
