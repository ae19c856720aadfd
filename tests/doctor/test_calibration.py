"""Weights as shares of the detection loss's gradient on the student's maps."""

import copy

import pytest
import torch

from global_kd import Distiller
from global_kd.doctor.calibration import weights_for
from global_kd.losses import PKD

from ..detectors.detectors import detector, scenes
from ..small_loss import small_loss
from ..test_distiller import BOXES, IMAGES, Detector


def norm(value, maps):
    found = torch.autograd.grad(value, maps, retain_graph=True, allow_unused=True)
    return torch.stack([x.square().sum() for x in found if x is not None]).sum().sqrt()


def pair(kind, channels=8):
    torch.manual_seed(channels)
    student, teacher = detector(kind, channels), detector(kind, 12)
    # Prototypes are there from the start, so that what is measured is what is trained.
    kd = Distiller(student, teacher, [small_loss(4, refresh_every=None), PKD()])
    kd.refresh([scenes(seed=3)], progress=False)
    return student, kd


@pytest.mark.parametrize("kind", ["faster_rcnn", "fcos"])
def test_each_terms_gradient_is_its_share(kind):
    student, kd = pair(kind)
    images, targets = scenes()
    before = copy.deepcopy(student.state_dict()), torch.get_rng_state()
    table = kd.calibrate(images, targets, share=0.3, verbose=False)
    assert all(torch.equal(v, before[0][k]) for k, v in student.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before[1]) and kd.loss.step == 0
    maps = []
    hook = student.backbone.register_forward_hook(lambda m, a, out: maps.extend(out.values()))
    detection = torch.stack(list(student(images, targets).values())).sum()
    terms = kd(images, targets)
    hook.remove()
    whole = norm(detection, maps)
    assert set(terms) == set(table.shares)
    assert table.detection == pytest.approx(float(whole), rel=1e-4)
    for name, value in terms.items():
        assert float(norm(value, maps) / whole) == pytest.approx(0.3, rel=0.01), name
        assert table.shares[name].wanted == 0.3


def test_unlike_detectors_end_with_unlike_weights_and_equal_shares():
    images, targets = scenes()
    tables = [pair("retinanet", n)[1].calibrate(images, targets, verbose=False) for n in (8, 16)]
    narrow, wide = (t.shares["kd_pkd"] for t in tables)
    assert narrow.after != pytest.approx(wide.after, rel=0.05)
    assert narrow.wanted == wide.wanted == 0.3


def test_a_share_for_one_term_leaves_the_others():
    _, kd = pair("retinanet")
    images, targets = scenes()
    weights = dict(kd.losses["global_knowledge"].weights)
    first = kd.calibrate(images, targets, share={"kd_pkd": 0.2}, verbose=False)
    assert kd.losses["global_knowledge"].weights == weights
    again = kd.calibrate(images, targets, share={"kd_pkd": 0.2}, verbose=False)
    assert again.shares["kd_pkd"].measured == pytest.approx(0.2, rel=1e-3)
    assert again.shares["kd_pkd"].after == pytest.approx(first.shares["kd_pkd"].after, rel=1e-3)
    assert "0.2" in str(again) and "kd_pkd" in str(again)


def test_weights_are_resumed_and_several_batches_are_averaged():
    _, kd = pair("retinanet")
    loader = [scenes(seed=s) for s in range(3)]
    kd.calibrate(loader=loader, batches=2, verbose=False)
    both = dict(kd.losses["pkd"].weights)
    _, one = pair("retinanet")
    tables = [one.calibrate(*batch, share={"kd_pkd": 0.3}, verbose=False) for batch in loader[:2]]
    # Means of norms, not of weights.
    whole = sum(t.detection for t in tables)
    sizes = sum(t.shares["kd_pkd"].wanted * t.detection / t.shares["kd_pkd"].after for t in tables)
    assert both[""] == pytest.approx(0.3 * whole / sizes, rel=1e-4)
    _, other = pair("retinanet")
    other.load_state_dict(kd.state_dict())
    assert other.losses["pkd"].weights == both
    assert other.losses["global_knowledge"].weights == kd.losses["global_knowledge"].weights


def trained(student, kd, steps, first=0):
    """What a training leaves, and the weight of PKD before each step and after the last."""
    optimizer = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=1e-3)
    weights = []
    for step in range(first, first + steps):
        weights.append(kd.losses["pkd"].weights[""])
        torch.manual_seed(step)
        batch = scenes(seed=step)
        losses = student(*batch)
        losses |= kd(*batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    states = [*student.state_dict().values(), *kd.losses.state_dict().values()]
    return states, [*weights, kd.losses["pkd"].weights[""]]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("kind", "frozen"), [("faster_rcnn", False), ("retinanet", True)])
