"""Other relations, spaces and prototypes, against their definitions."""

import numpy as np
import pytest
import torch

from benchmarks.accuracy.variants import (
    RIDGE,
    SHARPNESS,
    OtherLoss,
    OtherPrototypes,
    OtherRelation,
    Sparse,
    Variant,
    coefficients,
    embedding,
    grid_rows,
    projection_loss,
    softened_loss,
)
from global_kd import GlobalKnowledgeLoss, PrototypeBank, Targets
from global_kd.losses import Levels
from workshop.small_detectors import SIZES, small_faster_rcnn


def a_bank():
    torch.manual_seed(1)
    bank = PrototypeBank(2, 3, 4, 5, 6)
    bank.student.normal_()
    bank.teacher.normal_()
    bank.valid[:, 0] = True
    bank.valid[:, 1, :2] = True  # class 2 has none
    return bank


def test_coefficients_are_those_of_least_squares_with_a_ridge():
    bank, rows = a_bank(), torch.randn(2, 3, 5)
    labels = torch.tensor([0, 1, 2])
    found = coefficients(rows, bank.student[:, labels], bank.valid[:, labels])
    for level in range(2):
        for n, label in enumerate(labels.tolist()):
            f = rows[level, n].double().numpy()
            g = bank.student[level, label][bank.valid[level, label]].double().numpy()
            g, f = g / np.linalg.norm(g, axis=1, keepdims=True), f / np.linalg.norm(f)
            stacked = np.vstack([g.T, RIDGE**0.5 * np.eye(len(g))])
            wanted, *_ = np.linalg.lstsq(stacked, np.append(f, np.zeros(len(g))), rcond=None)
            assert found[level, n, : len(g)].numpy() == pytest.approx(wanted, abs=1e-5)
            assert not found[level, n, len(g) :].any()


@pytest.mark.parametrize("loss", [projection_loss, softened_loss])
def test_a_student_that_agrees_has_nothing_to_learn(loss):
    bank, labels, weights = a_bank(), torch.tensor([0, 1, 2]), torch.rand(2, 3)
    bank.teacher = bank.student
    rows = torch.randn(2, 3, 5, requires_grad=True)
    assert loss(rows, rows.detach(), bank, labels, weights).item() == pytest.approx(0, abs=1e-6)
    other = loss(rows, torch.randn(2, 3, 5), bank, labels, weights)
    other.backward()
    assert other > 0 and rows.grad.isfinite().all() and rows.grad[:, 0].any()


@pytest.mark.parametrize("loss", [projection_loss, softened_loss])
def test_without_prototypes_or_instances(loss):
    empty = PrototypeBank(2, 3, 4, 5, 6)
    for number in (0, 3):
        rows = torch.randn(2, number, 5, requires_grad=True)
        labels, weights = torch.zeros(number).long(), torch.ones(2, number)
        value = loss(rows, torch.randn(2, number, 6), empty, labels, weights)
        value.backward()
        assert value.item() == 0 and not rows.grad.any()


def test_softened_similarities_by_hand():
    bank, labels = PrototypeBank(1, 1, 2, 2, 2), torch.tensor([0])
    bank.student[0, 0] = bank.teacher[0, 0] = torch.eye(2)
    bank.valid[:] = True
    s, t = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])
    found = softened_loss(s, t, bank, labels, torch.full((1, 1), 0.5))
    a, b = 1 / (1 + np.exp(1 / SHARPNESS)), 1 / (1 + np.exp(-1 / SHARPNESS))
    assert found.item() == pytest.approx(0.5 * (a * np.log(a / b) + b * np.log(b / a)), rel=1e-5)


def test_the_grid_is_nine_means():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 12)
    targets = Targets(
        torch.tensor([[0.0, 0.0, 36.0, 36.0], [12.0, 0.0, 24.0, 48.0]]),
        torch.tensor([0, 0]),
        torch.tensor([1, 0]),
    )
    (rows,) = grid_rows([x], targets, [4.0])
    assert rows.shape == (2, 27)
    parts = x[1, :, :9, :9].unfold(1, 3, 3).unfold(2, 3, 3).mean(dim=(3, 4))  # 9 cells, 3 by 3
    torch.testing.assert_close(rows[0].view(9, 3), parts.flatten(1).T)
    torch.testing.assert_close(rows[1, -3:], x[0, :, 8:12, 5:6].mean(dim=(1, 2)))


def test_the_embedding_is_that_of_the_detector():
    torch.manual_seed(0)
    model = small_faster_rcnn(SIZES["small-student"], 11).eval()
    seen = {}
    model.roi_heads.box_head.register_forward_hook(lambda m, x, y: seen.update(rows=y))
    model.roi_heads.box_roi_pool.register_forward_pre_hook(lambda m, x: seen.update(inputs=x))
    model.backbone.register_forward_hook(lambda m, x, y: seen.update(maps=list(y.values())))
    with torch.no_grad():
        model(torch.rand(2, 3, 96, 96))
        _, boxes, _ = seen["inputs"]
        image = torch.cat([torch.full((len(b),), i) for i, b in enumerate(boxes)])
        shuffled = torch.randperm(len(image))
        targets = Targets(torch.cat(boxes)[shuffled], torch.zeros_like(image), image[shuffled])
        wanted = seen["rows"]
        found = embedding(model, seen["maps"], targets, [4, 8, 16])
    torch.testing.assert_close(found, wanted[shuffled])


