import pytest
import torch

from benchmarks.accuracy.gradients import START, length, measure
from benchmarks.accuracy.store import Store


def test_the_norm_over_all_parameters():
    a, b, unused = (torch.tensor([x], requires_grad=True) for x in (3.0, 4.0, 1.0))
    assert length((a.square() + 2 * b).sum(), [a, b, unused]) == pytest.approx((6**2 + 2**2) ** 0.5)


def test_without_the_student_it_says_what_to_train(tmp_path):
    assert START is not None and START.method is None and START.split == "tuning"
    with pytest.raises(SystemExit, match="q2-warm-alone/none"):
        measure(Store(tmp_path, tmp_path))