def test_looking_at_shares_that_stay_in_their_band_changes_no_bit(kind, frozen):
    ends = []
    for every in (None, 2):
        student, kd = pair(kind)
        # The backward pass of the step's own forward still needs what the norm has kept.
        norm = torch.nn.BatchNorm2d(3)
        student.backbone.register_module("norm", norm)
        student.backbone.register_forward_pre_hook(
            lambda m, a, norm=norm: norm.train(not frozen)(a[0])
        )
        kd.calibrate(*scenes(), every=every, band=1e9, verbose=False)
        ends.append(trained(student, kd, 4))
    assert same(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]


def test_shares_are_brought_back_into_their_band():
    student, kd = pair("retinanet")
    kd.calibrate(*scenes(), share={"kd_pkd": 0.3}, every=2, band=0.05, verbose=False)
    others = dict(kd.losses["global_knowledge"].weights)
    fitting = kd.losses["pkd"].weights[""]
    kd.losses["pkd"].calibrate({"": 200 * fitting})
    _, weights = trained(student, kd, 5)
    assert weights[0] == weights[2] == 200 * fitting  # looked at when two steps are done
    assert weights[3] == weights[2] * 0.1  # no more at once
    assert weights[4] == weights[3] and fitting / 2 < weights[5] < 2 * weights[4] / 10
    assert kd.losses["global_knowledge"].weights == others
    assert kd.telemetry()["weight/kd_pkd"] == weights[5]
    assert "weight/kd_foreground" not in kd.telemetry()


def test_held_shares_resume_bit_for_bit():
    def start():
        return pair("retinanet")

    student, kd = start()
    kd.calibrate(*scenes(), share=0.2, every=2, band=1e-6, verbose=False)
    trained(student, kd, 3)
    states = copy.deepcopy((student.state_dict(), kd.state_dict()))
    whole = trained(student, kd, 3, first=3)
    student, kd = start()  # knows of no shares
    student.load_state_dict(states[0])
    kd.load_state_dict(states[1])
    resumed = trained(student, kd, 3, first=3)
    assert same(resumed[0], whole[0]) and resumed[1] == whole[1]
    assert len(set(whole[1])) > 1  # the weight did move
    other = Distiller(student, detector("retinanet", 12), [PKD()])
    with pytest.raises(ValueError, match=r"expected the shares of 1 terms \(kd_pkd\), but got 5"):
        other.set_extra_state(kd.get_extra_state())


def with_share(share, kind="retinanet", **options):
    torch.manual_seed(8)
    student, teacher = detector(kind, 8), detector(kind, 12)
    losses = [small_loss(4, refresh_every=None), PKD(**options)]
    kd = Distiller(student, teacher, losses, share=share)
    kd.refresh([scenes(seed=3)], progress=False)
    return student, kd


@pytest.mark.parametrize("kind", ["faster_rcnn", "fcos"])
def test_the_first_step_sets_the_weights_that_calibrate_would_set(kind):
    student, kd = with_share(0.3, kind)
    other = copy.deepcopy(student.state_dict())
    own = {name: dict(loss.weights) for name, loss in kd.losses.items()}
    torch.manual_seed(0)
    student(*scenes())
    torch.manual_seed(1)
    terms = kd(*scenes())
    set_now = {name: dict(loss.weights) for name, loss in kd.losses.items()}
    student(*scenes(seed=1))
    kd(*scenes(seed=1))
    assert {name: loss.weights for name, loss in kd.losses.items()} == set_now != own
    assert kd.telemetry()["weight/kd_pkd"] == set_now["pkd"][""]
    student, plain = with_share(None, kind)
    student.load_state_dict(other)
    torch.manual_seed(0)
    student(*scenes())
    torch.manual_seed(1)
    plain.calibrate(*scenes(), share=0.3, verbose=False)
    assert {name: loss.weights for name, loss in plain.losses.items()} == set_now
    assert all(float(x.detach()) > 0 for x in terms.values())


def test_evaluations_and_what_is_calibrated_set_no_weight():
    student, kd = with_share(0.3)
    own = dict(kd.losses["pkd"].weights)
    with torch.no_grad():
        student(*scenes())
        kd(*scenes())
    kd.eval()
    student(*scenes())
    kd(*scenes())
    assert kd.losses["pkd"].weights == own
    kd.train()
    kd.losses["pkd"].calibrate({"": 0.125})
    student, kd2 = with_share({"kd_pkd": 0.3, "kd_background": 0.2})
    before = dict(kd2.losses["global_knowledge"].weights)
    student(*scenes())
    kd2(*scenes())
    after = kd2.losses["global_knowledge"].weights
    assert {k for k in before if before[k] != after[k]} == {"background"}
    state = copy.deepcopy(kd2.state_dict())
    student, kd3 = with_share(0.9)
    kd3.load_state_dict(state)  # a run that goes on keeps its weights
    student(*scenes(seed=5))
    kd3(*scenes(seed=5))
    assert kd3.losses["pkd"].weights == kd2.losses["pkd"].weights


