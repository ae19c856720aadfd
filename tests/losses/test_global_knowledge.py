"""The whole method on plain tensors: bookkeeping, schedule, resume."""

import io
import math
import warnings

import pytest
import torch

from global_kd import GlobalKnowledgeLoss, Schedule, Targets
from global_kd.functional import logit_loss
from global_kd.instances import assign_levels
from global_kd.losses import Levels
from global_kd.step import Positives

from ..watch import NoHostSync

CLASSES = 3


def soft_labels(rows=4, classes=3):
    box = torch.zeros(rows, dtype=torch.int64)
    logits = torch.randn(2, rows, classes)
    return Positives(box, student=logits[0], teacher=logits[1])


def make(**options):
    defaults = {
        "student_channels": [4, 6],
        "teacher_channels": [5, 5],
        "strides": [4, 8],
        "total_steps": 10,
        "refresh_every": 3,
        "min_side": 5,
        "num_prototypes": 2,
        "relation": 5,
    }
    return GlobalKnowledgeLoss(CLASSES, **(defaults | options))


def batch(seed):
    g = torch.Generator().manual_seed(seed)
    student = [torch.randn(2, c, 48 // s, 48 // s, generator=g) for c, s in ((4, 4), (6, 8))]
    teacher = [torch.randn(2, 5, 48 // s, 48 // s, generator=g) for s in (4, 8)]
    corner = torch.rand(6, 2, generator=g) * 20
    boxes = torch.cat([corner, corner + 8 + 20 * torch.rand(6, 2, generator=g)], dim=1)
    labels = torch.randint(0, CLASSES, (6,), generator=g)
    return student, teacher, Targets(boxes, labels, torch.randint(0, 2, (6,), generator=g))


def test_prototypes_come_from_the_stream_every_refresh():
    loss = make()
    for step in range(7):
        terms = loss(*batch(step))
        assert loss.step == step + 1
        filled = bool(loss.bank.valid.any())
        assert filled == (step >= 3)
        assert (terms["kd_relation"] > 0) == filled
        # three steps of six boxes, forgotten at each refresh
        assert len(loss.generator) == 6 * (step % 3 + 1)


def test_evaluation_and_weighing_change_nothing():
    loss = make()
    for step in range(4):
        loss(*batch(step))
    before = {k: str(v) for k, v in loss.state_dict().items()}
    loss.eval()
    loss(*batch(5))
    loss.weigh(*batch(6))
    assert {k: str(v) for k, v in loss.state_dict().items()} == before


def test_paper_schedule_decays_imitation_and_relation_but_not_soft_labels():
    logits = {"positives": soft_labels()}
    loss = make(refresh_every=None)
    plain = make(refresh_every=None, schedule=Schedule("constant"))
    for step in range(10):
        terms, full = (x(*batch(0), **logits) for x in (loss, plain))
        factor = 1 - step / 10
        for name in ("kd_foreground", "kd_background"):
            torch.testing.assert_close(terms[name], factor * full[name])
        torch.testing.assert_close(terms["kd_logits"], full["kd_logits"])


def test_without_total_steps_nothing_decays_and_it_says_so_once():
    loss = make(total_steps=None)
    with pytest.warns(UserWarning, match="total_steps is not given"):
        first = loss(*batch(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(loss(*batch(0))["kd_foreground"], first["kd_foreground"])
        make(total_steps=None, schedule=Schedule("constant"))(*batch(0))


def test_instances_feed_the_prototypes_and_targets_the_terms():
    loss, other = make(), make()
    student, teacher, targets = batch(0)
    instances = batch(1)[2]
    proposals = Positives(torch.zeros(len(targets), dtype=torch.int64), targets)
    a = loss(student, teacher, instances, positives=proposals)
    b = other(student, teacher, targets)
    assert all(torch.equal(a[k], b[k]) for k in a)
    other.generator = make().generator
    other(student, teacher, instances)
    len(loss.generator), len(other.generator)  # cuts both
    rows = [g.generator._sample.parts[0].student for g in (loss, other)]
    torch.testing.assert_close(*rows)


def test_resume_is_bit_identical_at_any_step():
    """A run that was saved and loaded at step k, with its optimizer, ends as one that was not."""

    def run(loss, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            sum(loss(*batch(step)).values()).backward()
            optimizer.step()
        return loss

    def start():
        loss = make()
        return loss, torch.optim.Adam(loss.parameters(), lr=1e-2)

    whole = run(*start(), range(9))
    for cut in range(9):
        loss, optimizer = start()
        run(loss, optimizer, range(cut))
        buffer = io.BytesIO()
        torch.save([loss.state_dict(), optimizer.state_dict()], buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        loss, optimizer = start()
        loss.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        run(loss, optimizer, range(cut, 9))
        for (name, a), b in zip(
            whole.state_dict().items(), loss.state_dict().values(), strict=True
        ):
            same = torch.equal(a, b) if isinstance(a, torch.Tensor) else str(a) == str(b)
            assert same, f"{name} after a cut at {cut}"


def test_all_weights_zero_is_no_loss_and_no_parameters():
    loss = make(foreground=0, background=0, relation=0, logits=0)
    assert not loss.active
    assert loss(*batch(0)) == {}
    assert list(loss.parameters()) == []


def test_class_lists_with_gaps_and_background_only_batches():
    loss = make()
    none = torch.zeros(0, dtype=torch.int64)
    student, teacher, _ = batch(0)
    for step in range(7):
        targets = Targets(torch.zeros(0, 4), none, none)
        if step in (1, 2):  # only class 2 is ever seen
            box = torch.tensor([[0.0, 0.0, 20.0, 20.0 + 4 * step]])
            targets = Targets(box, torch.tensor([2]), torch.tensor([0]))
        terms = loss(student, teacher, targets)
        assert all(x.isfinite() for x in terms.values())
    assert loss.bank.counts().tolist() == [[0, 0, 2], [0, 0, 2]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_maps_with_and_without_autocast(dtype):
    reference = make()(*batch(0))
    student, teacher, targets = batch(0)
    student, teacher = ([x.to(dtype) for x in maps] for maps in (student, teacher))
    with torch.autocast("cpu", dtype=dtype):
        inside = make()(student, teacher, targets)
    outside = make()(student, teacher, targets)
    for terms in (inside, outside):
        for name, value in terms.items():
            assert value.dtype == torch.float32
            assert value.item() == pytest.approx(reference[name].item(), rel=0.02)


def test_telemetry_tells_the_last_terms_and_the_mean_omega_since_it_was_read():
    loss = make(max_instances=1)  # prototypes that do not fit everybody
    for step in range(3):
        loss(*batch(step))
    assert loss.telemetry()["step"] == 3
    omegas, labels = [], []
    for step in range(4, 6):
        if step == 4:
            loss.refresh()
        omegas.append(loss.weigh(*batch(step)))
        labels.append(batch(step)[2].labels)
        terms = loss(*batch(step))
    numbers = loss.telemetry(detection_loss=torch.tensor([2.0]))
    assert all(type(x) is float for x in numbers.values())
    assert numbers["step"] == 5
    factor = 1 - 4 / 10
    for name, x in terms.items():
        assert numbers[f"term/{name}"] == x.item()
        assert numbers[f"share/{name}"] == x.item() / 2
        assert numbers[f"schedule/{name}"] == factor
    omega, label = torch.cat(omegas, dim=1), torch.cat(labels)
    assert (omega < 0.99).any()
    for level, stride in enumerate((4, 8)):
        assert numbers[f"omega/stride_{stride}"] == pytest.approx(omega[level].mean().item())
    for k in range(CLASSES):
        assert numbers[f"omega/class_{k}"] == pytest.approx(omega[:, label == k].mean().item())
    assert numbers["prototypes"] == 2 * CLASSES
    assert numbers["sample"] == len(loss.generator)
    again = loss.telemetry()
    assert {k: v for k, v in numbers.items() if not k.startswith(("omega", "share"))} == again


def test_telemetry_names_only_what_there_was():
    loss = make()
    assert loss.telemetry() == {"step": 0, "prototypes": 0, "sample": 0}
    student, teacher, targets = batch(0)
    loss(student, teacher, Targets(targets.boxes[:1], torch.tensor([2]), torch.tensor([0])))
    found = [name for name in loss.telemetry(0.0) if name.startswith("omega")]
    assert found == ["omega/stride_4", "omega/stride_8", "omega/class_2"]
    assert math.isnan(loss.telemetry(0.0)["share/kd_background"])
    loss.eval()
    loss(*batch(1))
    assert loss.telemetry()["step"] == 1
    assert not any(name.startswith("omega") for name in loss.telemetry())
    plain = make(relation=0, robust=False, logits=0)
    plain(*batch(0))  # no term asks for omega
    assert not any(name.startswith("omega") for name in plain.telemetry())


def test_reading_telemetry_changes_nothing():
    read, unread = make(), make()
    for step in range(8):
        a, b = read(*batch(step)), unread(*batch(step))
        read.telemetry(1.0)
        assert {k: v.item() for k, v in a.items()} == {k: v.item() for k, v in b.items()}
    assert str(read.state_dict()) == str(unread.state_dict())
    assert not any("_omega" in name for name in read.state_dict())


def test_telemetry_leaves_out_overflowed_boxes_and_labels_that_are_none():
    loss = make()
    omega = torch.tensor([[0.5, torch.nan, 0.25, 1.0], [0.75, torch.nan, 0.25, 1.0]])
    with NoHostSync():  # an accelerator is asked nothing
        loss._tally(omega, torch.arange(4) - 1)  # a label of -1, an omega of NaN
    loss._tally(omega, torch.tensor([1, 1, CLASSES, CLASSES + 7]))
    numbers = {k: v for k, v in loss.telemetry().items() if k.startswith("omega")}
    assert numbers == {
        "omega/stride_4": pytest.approx((0.25 + 1.0 + 0.5) / 3),
        "omega/stride_8": pytest.approx((0.25 + 1.0 + 0.75) / 3),
        "omega/class_1": pytest.approx((0.25 + 0.25 + 0.5 + 0.75) / 4),
        "omega/class_2": 1.0,
    }


def test_telemetry_does_not_hold_the_graph():
    loss = make()
    student, teacher, targets = batch(0)
    loss([x.requires_grad_() for x in student], teacher, targets)
    assert loss._last and not any(x.requires_grad for x, _ in loss._last.values())


def test_what_does_not_fit_is_named():
    with pytest.raises(RuntimeError, match="call build"):
        GlobalKnowledgeLoss(3)(*batch(0))
    with pytest.raises(ValueError, match="expected all three or none"):
        GlobalKnowledgeLoss(3, strides=[4])
    with pytest.raises(ValueError, match="levels the loss was built for"):
        make().build(Levels((4, 6), (5, 7), (4, 8)))
    with pytest.raises(ValueError, match="schedule: expected one of .* but got 'kd_box'"):
        make(schedule={"kd_box": Schedule()})
    with pytest.raises(TypeError, match="relations"):
        GlobalKnowledgeLoss(3, relations=1.0)
    student, teacher, targets = batch(0)
    wrong = Targets(targets.boxes, targets.labels + 3, targets.image_index)
    with pytest.raises(ValueError, match="labels: expected values below 3"):
        make()(student, teacher, wrong)
    wrong = Targets(targets.boxes, targets.labels, targets.image_index + 1)
    with pytest.raises(ValueError, match="image_index: expected values below 2"):
        make()(student, teacher, wrong)
    with pytest.raises(TypeError, match="detection_loss: expected a scalar, but got dict"):
        make().telemetry({"loss_classifier": torch.tensor(1.0)})
    with pytest.raises(
        ValueError, match=r"detection_loss: expected a scalar, but got shape \(2,\)"
    ):
        make().telemetry(torch.ones(2))
    with pytest.raises(RuntimeError, match="call build"):
        GlobalKnowledgeLoss(3).telemetry()
    with pytest.raises(ValueError, match="made for other levels, classes or channels"):
        make().load_state_dict(make(num_prototypes=5).state_dict())


def test_training_beyond_total_steps_is_told_once():
    loss = make(total_steps=2, refresh_every=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(*batch(0)), loss(*batch(1))
        with pytest.raises(UserWarning, match="after total_steps=2 .* kd_foreground, kd_back.* 0"):
            loss(*batch(2))
        make(total_steps=1, refresh_every=None, schedule=Schedule("constant"))(*batch(0))
    with pytest.warns(UserWarning) as told:
        for step in range(3):
            loss(*batch(step))
    assert len(told) == 1


@pytest.mark.parametrize("schedule", [Schedule("constant", warmup=0.1), Schedule(start=0.5)])
def test_a_schedule_that_begins_at_zero_needs_total_steps(schedule):
    loss = make(total_steps=None, schedule={"kd_relation": schedule})
    with pytest.raises(ValueError, match="total_steps: .* of kd_relation begins at 0"):
        loss(*batch(0))


def test_terms_without_a_weight_have_no_say_about_total_steps():
    weights = {"foreground": 0, "background": 0, "relation": 0, "logits": 1}
    logits = {"positives": soft_labels()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(total_steps=None, schedule={"kd_relation": Schedule(start=0.5)}, **weights)(
            *batch(0), **logits
        )


@pytest.mark.parametrize("schedule", ["cosine", {"kd_logits": "linear"}])
def test_a_schedule_is_no_word(schedule):
    with pytest.raises(TypeError, match="schedule: expected a Schedule"):
        make(schedule=schedule)


def test_a_refresh_that_finds_only_small_instances_says_so():
    loss = make(min_side=40)
    with pytest.warns(UserWarning, match="none is larger than min_side=40 pixels"):
        for step in range(4):
            loss(*batch(step))


LEVELS = {"student_channels": [4], "teacher_channels": [4]}


@pytest.mark.parametrize(("stride", "side"), [(4, 15.0), (8, 30.0), (16, 60.0)])
def test_the_smallest_side_follows_the_finest_stride(stride, side):
    loss = GlobalKnowledgeLoss(3, strides=[stride], total_steps=9000, **LEVELS)
    assert loss.generator.min_side == side and isinstance(loss.generator.min_side, float)
    given = GlobalKnowledgeLoss(3, strides=[stride], total_steps=9000, min_side=30, **LEVELS)
    assert given.generator.min_side == 30


def seen_once(loss, sides, labels):
    sides = torch.tensor(sides)
    boxes = torch.stack([0 * sides, 0 * sides, sides, sides + 5], dim=1)
    maps = [torch.rand(1, 4, 12, 12, generator=torch.Generator().manual_seed(0))]
    loss(maps, maps, Targets(boxes, torch.tensor(labels), torch.zeros(len(labels)).long()))


def test_the_first_refresh_names_classes_without_prototypes_and_why():
    names = ["none", "platelet", "cell", "white"]
    loss = GlobalKnowledgeLoss(
        4,
        strides=[8],
        total_steps=9000,
        refresh_every=1,
        class_names=names,
        schedule=Schedule("constant"),
        **LEVELS,
    )
    seen_once(loss, [12.0, 25.0, 28.0, 60.0], [1, 1, 2, 3])
    with pytest.warns(UserWarning) as told:
        seen_once(loss, [12.0, 25.0, 60.0], [1, 1, 3])
    (text,) = (str(x.message) for x in told)
    assert "no prototypes of 2 classes" in text and "1 of 4 classes were not seen" in text
    assert "platelet (2 seen, the largest 25 pixels), cell (1 seen, the largest 28" in text
    assert "larger than min_side=30 pixels both ways" in text and "white" not in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        seen_once(loss, [12.0, 25.0, 60.0], [1, 1, 3])
        seen_once(loss, [12.0, 25.0, 60.0], [1, 1, 3])


def test_classes_that_never_came_are_no_reason_for_a_warning():
    """As the background of torchvision."""
    loss = GlobalKnowledgeLoss(
        9, strides=[8], total_steps=9000, refresh_every=1, schedule=Schedule("constant"), **LEVELS
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            seen_once(loss, [40.0], [3])


@pytest.mark.parametrize(("every", "steps", "told"), [(9, 9, True), (10, 9, True), (8, 9, False)])
def test_a_refresh_that_never_comes_is_told_at_construction(every, steps, told):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        GlobalKnowledgeLoss(3, refresh_every=every, total_steps=steps)
        GlobalKnowledgeLoss(3, refresh_every=None, total_steps=steps)
        off = {"robust": ("relation",)}
        GlobalKnowledgeLoss(3, refresh_every=every, total_steps=steps, **off)
    texts = [str(x.message) for x in found if "refresh_every" in str(x.message)]
    assert len(texts) == told
    assert not told or "call kd.refresh(loader)" in texts[0]


def test_a_soft_label_takes_the_weight_of_its_own_proposal():
    """Logit rows are some of the proposals, in an order of their own."""
    loss = make(boxes="proposals")
    for step in range(4):
        loss(*batch(step))
    student, teacher, proposals = batch(5)
    rows, box = torch.tensor([4, 0, 3]), torch.tensor([1, 1, 0, 0, 1, 0])
    mine, theirs = torch.randn(2, 3, CLASSES, generator=torch.Generator().manual_seed(0))
    positives = Positives(box, proposals, mine, theirs, rows)
    omega = loss.weigh(student, teacher, proposals)
    level = assign_levels(proposals.boxes, loss.strides)
    weights = omega.gather(0, level[None])[0]
    assert len(weights[rows].unique()) == 3
    terms = loss.eval()(student, teacher, batch(6)[2], positives=positives)
    torch.testing.assert_close(terms["kd_logits"], 5 * logit_loss(mine, theirs, weights[rows]))
