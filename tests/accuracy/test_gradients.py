import pytest
import torch

from benchmarks.accuracy import gradients
from benchmarks.accuracy.experiments import REDUCED
from benchmarks.accuracy.gradients import START, length, measure
from benchmarks.accuracy.perform import build
from benchmarks.accuracy.store import Store
from workshop.detection_data import pair_scenes
from workshop.digit_scenes import SceneSettings, make_scenes


def test_the_norm_over_all_parameters():
    a, b, unused = (torch.tensor([x], requires_grad=True) for x in (3.0, 4.0, 1.0))
    assert length((a.square() + 2 * b).sum(), [a, b, unused]) == pytest.approx((6**2 + 2**2) ** 0.5)


def test_without_the_student_it_says_what_to_train(tmp_path):
    assert START is not None and START.method is None and START.split == "tuning"
    with pytest.raises(SystemExit, match="q2-warm-alone/none"):
        measure(Store(tmp_path, tmp_path))


def test_ratios_are_in_units_of_the_detection_losses(monkeypatch):
    data = pair_scenes(*[make_scenes("train", SceneSettings(train=40))] * 2)
    monkeypatch.setattr(gradients, "trained", lambda trial, store: build(trial))
    monkeypatch.setattr(gradients, "load_data", lambda trial, store: (data, None))
    monkeypatch.setattr(gradients, "COLLECTED", 1)
    monkeypatch.setattr(gradients, "MEASURED", 1)
    lengths = iter([4.0, 2.0, 2.0, 2.0, 2.0])  # detection first
    monkeypatch.setattr(gradients, "length", lambda loss, parameters: next(lengths))
    found = gradients.ratios(START, REDUCED.method("all"), None)
    names = ("kd_foreground", "kd_background", "kd_relation", "kd_logits")
    assert found == dict.fromkeys(names, 0.5)