@pytest.mark.parametrize("pick", ["random", "kmeans", "means"])
def test_other_prototypes(pick):
    torch.manual_seed(0)
    generator = OtherPrototypes(pick, 3, 4, min_side=0)
    labels = torch.tensor([0] * 20 + [2] * 3)
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0]]).repeat(23, 1)
    s, t = torch.randn(2, 23, 5), torch.randn(2, 23, 6)
    for groups in (s, t):  # class 0: four bundles, far from each other
        groups[:, :20] = torch.eye(4, groups.shape[2]).repeat_interleave(5, 0)
        groups[:, :20] += 0.01 * torch.randn_like(groups[:, :20])
    generator.add(s, t, Targets(boxes, labels, torch.zeros(23).long()))
    bank = generator.generate()
    expected = [1, 0, 1] if pick == "means" else [4, 0, 3]
    assert bank.counts().tolist() == [expected, expected]
    if pick == "means":
        mean = torch.nn.functional.normalize(s[1, :20], dim=1).mean(dim=0)
        torch.testing.assert_close(bank.student[1, 0, 0], mean)
        return
    for level in range(2):
        among = (bank.student[level, 0][:, None] == s[level, :20]).all(dim=2)
        assert among.any(dim=1).all()  # instances, and the same in both spaces
        picked = among.float().argmax(dim=1)
        assert torch.equal(bank.teacher[level, 0], t[level, picked])
        if pick == "kmeans":
            assert set((picked // 5).tolist()) == {0, 1, 2, 3}  # one of each bundle
    assert torch.equal(generator.generate().student, bank.student)  # the same again
    generator.reset()


def test_unknown_variants_are_refused():
    with pytest.raises(ValueError, match="pick: expected one of .* but got 'best'"):
        Variant(pick="best")


@pytest.mark.parametrize("form", ["projection", "softened"])
def test_the_other_relation_has_its_weight_and_omega(form):
    bank, weights = a_bank(), {"foreground": 0, "background": 0}
    targets = Targets(
        torch.tensor([[0.0, 0.0, 9.0, 9.0]]).repeat(3, 1),
        torch.tensor([0, 1, 1]),
        torch.zeros(3).long(),
    )
    maps = [torch.randn(1, 5, 4, 4)] * 2, [torch.randn(1, 6, 4, 4)] * 2
    rows = torch.randn(2, 3, 5), torch.randn(2, 3, 6)
    loss = {"projection": projection_loss, "softened": softened_loss}[form]
    for robust in (True, False):
        rdm = OtherRelation(form, [4, 8], relation=3.0, robust=robust, **weights)
        terms, omega = rdm(*maps, targets, bank, rows=rows, return_weights=True)
        assert omega.min() > 0 and omega.max() < 1
        wanted = 3 * loss(*rows, bank, targets.labels, omega if robust else torch.ones_like(omega))
        torch.testing.assert_close(terms["kd_relation"], wanted)


def test_rows_of_the_embedding_are_in_the_order_of_the_boxes():
    torch.manual_seed(0)
    models = [small_faster_rcnn(SIZES[f"small-{x}"], 11).eval() for x in ("student", "teacher")]
    loss = OtherLoss(11, Variant(space="embedding"), tuple(models), relation=1.0, min_side=0)
    with torch.no_grad():
        maps = [list(m.backbone(torch.rand(2, 3, 96, 96)).values()) for m in models]
        channels = [[x.shape[1] for x in levels] for levels in maps]
        loss.build(Levels(*map(tuple, channels), (4.0, 8.0, 16.0)))
        boxes = torch.tensor([[8.0, 8.0, 40.0, 60.0], [30.0, 30.0, 90.0, 90.0]])
        targets = Targets(boxes, torch.tensor([1, 2]), torch.tensor([1, 0]))
        rows = loss._rows(*maps, targets, None)
        for found, model, levels in zip(rows, models, maps, strict=True):
            wanted = embedding(model, levels, targets, [4, 8, 16])
            assert not torch.equal(wanted[0], wanted[1])
            assert all(torch.equal(level, wanted) for level in found)


def test_every_second_step_has_terms_and_a_resumed_run_keeps_the_turn():
    torch.manual_seed(0)
    models = [small_faster_rcnn(SIZES[f"small-{x}"], 11).train() for x in ("student", "teacher")]
    images = [torch.rand(3, 96, 96)]
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 60.0]]), "labels": torch.tensor([3])}]

    def made():
        return Sparse(*models, GlobalKnowledgeLoss(11, total_steps=9), every=2)

    def step(kd):
        models[0](images, targets)
        return bool(kd(images, targets))

    first = made()
    assert [step(first) for _ in range(5)] == [False, True, False, True, False]
    state = first.state_dict()
    first.detach()
    second = made()
    second.load_state_dict(state)
    assert [step(second) for _ in range(3)] == [True, False, True]
    assert int(second.loss.step) == 4  # schedules count the steps that distil
    second.detach()
