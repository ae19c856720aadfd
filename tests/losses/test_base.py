"""What every loss has, shown on small ones: weights, schedules, counting, facts, state."""

import copy

import pytest
import torch

from global_kd import GlobalKnowledgeLoss, Schedule, Targets
from global_kd.losses import PKD, DistillLoss, Levels
from global_kd.ops.dispatch import force
from tests.watch import Graphs

LEVELS = {"student_channels": [4, 4], "teacher_channels": [6, 4], "strides": [8, 16]}
TARGETS = Targets(
    torch.tensor([[0.0, 0, 24, 16], [16, 8, 48, 32]]), torch.tensor([0, 1]), torch.tensor([0, 1])
)


class Mean(DistillLoss):
    """Two parts a child could compute: the mean of the adapted maps, and the sum of the boxes."""

    name = "mean"

    def __init__(self, maps=None, boxes=None, **common):
        self.scale = 2.0  # an option, set before the constructor that may build
        usual = {"two-stage": {"maps": 3.0, "boxes": 0.5}, "one-stage": {"maps": 7.0}}
        super().__init__({"maps": maps, "boxes": boxes}, usual, **common)

    def make(self, levels):
        self.bias = torch.nn.Parameter(torch.full((len(levels.strides),), self.scale))

    def terms(self, step):
        maps = torch.stack([x.mean() for x in self.adapted(step)]) + self.bias
        total = step.targets.boxes.sum() if step.targets is not None else self.bias.sum() * 0
        return {"maps": maps.sum(), "boxes": total + 0 * maps.sum()}


def maps(seed=0):
    g = torch.Generator().manual_seed(seed)
    student = [torch.randn(2, 4, 4, 6, generator=g), torch.randn(2, 4, 2, 3, generator=g)]
    teacher = [torch.randn(2, 6, 4, 6, generator=g), torch.randn(2, 4, 2, 3, generator=g)]
    return student, teacher


def test_terms_carry_their_weights_and_names():
    loss = Mean(maps=2.0, boxes=3.0, **LEVELS)
    terms = loss(*maps(), TARGETS)
    assert list(terms) == ["kd_mean_maps", "kd_mean_boxes"]
    torch.testing.assert_close(terms["kd_mean_boxes"], 3 * TARGETS.boxes.sum())
    loss.calibrate({"boxes": 6.0})
    torch.testing.assert_close(loss(*maps(), TARGETS)["kd_mean_boxes"], 6 * TARGETS.boxes.sum())


@pytest.mark.parametrize(
    ("family", "weights"),
    [
        ("two-stage", {"maps": 3.0, "boxes": 0.5}),
        ("one-stage", {"maps": 7.0, "boxes": 1.0}),  # 1 where a paper names none
        ("query", {"maps": 7.0, "boxes": 1.0}),
        (None, {"maps": 7.0, "boxes": 1.0}),
    ],
)
def test_weights_left_out_are_those_of_the_family(family, weights):
    assert Mean(family=family, **LEVELS).weights == weights
    found = Mean()
    found.build(Levels((4,), (6,), (8.0,), family=family))
    assert found.weights == weights
    given = Mean(maps=0.25)
    given.build(Levels((4,), (6,), (8.0,), family=family))
    assert given.weights == weights | {"maps": 0.25}


def test_a_part_of_weight_0_is_left_out():
    assert list(Mean(maps=0, **LEVELS)(*maps(), TARGETS)) == ["kd_mean_boxes"]
    nothing = Mean(maps=0, boxes=0, **LEVELS)
    assert not nothing.active and nothing(*maps(), TARGETS) == {}


def test_only_the_levels_asked_for():
    loss = PKD(levels=[16], **LEVELS)
    student, teacher = maps()
    assert loss.strides == (16,) and len(loss.adapters) == 1
    terms = loss([10 * student[0], student[1]], [teacher[0] - 3, teacher[1]])
    torch.testing.assert_close(terms, loss(student, teacher))
    with pytest.raises(ValueError, match=r"levels: expected strides among .*8.*16.*got \[32.0\]"):
        PKD(levels=[32], **LEVELS)


def test_schedule_and_warm_up_multiply():
    loss = Mean(schedule=Schedule("linear"), warmup_steps=4, total_steps=8, **LEVELS)
    plain = Mean(**LEVELS)
    for step in range(8):
        factor = (1 - step / 8) * min(1, step / 4)
        for name, value in plain(*maps(), TARGETS).items():
            torch.testing.assert_close(loss(*maps(), TARGETS)[name], factor * value)
            loss.step = step
        loss.step = step + 1


def test_eval_mode_counts_no_step():
    loss = Mean(**LEVELS).eval()
    loss(*maps(), TARGETS)
    assert loss.step == 0
    loss.train()(*maps(), TARGETS)
    assert loss.step == 1


def test_state_brings_back_step_and_calibrated_weights_only():
    loss = Mean(maps=2.0, **LEVELS)
    loss(*maps(), TARGETS)
    loss.calibrate({"maps": 0.125})
    state = loss.state_dict()
    assert all(isinstance(x, torch.Tensor) for x in state.values())
    for other in (Mean(maps=5.0, boxes=9.0, **LEVELS), Mean(maps=5.0, boxes=9.0)):
        if not other.built:  # as where a checkpoint is read before the detectors are known
            other.set_extra_state(state["_extra_state"])
            other.build(loss._levels)
        else:
            other.load_state_dict(state)
        assert other.step == 1
        assert other.weights == {"maps": 0.125, "boxes": 9.0}


