"""weights="confidence": instances weigh the teacher's probability of their class, not omega."""

import math

import pytest
import torch

import global_kd.functional as F
from global_kd import Distiller, GlobalKnowledgeLoss
from global_kd.instances import assign_levels
from global_kd.losses import PKD
from global_kd.losses.imitation import scale_of
from global_kd.step import Positives

from ..test_distiller import IMAGES, Detector
from ..test_several_losses import Wants, distiller, train
from .test_global_knowledge import CLASSES, batch, make


def defined(logits, labels, activation):
    """In float64, entry by entry."""
    weights = []
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        if not 0 <= label < len(row):
            weights.append(1.0)
        elif activation == "softmax":
            weights.append(math.exp(row[label]) / sum(map(math.exp, row)))
        else:
            weights.append(1 / (1 + math.exp(-row[label])))
    return torch.tensor(weights)


def logits_of(rows, seed=0, classes=CLASSES):
    return torch.randn(2, rows, classes, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_the_probability_of_the_class(activation, dtype):
    logits = (4 * torch.randn(20, 5, generator=torch.Generator().manual_seed(1))).to(dtype)
    labels = torch.arange(20) % 7 - 1  # -1 and 5 are no columns
    found = F.confidence_weights(logits.requires_grad_(), labels, activation=activation)
    assert found.dtype == torch.promote_types(dtype, torch.float32) and not found.requires_grad
    wanted = defined(logits, labels, activation).to(found)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_no_rows_no_weights_and_what_does_not_fit_is_named():
    none = torch.zeros(0, dtype=torch.int64)
    assert F.confidence_weights(torch.zeros(0, 4), none).shape == (0,)
    with pytest.raises(ValueError, match="labels"):
        F.confidence_weights(torch.zeros(3, 4), none)
    with pytest.raises(ValueError, match="weights: expected one of"):
        GlobalKnowledgeLoss(3, weights="loss")


def test_each_proposal_weighs_its_own_row():
    """Proposals without a row, 1, 2 and 5 here, weigh 1."""
    loss = make(boxes="proposals", relation=0, weights="confidence", adapter="identity",
                student_channels=[5, 5])  # fmt: skip
    _, teacher, proposals = batch(5)
    student = [x + 0.3 for x in teacher]
    mine, theirs = logits_of(3)
    rows = torch.tensor([4, 0, 3])
    positives = Positives(torch.tensor([1, 1, 0, 0, 1, 0]), proposals, mine, theirs, rows)
    p = defined(theirs, proposals.labels[rows], "softmax").float()
    weights = torch.ones(6)
    weights[rows] = p
    terms = loss.eval()(student, teacher, batch(6)[2], positives=positives)
    torch.testing.assert_close(terms["kd_logits"], 5 * F.logit_loss(mine, theirs, p))
    own = assign_levels(proposals.boxes, loss.strides)
    wanted = torch.zeros(())
    for level, stride in enumerate((4, 8)):
        mask = own == level
        foreground, _ = F.imitation_loss(
            student[level], teacher[level], proposals.boxes[mask], proposals.image_index[mask],
            stride, weights[mask], foreground=1.0, background=1.0,
        )  # fmt: skip
        wanted = wanted + foreground / scale_of(teacher[level]) / 2
    torch.testing.assert_close(terms["kd_foreground"], 2 * wanted)


def test_a_box_weighs_the_most_confident_of_its_rows():
    loss = make(boxes="ground_truth", relation=0, weights="confidence")
    student, teacher, targets = batch(5)
    _, theirs = logits_of(5)
    box = torch.tensor([2, 0, 2, 5, 0])
    p = defined(theirs, targets.labels[box], "softmax").float()
    wanted = torch.ones(6)  # boxes without a row
    for b in (0, 2, 5):
        wanted[b] = p[box == b].max()
    loss(student, teacher, targets, positives=Positives(box, None, logits_of(5)[0], theirs))
    means = loss.telemetry()
    for label in range(CLASSES):
        mine = wanted[targets.labels == label]
        if len(mine):
            assert means[f"omega/class_{label}"] == pytest.approx(float(mine.mean()), abs=1e-5)
    assert means["prototypes"] == 0 and means["sample"] == 0  # nothing needs them


def test_relations_are_weighed_by_it_and_prototypes_are_kept_for_them():
    loss = make(foreground=0, background=0, logits=0, weights="confidence", boxes="ground_truth")
    plain = make(foreground=0, background=0, logits=0, boxes="ground_truth",
                 robust=False)  # fmt: skip
    box = torch.arange(6)
    for step in range(5):
        student, teacher, targets = batch(step)
        sure = torch.full((6, CLASSES), -50.0).scatter(1, targets.labels[:, None], 50.0)
        given = Positives(box, None, torch.zeros(6, CLASSES), sure)
        terms = loss(student, teacher, targets, positives=given)
        assert torch.equal(terms["kd_relation"], plain(student, teacher, targets)["kd_relation"])
    assert loss.bank.valid.any() and terms["kd_relation"] > 0
    given = Positives(box, None, torch.zeros(6, CLASSES), -sure)  # sure that all labels are wrong
    assert loss(student, teacher, targets, positives=given)["kd_relation"] == 0


def test_what_it_needs_is_said():
    loss = make(weights="confidence")
    with pytest.raises(ValueError, match="positives: GlobalKnowledgeLoss"):
        loss(*batch(0))
    with pytest.raises(ValueError, match=r"positives: .*weights=\"confidence\" expected class"):
        loss(*batch(0), positives=Positives(torch.zeros(4, dtype=torch.int64)))
    with pytest.raises(ValueError, match='weights: expected "omega" to weigh boxes by their maps'):
        loss.weigh(*batch(0))
    with pytest.raises(ValueError, match="losses: GlobalKnowledgeLoss needs positives"):
        Distiller(
            Detector(4), Detector(9), GlobalKnowledgeLoss(4, weights="confidence"),
            example_inputs=(IMAGES,),
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_other_methods_get_it_from_real_detectors(kind):
    """With the relation off and all weights 0 but the soft labels', and with no weight at all."""
    for weights in ({}, {"logits": 0.0}):
        robust = Wants(robust=True)
        options = {"foreground": 0.0, "background": 0.0, "total_steps": 9} | weights
        keeper = GlobalKnowledgeLoss(4, weights="confidence", **options)
        student, kd = distiller([robust, keeper, PKD(robust=True)], kind)
        train(student, kd, steps=1)
        (step,) = robust.seen
        assert step.omega.shape == (len(step.strides), 4)
        assert torch.equal(step.omega, step.omega[:1].expand_as(step.omega))
        assert ((step.omega > 0) & (step.omega <= 1)).all() and (step.omega < 1).any()
