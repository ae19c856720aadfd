import json
import os
import signal

import pytest
import torch
from torchvision.ops import box_iou

from benchmarks.digits import label_errors, suspicion
from benchmarks.digits.corruption import CLEAN, KINDS, LABEL, MOVED, OVERLAP, SHIFTED, corrupt
from benchmarks.digits.suspicion import RULES, area_under_roc, precision_at
from tests.examples.conftest import EXAMPLES
from workshop.digit_scenes import SceneSettings, make_scenes
from workshop.training import Interrupted, Trainer

DOCS = EXAMPLES.parent / "docs"


@pytest.fixture(scope="module")
def scenes():
    return make_scenes("train", SceneSettings(train=60))


@pytest.fixture(scope="module")
def corrupted(scenes):
    return corrupt(scenes, 0.2, seed=3)


class TestCorruption:
    def test_as_many_as_asked_for(self, scenes, corrupted):
        number = round(0.2 * len(scenes.labels))
        counts = torch.bincount(corrupted.kind, minlength=len(KINDS)).tolist()
        assert counts[LABEL] == number and counts[SHIFTED] == number // 2
        assert counts[SHIFTED] + counts[MOVED] == number
        assert sum(counts) == len(scenes.labels)

    def test_it_is_what_is_reported(self, scenes, corrupted):
        other_label = corrupted.scenes.labels != scenes.labels
        other_box = (corrupted.scenes.boxes != scenes.boxes).any(dim=1)
        assert torch.equal(other_label, corrupted.kind == LABEL)
        assert torch.equal(other_box, (corrupted.kind == SHIFTED) | (corrupted.kind == MOVED))
        assert set(corrupted.scenes.labels.tolist()) <= set(range(1, 11))
        assert corrupted.truth is scenes and corrupted.scenes.images is scenes.images

    def test_wrong_boxes_are_as_wrong_as_promised(self, scenes, corrupted):
        seen = set()
        for scene in range(len(scenes)):
            given, true = corrupted.scenes.target(scene)["boxes"], scenes.target(scene)["boxes"]
            overlaps = box_iou(given, true)
            start = int(scenes.first[scene])
            for row, kind in enumerate(corrupted.kind[start : start + len(given)].tolist()):
                seen.add(kind)
                if kind == SHIFTED:
                    assert OVERLAP[0] <= overlaps[row, row] <= OVERLAP[1]
                if kind == MOVED:
                    assert (overlaps[row] == 0).all()
                    sizes = [b[row, 2:] - b[row, :2] for b in (given, true)]
                    torch.testing.assert_close(*sizes, rtol=0, atol=1e-4)
            assert (given >= 0).all() and (given <= 96).all()
        assert seen == set(range(len(KINDS)))

    def test_the_seed_decides(self, scenes, corrupted):
        again, other = corrupt(scenes, 0.2, seed=3), corrupt(scenes, 0.2, seed=4)
        assert torch.equal(again.scenes.boxes, corrupted.scenes.boxes)
        assert torch.equal(again.kind, corrupted.kind)
        assert not torch.equal(other.kind, corrupted.kind)

    def test_more_than_there_are_is_an_error(self, scenes):
        with pytest.raises(ValueError, match=r"^share: .* got 0.7$"):
            corrupt(scenes, 0.7, seed=0)