def test_a_copy_has_a_life_of_its_own():
    loss = Mean(**LEVELS)
    twin = copy.deepcopy(loss)
    twin.calibrate({"maps": 0.0})
    twin(*maps(), TARGETS)
    assert loss.step == 0 and loss.weights["maps"] == 7.0


def test_weights_of_cells_are_1_outside_boxes_and_the_largest_inside():
    loss = Mean(robust=True, **LEVELS)
    assert {"omega", "targets"} <= loss.needs and not Mean(**LEVELS).needs
    omega = torch.tensor([[0.25, 0.5], [0.0, 1.0]])
    step = _step(loss, omega=omega)
    fine = torch.ones(2, 4, 6)
    fine[0, 0:2, 0:3] = 0.25
    fine[1, 1:4, 2:6] = 0.5
    assert torch.equal(loss.cell_weights(step, 0), fine)
    coarse = torch.ones(2, 2, 3)
    coarse[0, 0:1, 0:2] = 0.0
    assert torch.equal(loss.cell_weights(step, 1), coarse)
    plain = Mean(**LEVELS)
    assert plain.cell_weights(_step(plain), 0) is None and plain.box_weights(_step(plain)) is None


def _step(loss, **facts):
    from global_kd.step import Step

    student, teacher = maps()
    return Step(student, teacher, loss.strides, TARGETS, **facts)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Mean(maps=-1.0), ValueError, "maps: expected a finite number >= 0, but got -1.0"),
        (lambda: Mean(total_steps="100"), TypeError, "total_steps: expected a whole number"),
        (lambda: Mean(total_steps=0), ValueError, "total_steps: expected a number > 0"),
        (lambda: Mean(adapter="linear"), ValueError, "adapter: expected one of 'conv3x3'"),
        (lambda: Mean(schedule="linear"), TypeError, "schedule: expected a Schedule"),
        (
            lambda: Mean(schedule={"maps": Schedule()}),
            ValueError,
            "schedule: expected one of 'kd_mean_maps', 'kd_mean_boxes', but got 'maps'",
        ),
        (lambda: Mean(strides=[8]), ValueError, "expected all three or none"),
        (lambda: Mean()(*maps()), RuntimeError, "Mean: levels and channels are unknown"),
        (
            lambda: Mean(**LEVELS).build(Levels((4,), (6,), (8.0,))),
            ValueError,
            "build: expected the levels the loss was built for",
        ),
        (
            lambda: Mean(robust=True, **LEVELS)(*maps(), TARGETS),
            ValueError,
            "omega: Mean expected robust weights of the boxes: .* but got None",
        ),
        (lambda: Levels((4, 4), (6,), (8.0, 16.0)), ValueError, "one entry per level each"),
        (lambda: Levels((4, 4), (6, 6), (16.0, 8.0)), ValueError, "strides: expected increasing"),
    ],
)
def test_what_does_not_fit_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_soft_labels_without_boxes_of_their_own_do_not_need_maps():
    loss = GlobalKnowledgeLoss(3, foreground=0, background=0, logits=1)
    loss.build(Levels((4,), (6,), (8.0,)))
    assert not loss.uses_maps and loss.uses_prototypes and not len(loss.adapters)


@pytest.mark.parametrize("kind", ["PKD", "GlobalKnowledgeLoss"])
def test_a_compiled_loss_is_compiled_once(kind):
    """Of `torch.compile(loss)`: the counting asks for no new program, and loses no step."""

    def make():
        if kind == "PKD":
            return PKD(**LEVELS)
        schedule = {"schedule": Schedule("linear"), "total_steps": 50, "refresh_every": 3}
        return GlobalKnowledgeLoss(3, relation=1, min_side=0, **schedule, **LEVELS)

    plain, loss = make(), make()
    torch._dynamo.reset()
    backend = Graphs()
    with force("definition"):
        compiled = torch.compile(loss, backend=backend, dynamic=False)
        graphs = []
        for seed in range(10):
            found, expected = compiled(*maps(seed), TARGETS), plain(*maps(seed), TARGETS)
            torch.testing.assert_close(found, expected)
            graphs.append(backend.count)
    assert graphs[0] > 0 and graphs[-1] == graphs[4]  # whatever the first refresh brought
    assert graphs[4] <= graphs[0] + 1
    assert loss.step == 10 and loss.telemetry() == pytest.approx(plain.telemetry())


def test_the_mathematics_compile_and_the_counting_does_not():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    loss = PKD(**LEVELS)
    expected = loss(*maps())
    loss.compile(backend="eager", fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(loss(*maps()), expected)
    assert loss.step == 4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    twin = copy.deepcopy(loss)  # runs on parameters of its own
    with torch.no_grad():
        twin.adapters[0].weight.neg_()
    assert not torch.equal(twin(*maps())["kd_pkd"], expected["kd_pkd"])
