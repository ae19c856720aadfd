"""RDM: composition of the functional core, each switch, each weight."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from global_kd import PrototypeBank, RobustDistillLoss, Targets
from global_kd.functional import (
    imitation_loss,
    logit_loss,
    pool_boxes,
    relation_loss,
    robust_weights,
)
from global_kd.instances import assign_levels
from global_kd.losses import LabelOptions, RelationOptions

pytestmark = pytest.mark.usefixtures("every_form")

STRIDES = (4.0, 8.0)
CS, CT, CLASSES = 3, 5, 4


def all_terms(**options):
    """The relation term is off by default."""
    return RobustDistillLoss(STRIDES, **({"relation": 5.0} | options))


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)

    def maps(channels):
        return [
            torch.randn(2, channels, 96 // int(s), 96 // int(s), generator=g, dtype=torch.float64)
            for s in STRIDES
        ]

    student = [x.requires_grad_() for x in maps(CS)]
    adapted = [x.requires_grad_() for x in maps(CT)]
    bank = PrototypeBank(2, CLASSES, 3, CS, CT)
    for name in ("student", "teacher"):
        getattr(bank, name).copy_(torch.randn(getattr(bank, name).shape, generator=g))
    bank.valid.copy_(torch.rand(bank.valid.shape, generator=g) > 0.3)
    bank.valid[:, 3] = False  # a class without prototypes
    boxes = [[5, 5, 30, 40], [10, 0, 90, 90], [40, 41, 50, 52], [0, 0, 96, 96], [3, 60, 70, 95.5]]
    targets = Targets(
        torch.tensor(boxes, dtype=torch.float64),
        torch.tensor([0, 1, 3, 2, 1]),
        torch.tensor([0, 0, 1, 1, 1]),
    )
    logits = torch.randn(2, 7, CLASSES, generator=g, dtype=torch.float64)
    return {
        "student": student,
        "teacher": maps(CT),
        "targets": targets,
        "bank": bank.double(),
        "adapted": adapted,
        "student_logits": logits[0].clone().requires_grad_(),
        "teacher_logits": logits[1],
        "logit_box": torch.tensor([0, 1, 1, 2, 4, 3, 0]),
    }


def pooled(batch, side, level):
    t = batch["targets"]
    return pool_boxes(batch[side][level], t.boxes, t.image_index, STRIDES[level])


def omegas(batch):
    bank, targets = batch["bank"], batch["targets"]
    result = []
    for level in range(2):
        g_s, g_t, labels = (x[level] for x in bank.flat())
        s, t = pooled(batch, "student", level), pooled(batch, "teacher", level)
        result.append(robust_weights(s, t, g_s, g_t, labels, targets.labels))
    return torch.stack(result)


@pytest.mark.parametrize("robust", [True, False])
@pytest.mark.parametrize("assigned", [True, False])
def test_terms_are_the_functional_core_per_level(batch, robust, assigned):
    weights = {"foreground": 0.7, "background": 1.3, "relation": 2.0, "logits": 0.5}
    loss = RobustDistillLoss(
        STRIDES,
        **weights,
        robust=robust,
        levels="assigned" if assigned else "all",
        finest_scale=24.0,
        standardize=False,
    )
    terms = loss(**batch)
    targets, omega = batch["targets"], omegas(batch)
    level_of = assign_levels(targets.boxes, STRIDES, finest_scale=24.0)
    assert set(level_of.tolist()) == {0, 1}  # both levels have boxes of their own
    fg, bg, relation = [], [], []
    for level, stride in enumerate(STRIDES):
        here = level_of == level if assigned else torch.ones(5, dtype=torch.bool)
        f, b = imitation_loss(
            batch["adapted"][level],
            batch["teacher"][level],
            targets.boxes[here],
            targets.image_index[here],
            stride,
            omega[level][here] if robust else None,
            foreground=1.0,
            background=1.0,
        )
        g_s, g_t, labels = (x[level] for x in batch["bank"].flat())
        filled = labels >= 0
        relation.append(
            relation_loss(
                pooled(batch, "student", level),
                pooled(batch, "teacher", level),
                g_s[filled],
                g_t[filled],
                omega[level] if robust else None,
            )
        )
        fg.append(f)
        bg.append(b)
    row_weights = omega[level_of, torch.arange(5)][batch["logit_box"]] if robust else None
    soft = logit_loss(batch["student_logits"], batch["teacher_logits"], row_weights)
    expected = {
        "kd_foreground": 0.7 * sum(fg) / 2,
        "kd_background": 1.3 * sum(bg) / 2,
        "kd_relation": 2.0 * sum(relation) / 2,
        "kd_logits": 0.5 * soft,
    }
    assert set(terms) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)


@pytest.mark.parametrize(
    ("switch", "changes"),
    [
        ("imitation", {"kd_foreground"}),
        ("relation", {"kd_relation"}),
        ("logits", {"kd_logits"}),
    ],
)
def test_each_use_of_omega_is_a_switch_of_its_own(batch, switch, changes):
    on, off = all_terms(), all_terms(robust={"imitation", "relation", "logits"} - {switch})
    a, b = on(**batch), off(**batch)
    assert {k for k in a if not torch.equal(a[k], b[k])} == changes


@pytest.mark.parametrize("term", ["foreground", "background", "relation", "logits"])
def test_a_weight_of_zero_leaves_the_term_out_and_the_others_alone(batch, term):
    full, without = all_terms()(**batch), all_terms(**{term: 0})
    rest = without(**batch)
    assert set(full) - set(rest) == {f"kd_{term}"}
    assert all(torch.equal(full[k], rest[k]) for k in rest)


def test_gradients_go_to_the_student_alone(batch):
    for x in batch["teacher"]:
        x.requires_grad_()
    batch["teacher_logits"].requires_grad_()
    terms = all_terms()(**batch)
    sum(terms.values()).backward()
    assert all(x.grad.abs().sum() > 0 for x in batch["adapted"])  # imitation
    assert all(x.grad.abs().sum() > 0 for x in batch["student"])  # relation
    assert batch["student_logits"].grad.abs().sum() > 0
    assert all(x.grad is None for x in [*batch["teacher"], batch["teacher_logits"]])


def test_standardize_makes_the_imitation_free_of_the_teachers_scale(batch):
    loss = RobustDistillLoss(STRIDES, standardize=True, robust=False)
    terms = loss(**batch)
    scaled = dict(batch)
    scaled["teacher"] = [10 * x for x in batch["teacher"]]
    scaled["adapted"] = [10 * x for x in batch["adapted"]]
    for name in ("kd_foreground", "kd_background"):
        torch.testing.assert_close(loss(**scaled)[name], terms[name])
    constant = dict(batch, teacher=[torch.ones_like(x) for x in batch["teacher"]])
    assert all(x.isfinite() for x in loss(**constant).values())


def test_own_class_counts_only_the_prototypes_of_the_instances_class(batch):
    loss = RobustDistillLoss(
        STRIDES, relation=1.0, relation_options=RelationOptions(own_class=True), robust=False
    )
    value = loss(**batch)["kd_relation"]
    expected = []
    for level in range(2):
        g_s, g_t, labels = (x[level] for x in batch["bank"].flat())
        s, t = pooled(batch, "student", level), pooled(batch, "teacher", level)
        pairs = []
        for n, label in enumerate(batch["targets"].labels):
            for p in (labels == label).nonzero()[:, 0]:
                q_s = torch.cosine_similarity(s[n], g_s[p], dim=0)
                q_t = torch.cosine_similarity(t[n], g_t[p], dim=0)
                gap = (q_s - q_t).abs()
                pairs.append(gap**2 / 2 if gap < 1 else gap - 0.5)
        expected.append(torch.stack(pairs).mean())
    torch.testing.assert_close(value, torch.stack(expected).mean())


def test_centred_cosines_do_not_see_a_common_offset(batch):
    loss = RobustDistillLoss(STRIDES, relation=1.0, relation_options=RelationOptions(center=True))
    terms = loss(**batch)
    moved = dict(batch, bank=copy.deepcopy(batch["bank"]))
    moved["student"] = [x + 5 for x in batch["student"]]
    moved["bank"].student += 5
    for name in ("kd_relation", "kd_foreground", "kd_logits"):  # omega too
        torch.testing.assert_close(loss(**moved)[name], terms[name])


def test_an_empty_bank_means_full_trust_and_no_relation(batch):
    empty = dict(batch, bank=PrototypeBank(2, CLASSES, 3, CS, CT).double())
    terms = all_terms()(**empty)
    plain = all_terms(robust=False)(**empty)
    assert terms["kd_relation"] == 0
    terms["kd_relation"].backward()
    for name in terms:
        torch.testing.assert_close(terms[name], plain[name])


def test_a_batch_without_boxes_is_a_zero_that_back_propagates(batch):
    none = torch.zeros(0, dtype=torch.int64)
    batch |= {
        "targets": Targets(torch.zeros(0, 4, dtype=torch.float64), none, none),
        "student_logits": batch["student_logits"][:0],
        "teacher_logits": batch["teacher_logits"][:0],
        "logit_box": none,
    }
    terms = all_terms()(**batch)
    assert {k: v.item() for k, v in terms.items() if k != "kd_background"} == {
        "kd_foreground": 0,
        "kd_relation": 0,
        "kd_logits": 0,
    }
    sum(terms.values()).backward()
    assert all(x.grad.isfinite().all() for x in [*batch["student"], *batch["adapted"]])


def test_the_same_detector_on_both_sides_loses_nothing(batch):
    twin = [x.detach().clone().requires_grad_() for x in batch["teacher"]]
    bank = copy.deepcopy(batch["bank"])
    bank.student = bank.teacher.clone()
    loss = all_terms()
    logits = batch["teacher_logits"].clone().requires_grad_()
    terms = loss(
        twin,
        batch["teacher"],
        batch["targets"],
        bank,
        student_logits=logits,
        teacher_logits=batch["teacher_logits"],
    )
    sum(terms.values()).backward()
    assert all(abs(v.item()) < 1e-12 for v in terms.values())
    assert all(x.grad.isfinite().all() for x in [*twin, logits])
    assert torch.equal(loss.weigh(twin, batch["teacher"], batch["targets"], bank), torch.ones(2, 5))


def test_whole_graph_compiles_for_any_number_of_boxes(batch):
    torch._dynamo.reset()
    loss = all_terms()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    targets = batch["targets"]
    compilations = []
    for count in (9, 11, 13, 8, 17, 21):  # no other dimension has one of these sizes
        index = torch.arange(count) % 5
        some = Targets(targets.boxes[index], targets.labels[index], targets.image_index[index])
        one = dict(batch, targets=some)
        for name, value in compiled(**one).items():
            torch.testing.assert_close(value, loss(**one)[name])
        compilations.append(counter.frame_count)
    # The first size is compiled as it is, the second makes the dimension dynamic, and that is all.
    assert compilations[1:] == [2] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relation": -1}, "relation: expected a finite number >= 0, but got -1"),
        ({"foreground": float("nan")}, "foreground: expected"),
        ({"levels": "fgfi"}, "levels: expected one of"),
        ({"robust": ["boxes"]}, "robust: expected one of 'imitation', 'relation', 'logits', but"),
        ({"robust": "logits"}, "robust: expected True, False or some of"),
        ({"label_options": {"temperature": 2}}, "label_options: expected LabelOptions"),
        ({"relation_options": None}, "relation_options: expected RelationOptions"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        RobustDistillLoss(STRIDES, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: LabelOptions(activation="relu"),
            "activation: expected one of 'softmax', 'sigmoid', but got 'relu'",
        ),
        (lambda: LabelOptions(class_reduction="max"), "class_reduction: expected one of 'mean'"),
        (lambda: LabelOptions(temperature=0), "temperature: expected a number > 0"),
        (lambda: RelationOptions(beta=0.0), "beta: expected a number > 0"),
    ],
)
def test_bad_groups_of_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_options_reach_their_terms(batch):
    """Each of them changes its term alone."""
    plain = all_terms()(**batch)
    for options, changes in (
        ({"label_options": LabelOptions(temperature=3.0)}, {"kd_logits"}),
        ({"label_options": LabelOptions(activation="sigmoid")}, {"kd_logits"}),
        ({"label_options": LabelOptions(class_reduction="sum")}, {"kd_logits"}),
        ({"relation_options": RelationOptions(beta=0.01)}, {"kd_relation"}),
        ({"relation_options": RelationOptions(own_class=True)}, {"kd_relation"}),
    ):
        terms = all_terms(**options)(**batch)
        assert {k for k in plain if not torch.equal(plain[k], terms[k])} == changes, options


def test_bad_levels_are_named(batch):
    loss = all_terms()
    with pytest.raises(ValueError, match=r"student: expected 2 levels .* but got 1"):
        loss(**dict(batch, student=batch["student"][:1]))
    with pytest.raises(ValueError, match="equal batch, height and width"):
        loss(**dict(batch, teacher=batch["teacher"][::-1]))
    with pytest.raises(ValueError, match=r"adapted\[0\]: expected the teacher's shape"):
        loss(**dict(batch, adapted=batch["student"]))
    with pytest.raises(ValueError, match="expected both or neither"):
        loss(**dict(batch, teacher_logits=None))
    with pytest.raises(ValueError, match="strides: expected increasing"):
        RobustDistillLoss((8, 4))


def test_centring_takes_the_mean_of_the_slots_that_are_filled(batch):
    """Of both spaces, whatever lies in the empty slots of a half-empty bank."""
    loss = RobustDistillLoss(STRIDES, relation=1.0, relation_options=RelationOptions(center=True))
    terms = loss(**batch)
    moved = dict(batch, bank=copy.deepcopy(batch["bank"]))
    bank = moved["bank"]
    assert not bank.valid.all() and bank.valid.any()
    for side, offset in (("student", 5), ("teacher", -3)):
        moved[side] = [x + offset for x in batch[side]]
        rows = getattr(bank, side)
        rows += offset
        rows[~bank.valid] = 100.0
    moved["adapted"] = [x - 3 for x in batch["adapted"]]
    for name, value in loss(**moved).items():
        torch.testing.assert_close(value, terms[name])
    middle = copy.deepcopy(batch["bank"])  # by the definition: bank and rows around the mean
    for level in range(2):
        for side in ("student", "teacher"):
            rows = getattr(middle, side)[level]
            rows -= rows[middle.valid[level]].mean(dim=0)
    plain = RobustDistillLoss(STRIDES, relation=1.0)
    rows = []
    for side in ("student", "teacher"):
        of_level = []
        for level in range(2):
            bank_rows = getattr(batch["bank"], side)[level]
            of_level.append(
                pooled(batch, side, level) - bank_rows[batch["bank"].valid[level]].mean(dim=0)
            )
        rows.append(torch.stack(of_level))
    for name, value in plain(**dict(batch, bank=middle), rows=tuple(rows)).items():
        torch.testing.assert_close(value, terms[name])


def test_soft_labels_alone_are_weighed_by_omega(batch):
    only = {"foreground": 0, "background": 0, "relation": 0}
    loss = all_terms(**only)
    assert loss.uses_prototypes
    (value,) = loss(**batch).values()
    level = assign_levels(batch["targets"].boxes, STRIDES)
    weights = omegas(batch).gather(0, level[None])[0][batch["logit_box"]]
    logits = batch["student_logits"], batch["teacher_logits"]
    torch.testing.assert_close(value, 5 * logit_loss(*logits, weights))
    (plain,) = all_terms(**only, robust=False)(**batch).values()
    assert not torch.isclose(value, plain)