def test_a_term_without_a_gradient_waits_for_its_first():
    student, kd = with_share(0.3)
    images, targets = scenes()
    none = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * len(
        targets
    )
    usual = dict(kd.losses["global_knowledge"].weights)
    for _ in range(2):
        student(images, none)
        kd(images, none)
    weights = dict(kd.losses["global_knowledge"].weights)
    assert weights["foreground"] == usual["foreground"]
    assert weights["background"] != usual["background"]
    student(images, targets)
    kd(images, targets)
    last = kd.losses["global_knowledge"].weights
    assert last["foreground"] != usual["foreground"]
    assert last["background"] == weights["background"]


def test_a_check_before_the_first_step_shows_it_and_changes_nothing():
    student, kd = with_share(0.3, "faster_rcnn")
    before = copy.deepcopy([x.weights for x in kd.losses.values()]), kd.state_dict()
    report = kd.check(*scenes(), verbose=False)
    for name, term in report.terms.items():
        if name != "detection":
            assert term.pull == pytest.approx(0.3, rel=0.02), name
    assert "weights: as share= would set them on this batch" in report.facts
    assert [x.weights for x in kd.losses.values()] == before[0]
    again = kd.state_dict()
    assert all(torch.equal(x, again[key]) for key, x in before[1].items())
    student(*scenes())
    kd(*scenes())
    assert "weights: as share= would" not in " ".join(kd.check(*scenes(), verbose=False).facts)


def test_a_share_that_cannot_be_set_is_refused():
    student, teacher = Detector(4), Detector(9)
    with pytest.raises(ValueError, match="share: expected None for a student of no known framew"):
        Distiller(student, teacher, PKD(), share=0.3, example_inputs=(IMAGES,))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    for share, message in (
        (0.0, "share: expected a number > 0"),
        ({"kd_fgd": 1.0}, "share: expected one of .* but got 'kd_fgd'"),
    ):
        with pytest.raises(ValueError, match=message):
            with_share(share)
    torch.manual_seed(0)
    kd = Distiller(detector("retinanet", 8), detector("retinanet", 12), PKD(), share=0.3)
    with pytest.raises(ValueError, match="share: expected None with distil"):
        kd.distil(scenes()[0])


def test_a_home_made_detector_says_what_it_minimises():
    student = Detector(4)
    kd = Distiller(student, Detector(9), PKD(), example_inputs=(IMAGES,))

    def loss(model):
        return sum(x.square().mean() for x in model(IMAGES))

    table = kd.calibrate(IMAGES, BOXES, detection_loss=loss, share=0.5, verbose=False)
    assert kd.loss.weights[""] == table.shares["kd_pkd"].after > 0
    for arguments, message in (
        ({"images": IMAGES, "targets": BOXES}, "detection_loss: expected a function"),
        ({}, r"expected a batch \(images, targets\), or loader=..., but got neither"),
        (
            {"images": IMAGES, "targets": BOXES, "share": {"kd_fgd": 1.0}},
            "share: expected one of 'kd_pkd', but got 'kd_fgd'",
        ),
        ({"images": IMAGES, "share": 0.0}, "share: expected a number > 0"),
        (
            {"images": IMAGES, "detection_loss": loss, "every": 9},
            "every: expected None with detection_loss",
        ),
        ({"images": IMAGES, "every": 9, "band": 0.0}, "band: expected a number > 0"),
        (
            {
                "images": IMAGES,
                "targets": BOXES,
                "detection_loss": lambda m: m(IMAGES)[0].sum() * 0,
            },
            "expected a detection loss with a gradient on the feature maps",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            kd.calibrate(**arguments)


def test_a_batch_in_which_a_term_has_no_gradient_does_not_halve_it():
    """As one without boxes: the mean is over the batches that tell something of the term."""
    loss = PKD(student_channels=[4], teacher_channels=[4], strides=[8], weight=2.0)
    measured = [(4.0, {"kd_pkd": 3.0}), (4.0, {}), (4.0, {"kd_pkd": 0.0})]
    found = weights_for({"pkd": loss}, measured, 0.3).shares["kd_pkd"]
    assert found.measured == pytest.approx(2 * 3 / 4)
    assert loss.weights[""] == pytest.approx(0.3 * 4 / 3)


@pytest.mark.parametrize("band", [None, 0.1])
def test_a_gradient_of_rounding_sets_no_weight(band):
    """Of a student that begins as a copy of its teacher: a weight of millions would destroy it."""
    loss = PKD(student_channels=[4], teacher_channels=[4], strides=[8], weight=2.0)
    share = {"kd_pkd": 0.3}
    found = weights_for({"pkd": loss}, [(4.0, {"kd_pkd": 1e-8})], share, band).shares["kd_pkd"]
    assert loss.weights[""] == found.after == found.before == 2.0
    assert found.wanted == found.measured == pytest.approx(2 * 1e-8 / 4)
    weights_for({"pkd": loss}, [(4.0, {"kd_pkd": 1e-5})], share)  # small, and meant
    assert loss.weights[""] == pytest.approx(0.3 * 4 / 1e-5)
