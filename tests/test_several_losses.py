"""A list of losses between two detectors: names, facts, sums, resuming."""

import copy

import pytest
import torch
from torch import nn

from global_kd import Distiller, GlobalKnowledgeLoss
from global_kd.losses import FGD, PKD, DistillLoss

from .detectors.detectors import detector, scenes
from .small_loss import small_loss
from .test_distiller import BOXES, IMAGES, Detector


class Wants(DistillLoss):
    """A loss that asks for facts and looks at them."""

    name = "wants"

    def __init__(self, needs=(), wishes=(), **common):
        self.needs, self.wishes = frozenset(needs), frozenset(wishes)
        self.seen = []
        super().__init__({"": 1.0}, **common)

    def terms(self, step):
        self.seen.append(step)
        return {"": 0 * step.student[0].sum()}


class Curious(Wants):
    name = "curious"


class Other(PKD):
    name = "other"


def both(**options):
    return [small_loss(4), PKD(**options)]


def distiller(losses, kind="faster_rcnn"):
    torch.manual_seed(0)
    student, teacher = detector(kind, 8), detector(kind, 12)
    return student, Distiller(student, teacher, losses)


def train(student, kd, steps, first=0):
    # At resuming, too: the optimizer keeps no state.
    optimizer = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=1e-3)
    history = []
    for step in range(first, first + steps):
        torch.manual_seed(step)  # torchvision samples proposals
        losses = student(*scenes(seed=step))
        terms = kd(*scenes(seed=step))
        history.append({name: float(x.detach()) for name, x in terms.items()})
        optimizer.zero_grad()
        sum([*losses.values(), *terms.values()]).backward()
        optimizer.step()
    return history


def test_terms_of_a_list_are_those_of_its_parts():
    together = train(*distiller(both()), steps=1)[0]
    apart = [train(*distiller(loss), steps=1)[0] for loss in both()]
    assert together == apart[0] | apart[1]
    assert list(together)[-1] == "kd_pkd"


def test_a_list_resumes_bit_for_bit():
    whole = train(*distiller(both()), steps=6)
    student, kd = distiller(both())
    assert train(student, kd, steps=3) == whole[:3]
    states = copy.deepcopy((student.state_dict(), kd.state_dict()))
    student, kd = distiller(both()[::-1])  # states go by name, not by place
    student.load_state_dict(states[0])
    kd.load_state_dict(states[1])
    assert train(student, kd, steps=3, first=3) == whole[3:]


def test_each_loss_gets_what_it_asked_for_and_nothing_else_is_computed():
    plain, curious = Wants(), Curious(needs={"images", "targets"}, wishes={"omega"})
    student, kd = distiller([plain, curious])
    kd._pair.teacher.soft_labels = None  # nobody asked
    train(student, kd, steps=1)
    assert plain.seen[0].images is None and plain.seen[0].omega is None
    images = curious.seen[0].images
    assert images.shape[1] == 3 and curious.seen[0].omega is None  # no prototypes in the list
    assert not kd._tap.paths.keys() & {"roi", "logits"}


def test_omega_comes_from_the_prototypes_in_the_list():
    robust = Wants(robust=True)
    student, kd = distiller([robust, small_loss(4)])  # the order does not matter
    train(student, kd, steps=3)
    omegas = [step.omega for step in robust.seen]
    assert torch.equal(omegas[0], torch.ones(3, 4))  # no prototypes yet
    assert omegas[2].shape == (3, 4) and (omegas[2] < 1).any()
    assert not omegas[2].requires_grad
    with pytest.raises(ValueError, match="Wants needs omega .* add a GlobalKnowledgeLoss"):
        distiller(Wants(robust=True))


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_a_loss_that_weighs_nothing_itself_weighs_for_others(kind):
    nothing = dict.fromkeys(("foreground", "background", "relation", "logits"), 0.0)
    robust, keeper = Wants(robust=True), small_loss(4, **nothing)
    student, kd = distiller([robust, keeper], kind)
    history = train(student, kd, steps=3)
    assert [*history[-1]] == ["kd_wants"] and keeper.step == 3 and keeper.bank.valid.any()
    assert (robust.seen[2].omega < 1).any()
    alone = small_loss(4, **nothing)  # nobody asks
    student, kd = distiller([Wants(), alone], kind)
    train(student, kd, steps=3)
    assert alone.step == 0 and not alone.bank.valid.any()


def test_a_fact_that_cannot_be_had_is_an_error_when_the_distiller_is_made():
    options = {"example_inputs": (IMAGES,)}
    with pytest.raises(
        ValueError,
        match=r"losses: Wants needs dense \(class logits of both .*\), but the student "
        r"\(Detector\) gives no dense. What this pair can give is enough for .*PKD",
    ):
        Distiller(Detector(4), Detector(9), Wants(needs={"dense"}), **options)
    wished = Wants(wishes={"dense"})
    student = Detector(4)
    kd = Distiller(student, Detector(9), wished, **options)
    student(IMAGES)
    assert list(kd(IMAGES, BOXES)) == ["kd_wants"] and wished.seen[0].dense is None


def test_the_loss_by_itself_is_to_be_had():
    _, kd = distiller(PKD())
    assert kd.loss is kd.losses["pkd"]
    _, kd = distiller([PKD(), small_loss(4)])
    assert kd.loss is kd.losses["global_knowledge"]
    _, kd = distiller([PKD(), Other()])
    with pytest.raises(ValueError, match="loss: expected one loss, but there are 2; .* pkd, other"):
        _ = kd.loss
    with pytest.raises(ValueError, match=r"expected one that keeps prototypes .* but got pkd"):
        kd.refresh([scenes()])


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        ([PKD(), PKD()], ValueError, "losses: expected one 'pkd', but got two"),
        ([], ValueError, "losses: expected at least one loss, but got none"),
        (PKD, TypeError, r"losses: expected a loss, but got its class; write PKD\(...\)"),
        (nn.MSELoss(), TypeError, "losses: expected a loss of global_kd, .* but got MSELoss"),
        ("pkd", TypeError, r"losses: expected a loss of global_kd, .* 'pkd'; write PKD\(...\)"),
    ],
)
def test_what_is_no_loss_is_named(losses, error, message):
    with pytest.raises(error, match=message):
        Distiller(Detector(4), Detector(9), losses, example_inputs=(IMAGES,))


def test_telemetry_of_all():
    student, kd = distiller(both())
    train(student, kd, steps=2)
    numbers = kd.telemetry(detection_loss=2.0)
    assert {"term/kd_pkd", "share/kd_pkd", "term/kd_foreground", "prototypes"} <= set(numbers)
    assert isinstance(kd.losses["global_knowledge"], GlobalKnowledgeLoss)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_a_list_beside_a_compiled_student(backend):
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        student, teacher = Detector(4), Detector(9)
        kd = Distiller(
            student, teacher, [small_loss(2), PKD(), FGD(robust=True)], example_inputs=(IMAGES,)
        )
        model = torch.compile(student, backend=backend) if compiled else student
        for loss in kd.losses.values():
            if compiled:
                loss.compile(backend=backend)
        optimizer = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=1e-3)
        for _ in range(4):
            own = sum(x.square().mean() for x in model(IMAGES))
            terms = kd(IMAGES, BOXES)
            optimizer.zero_grad()
            (own + sum(terms.values())).backward()
            optimizer.step()
        found.append({name: x.detach() for name, x in terms.items()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert {"kd_relation", "kd_pkd", "kd_fgd_foreground"} <= set(found[0])