class TestScores:
    @pytest.mark.parametrize("levels", [2, 5, 1000])  # many ties, some, hardly any
    def test_area_under_roc_is_the_share_of_pairs_in_order(self, levels):
        generator = torch.Generator().manual_seed(levels)
        value = torch.randint(levels, (200,), generator=generator).float()
        wrong = torch.rand(200, generator=generator) < 0.2
        pairs = value[wrong][:, None] - value[~wrong][None]
        expected = ((pairs > 0).double() + 0.5 * (pairs == 0).double()).mean()
        assert area_under_roc(value, wrong) == pytest.approx(float(expected), abs=1e-12)

    def test_precision_counts_ties_by_their_mean(self):
        # Four are asked for: two above the cut (one wrong), two of the four tied (three wrong).
        value = torch.tensor([9.0, 8.0, 5.0, 5.0, 5.0, 5.0, 1.0, 0.0])
        wrong = torch.tensor([1, 0, 1, 1, 1, 0, 1, 0], dtype=torch.bool)
        assert precision_at(value, wrong, 0.5) == pytest.approx((1 + 2 * 3 / 4) / 4)

    def test_a_rule_that_knows_is_perfect_and_its_opposite_the_reverse(self, corrupted):
        knows = (corrupted.kind != CLEAN).float()
        for question in label_errors.judge(knows, corrupted.kind).values():
            assert question["area under ROC"] == question["precision"] == 1
        for question in label_errors.judge(-knows, corrupted.kind).values():
            assert question["area under ROC"] == question["precision"] == 0

    def test_a_rule_that_says_nothing_is_chance(self, corrupted):
        for question in label_errors.judge(
            torch.ones(len(corrupted.kind)), corrupted.kind
        ).values():
            assert question["area under ROC"] == 0.5
            assert question["precision"] == pytest.approx(question["share wrong"], abs=1e-6)

    def test_a_detector_that_sees_the_truth_finds_what_its_rules_can(self, scenes, corrupted):
        truth = [scenes.target(index) for index in range(len(scenes))]
        given = [corrupted.scenes.target(index) for index in range(len(scenes))]

        def detector(images):
            return [{**t, "scores": torch.ones(len(t["labels"]))} for t in truth]

        box, both = suspicion._misses(detector, [], given)
        kind = corrupted.kind
        assert (box[kind == CLEAN] < 1e-6).all() and (both[kind == CLEAN] < 1e-6).all()
        assert (box[kind == LABEL] < 1e-6).all() and (both[kind == LABEL] > 0.3).all()
        assert (both[kind == SHIFTED] >= 1 - OVERLAP[1] - 1e-6).all()
        assert (box[kind == MOVED] == 1).all()
        assert area_under_roc(both, kind != CLEAN) == 1

    def test_no_detection_is_a_miss(self, scenes):
        def blind(images):
            nothing = torch.empty(0)
            return [{"boxes": torch.empty(0, 4), "labels": nothing, "scores": nothing}]

        for missed in suspicion._misses(blind, [], [scenes.target(0)]):
            assert torch.equal(missed, torch.ones(len(scenes.target(0)["labels"])))


@pytest.fixture
def study(tmp_path):
    results = tmp_path / "quick" / "label_errors.json"

    def run(*more):
        label_errors.main(["--quick", "--cache", str(tmp_path), "--seeds", "0", *more])
        return json.loads(results.read_text())

    return run


@pytest.mark.slow
def test_the_quick_form_from_end_to_end(study, tmp_path, capsys, monkeypatch):
    results = study("--teachers", "clean", "noisy", "--images", str(tmp_path / "images"))
    assert sorted(result["teacher"] for result in results.values()) == ["clean", "noisy"]
    for result in results.values():
        assert result["instances"]["label"] == round(0.05 * sum(result["instances"].values()))
        assert result["rules"].keys() == RULES.keys()
        assert [point["iteration"] for point in result["omega over training"]] == [0, 2]
        assert len(result["wrong prototypes"]) == 3
        assert result["settings"]["scenes"] != SceneSettings(60, 20).fingerprint()
    clean = next(r for r in results.values() if r["teacher"] == "clean")
    assert clean["rules"]["teacher class"]["label"]["area under ROC"] > 0.9  # trained long ago
    assert capsys.readouterr().out.count(RULES["omega"]) == 2
    names = {"label_errors.png", "omega_over_training.png", "prototypes_by_level.png"}
    assert {picture.name for picture in (tmp_path / "images").iterdir()} == names

    # What is known is not done again; another rule means other numbers.
    done = []
    monkeypatch.setattr(label_errors.Job, "run", lambda job: done.append(job.teacher) or clean)
    study("--teachers", "clean", "noisy")
    assert done == []
    monkeypatch.setattr(label_errors, "source_digest", lambda file: "other code")
    study("--teachers", "clean")
    assert done == ["clean"]


@pytest.mark.slow
def test_an_interrupted_training_goes_on_as_if_nothing_had_been(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(label_errors, "EVERY", 2)
    shared = 4, 2, (60, 20), 10
    whole = label_errors.Job("clean", 0, *shared, tmp_path / "whole").train()[0]
    step = Trainer.step

    def step_and_stop(trainer, batch):
        if trainer.run.iteration == 2:  # prototypes were just renewed
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, batch)

    job = label_errors.Job("clean", 0, *shared, tmp_path / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step_and_stop)
        with pytest.raises(Interrupted):
            job.train()
    resumed = job.train()[0]
    assert [point["iteration"] for point in resumed.run.scores] == [0, 2, 4]
    assert resumed.run.scores == whole.run.scores
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


def test_the_page_shows_the_numbers_of_the_results_file():
    results = json.loads(label_errors.RESULTS.read_text()).values()
    page = (DOCS / "label_errors.md").read_text()
    for teacher in ("clean", "noisy"):
        mine = [result for result in results if result["teacher"] == teacher]
        assert len(mine) >= 2 and label_errors.table(mine) in page
