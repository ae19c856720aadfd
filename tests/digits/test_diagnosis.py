import json

import pytest
import torch

from benchmarks.digits import diagnosis


def test_rows_beside_the_prototype_of_their_class_are_told_apart():
    labels = torch.arange(1, 5).repeat(6)
    rows = torch.eye(5)[labels].expand(2, -1, -1) + 0.01
    classes = torch.tensor([[1, 2, 3, 4, -1]] * 2)
    prototypes = torch.cat([torch.eye(5)[1:], torch.full((1, 5), 9.0)]).expand(2, -1, -1)
    found = diagnosis.separability(rows, labels, labels % 2, prototypes, classes)
    assert found["class accuracy of the nearest prototype, per level, plain"] == [1, 1]
    assert found["class accuracy of the nearest prototype, per level, centered"] == [1, 1]
    assert found["class accuracy of the RoI head"] == 0.25  # label 1 alone
    # Of 24 rows each has 5 others of its class; the rest is nearly orthogonal to it.
    alike = found["mean cosine of two instances, per level, plain"]
    assert alike == pytest.approx([5 / 23] * 2, abs=0.03)


def test_a_small_run_measures_every_term(tmp_path):
    results = tmp_path / "found.json"
    options = f"--iterations 10 --images 40 --scenes 128 40 --cache {tmp_path} --results {results}"
    diagnosis.main(options.split())
    found = json.loads(results.read_text())
    assert found["gradients"].keys() == {
        "kd_foreground",
        "kd_background",
        "kd_relation",
        "kd_logits",
    }
    for each in found["gradients"].values():
        assert -1 <= each["cosine"] <= 1 and each["relative length"] > 0
    assert found["teacher"]["class accuracy of the RoI head"] > 0.5  # trained; chance is 0.1
    assert found["environment"]["torch"] == torch.__version__
