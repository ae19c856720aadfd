import pytest
import torch

from benchmarks.accuracy import gradients
from benchmarks.accuracy.__main__ import main
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


def test_how_hard_the_own_weights_pull(monkeypatch, tmp_path):
    """Means over seeds, kept beside what is known of other data, and their sum."""
    found = iter(
        [{"kd_foreground": 0.1, "kd_logits": 6.0}, {"kd_foreground": 0.3, "kd_logits": 7.0}]
    )
    monkeypatch.setattr(gradients, "PULL", tmp_path / "pull.json")
    monkeypatch.setattr(gradients, "pull", lambda trial, store: next(found))
    gradients.PULL.write_text('{"bccd": {"seeds": 1, "shares": {"kd_logits": 2.0}}}')
    gradients.write_pull("cards", [START.at(0), START.at(1)], None)
    lines = list(gradients.pulls())
    assert lines[0] == "| data | seeds | kd_logits | kd_foreground | sum |"
    assert lines[2:] == ["| bccd | 1 | 2.00 |  | 2.00 |", "| cards | 2 | 6.50 | 0.20 | 6.70 |"]


def test_without_the_teacher_it_says_what_to_train(tmp_path):
    with pytest.raises(SystemExit, match="Train the teacher .* first"):
        main(["pull", "--quick", "--cache", str(tmp_path), "--results", str(tmp_path)])


def test_a_table_can_be_named(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(gradients, "write_pull", lambda name, trials, store: asked.append(name))
    words = ["pull", "--data", "bccd", "--cache", str(tmp_path), "--results", str(tmp_path)]
    assert main(words) == main([*words, "--only", "bccd-q8-dense"]) == 0
    assert asked == ["bccd", "bccd-q8-dense"]
    with pytest.raises(SystemExit, match="--only: no table's name begins with 'bccd-q8-dense/'"):
        main([*words, "--only", "bccd-q8-dense/"])
