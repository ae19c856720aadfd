"""One model is a student here and a teacher there: chains, mutual distillation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from global_kd import Distiller
from tests.small_loss import small_loss

from .detectors.detectors import detector, scenes
from .test_distiller import BOXES, IMAGES, Detector


def model(kind, width, seed):
    torch.manual_seed(seed)
    made = Detector(width) if kind == "home-made" else detector(kind, width)
    made.train()
    made.extra = nn.BatchNorm2d(2).eval()  # a module of a mode of its own
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # its running means would be others after a forward
    return made


def batch(kind):
    return (IMAGES, BOXES) if kind == "home-made" else scenes()


def distiller(kind, student, teacher):
    example = {"example_inputs": (IMAGES,)} if kind == "home-made" else {}
    return Distiller(student, teacher, small_loss(4), **example)


def forward(kind, student):
    output = student(*(batch(kind)[:1] if kind == "home-made" else batch(kind)))
    return sum(
        x.float().square().mean() for x in (output.values() if kind != "home-made" else output)
    )


@pytest.mark.parametrize("order", ["forwards first", "one by one", "the other way round"])
@pytest.mark.parametrize("kind", ["home-made", "retinanet", "faster_rcnn"])
def test_two_models_that_teach_each_other(kind, order):
    """Each learns what it learns of a frozen copy of the other, and both go on training."""
    a, b = model(kind, 8, 1), model(kind, 8, 2)
    frozen_a, frozen_b = copy.deepcopy(a), copy.deepcopy(b)
    expected = []
    for student, teacher in ((copy.deepcopy(a), frozen_b), (copy.deepcopy(b), frozen_a)):
        kd = distiller(kind, student, teacher)
        torch.manual_seed(3)
        own = forward(kind, student)
        (own + sum(kd(*batch(kind)).values())).backward()
        expected.append({n: p.grad for n, p in student.named_parameters()})
    of_a, of_b = distiller(kind, a, b), distiller(kind, b, a)
    modes = [[m.training for m in x.modules()] for x in (a, b)]
    torch.manual_seed(3)
    own_a = forward(kind, a)
    if order == "one by one":
        terms_a = of_a(*batch(kind))
        torch.manual_seed(3)
        own_b = forward(kind, b)
        terms_b = of_b(*batch(kind))
    else:
        torch.manual_seed(3)
        own_b = forward(kind, b)
        first, second = (of_b, of_a) if order == "the other way round" else (of_a, of_b)
        found = {id(x): x(*batch(kind)) for x in (first, second)}
        terms_a, terms_b = found[id(of_a)], found[id(of_b)]
    assert modes == [[m.training for m in x.modules()] for x in (a, b)]
    (own_a + sum(terms_a.values())).backward()
    (own_b + sum(terms_b.values())).backward()
    for student, wanted in zip((a, b), expected, strict=True):
        assert any(p.grad is not None for p in student.parameters())
        for name, p in student.named_parameters():
            if wanted[name] is None:
                assert p.grad is None or not p.grad.any()
            else:
                torch.testing.assert_close(p.grad, wanted[name], msg=name)


def test_the_middle_of_a_chain_trains_on():
    """large -> middle -> small: the middle's forward is read after it has taught."""
    kind = "home-made"
    large, middle, small = (model(kind, w, w) for w in (12, 8, 4))
    upper, lower = distiller(kind, middle, large), distiller(kind, small, middle)
    forward(kind, middle)
    forward(kind, small)
    lower(*batch(kind))  # the middle looks as a teacher; its training forward is still to be read
    assert middle.training and middle.body.norm.training and not middle.extra.training
    terms = upper(*batch(kind))
    sum(terms.values()).backward()
    assert middle.body.stem.weight.grad.abs().sum() > 0
    large.train()
    forward(kind, small)
    lower(*batch(kind))
    with pytest.raises(ValueError, match="never fired"):  # a look as teacher left no record
        upper(*batch(kind))
    upper.detach()  # nobody trains it any more: an ordinary teacher
    forward(kind, small)
    lower(*batch(kind))
    assert not any(m.training for m in middle.modules())


class Restless(Detector):
    """Its maps tell how often it has run in training."""

    times = 0

    def forward(self, images):
        self.times += self.training
        return super().forward(images * self.times)


def own_loss(model):
    return sum(x.float().square().mean() for x in model(IMAGES))


@pytest.mark.parametrize("look", ["check", "calibrate"])
@pytest.mark.parametrize("role", ["two teachers of one student", "each teaches the other"])
def test_a_look_of_one_distiller_is_no_forward_of_another(role, look):
    """It ends with what the other would have been without."""

    def run(looking):
        torch.manual_seed(0)
        a, b, c = Restless(4).train(), Restless(8).train(), Restless(6).train()
        first, second = (a, b), (a, c) if role == "two teachers of one student" else (b, a)
        looks, other = (distiller("home-made", *pair) for pair in (first, second))
        forward("home-made", second[0])
        if looking:
            getattr(looks, look)(IMAGES, BOXES, detection_loss=own_loss, verbose=False)
        terms = other(IMAGES, BOXES)
        sum(terms.values()).backward()
        return terms, [p.grad for p in second[0].parameters()]

    (terms, gradients), (others, same) = run(looking=False), run(looking=True)
    assert {k: v.item() for k, v in terms.items()} == {k: v.item() for k, v in others.items()}
    assert all(x is y or torch.equal(x, y) for x, y in zip(gradients, same, strict=True))
