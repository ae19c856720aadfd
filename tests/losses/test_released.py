"""The whole RDM step against its slow twin in `benchmarks/released.py`: a second oracle.

The twin loops over boxes and shares no line with the library. It runs in float64, the library in
float32 as in training (and in float64, where only the order of sums may differ).
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import released
from global_kd import PAPER, PrototypeBank, RobustDistillLoss, Targets

STRIDES = (4.0, 8.0, 16.0)
CLASSES, SLOTS = 4, 3
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-11}  # of the largest entry


def step(boxes, *, channels=(5, 5), fill=0.7, seed=0, size=(96, 120)):
    """A float64 step of two images; the first box lies in image 0, the others alternate."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def maps(count):
        return [random(2, count, size[0] // int(s), size[1] // int(s)) + 0.5 for s in STRIDES]

    bank = PrototypeBank(len(STRIDES), CLASSES, SLOTS, *channels).double()
    bank.student.copy_(random(*bank.student.shape) + 0.5)
    bank.teacher.copy_(random(*bank.teacher.shape) + 0.5)
    bank.valid.copy_(torch.rand(bank.valid.shape, generator=g) < fill)
    bank.valid[:, CLASSES - 1] = False  # a class without prototypes
    count = len(boxes)
    targets = Targets(
        torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4),
        torch.arange(count) % CLASSES,
        torch.arange(count) % 2,
    )
    rows = 9 if count else 0
    return {
        "student": maps(channels[0]),
        "teacher": maps(channels[1]),
        "adapted": maps(channels[1]),
        "targets": targets,
        "bank": bank,
        "student_logits": random(rows, CLASSES + 1),
        "teacher_logits": random(rows, CLASSES + 1),
        "logit_box": torch.arange(rows) % max(1, count),
    }


def cast(step, dtype):
    """The step in this dtype with fresh leaves, and those leaves."""

    def leaves(maps):
        return [x.detach().to(dtype).requires_grad_() for x in maps]

    t = step["targets"]
    own = dict(step)
    own["student"], own["adapted"] = leaves(step["student"]), leaves(step["adapted"])
    own["teacher"] = [x.to(dtype) for x in step["teacher"]]
    own["student_logits"] = leaves([step["student_logits"]])[0]
    own["teacher_logits"] = step["teacher_logits"].to(dtype)
    own["targets"] = Targets(t.boxes.to(dtype), t.labels, t.image_index)
    own["bank"] = PrototypeBank(
        len(STRIDES),
        CLASSES,
        SLOTS,
        *(getattr(step["bank"], side).shape[-1] for side in ("student", "teacher")),
    ).to(dtype)
    own["bank"].load_state_dict(step["bank"].state_dict())
    return own, [*own["student"], *own["adapted"], own["student_logits"]]


BOXES = {
    "ordinary": [[5, 5, 30, 40], [10, 0, 90, 90], [40, 41, 50, 52], [3, 60, 70, 95.5]],
    "over the border": [[-20, -3, 30, 40], [80, 60, 500, 300], [100, 70, 120, 96]],
    "thin, tiny, empty": [[8, 8, 8, 8], [10, 3, 90, 3.5], [33, 0, 34, 96], [119.5, 95.5, 120, 96]],
    "one": [[16, 16, 48, 64]],
    "on top of each other": [[0, 0, 120, 96]] * 3 + [[10, 10, 60, 60]] * 3,
}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("boxes", BOXES.values(), ids=BOXES)
def test_terms_and_gradients_are_those_of_the_released_formulation(boxes, dtype):
    """Each term has a random upstream factor: a gradient that ignores it would show."""
    inputs = step(boxes, channels=(5, 7))
    upstream = torch.tensor([0.3, 1.7, -0.6, 2.1], dtype=torch.float64)

    slow, slow_leaves = cast(inputs, torch.float64)
    prototypes = released.concatenate(slow.pop("bank"))
    expected = released.robust_distill(STRIDES, prototypes=prototypes, **slow)
    sum(f * x for f, x in zip(upstream, expected.values())).backward()

    fast, fast_leaves = cast(inputs, dtype)
    terms = RobustDistillLoss(STRIDES, **PAPER)(**fast)
    sum(f.to(x.dtype) * x for f, x in zip(upstream, terms.values())).backward()

    assert list(terms) == list(expected)
    for name in terms:
        near(terms[name], expected[name], dtype)
    for mine, theirs in zip(fast_leaves, slow_leaves):
        near(mine.grad, theirs.grad, dtype)


def near(mine, theirs, dtype):
    scale = max(float(theirs.detach().abs().max()), 1e-12)
    difference = float((mine.detach().double() - theirs.detach().double()).abs().max())
    assert difference <= TOLERANCES[dtype] * scale


def test_without_boxes_the_background_is_all_there_is():
    inputs, _ = cast(step([]), torch.float64)
    inputs["student_logits"] = inputs["teacher_logits"] = None
    terms = RobustDistillLoss(STRIDES, **PAPER)(**inputs)
    prototypes = released.concatenate(inputs.pop("bank"))
    expected = released.robust_distill(STRIDES, prototypes=prototypes, **inputs)
    for name in terms:
        torch.testing.assert_close(terms[name], expected[name])
    assert expected["kd_background"] > 0


def test_an_empty_bank_means_full_trust_and_no_relation():
    inputs, _ = cast(step(BOXES["ordinary"], fill=0.0), torch.float64)
    terms = RobustDistillLoss(STRIDES, **PAPER)(**inputs)
    prototypes = released.concatenate(inputs.pop("bank"))
    expected = released.robust_distill(STRIDES, prototypes=prototypes, **inputs)
    for name in terms:
        torch.testing.assert_close(terms[name], expected[name])
    assert expected["kd_relation"] == 0


def test_the_twin_is_the_slow_one():
    """It waits for the device at every box and works in float64, or it is no yardstick."""
    inputs, _ = cast(step(BOXES["ordinary"]), torch.float32)
    prototypes = released.concatenate(inputs.pop("bank"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        terms = released.robust_distill(STRIDES, prototypes=prototypes, **inputs)
    assert terms["kd_foreground"].dtype == torch.float64
    calls = {event.key: event.count for event in seen.key_averages()}
    pairs = len(STRIDES) * len(BOXES["ordinary"])
    assert calls["aten::_local_scalar_dense"] > pairs
    assert calls["aten::mean"] >= 2 * pairs
