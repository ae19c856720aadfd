import json

import pytest
import torch

from benchmarks.digits import streaming
from global_kd import PrototypeGenerator, Targets


@pytest.fixture
def bank():
    torch.manual_seed(0)
    labels = torch.arange(20) % 2
    boxes = torch.tensor([[0.0, 0.0, 20.0, 20.0]]).expand(20, -1)
    targets = Targets(boxes, labels, torch.zeros_like(labels), ids=torch.arange(100, 120))
    generator = PrototypeGenerator(2, 3, min_side=10)
    rows = torch.randn(2, 20, 8)
    generator.add(rows, torch.randn(2, 20, 8), targets)
    return generator.generate(), rows, targets.ids


def test_rows_that_did_not_change_are_not_stale(bank):
    bank, rows, ids = bank
    order = torch.randperm(20)
    same = streaming.staleness(bank, rows[:, order], ids[order])
    assert same["cosine of a row to itself now"] == pytest.approx(1, abs=1e-5)
    assert same["relative distance of a row to itself now"] == pytest.approx(0, abs=1e-5)
    half = streaming.staleness(bank, 2 * rows[:, order], ids[order])
    assert half["cosine of a row to itself now"] == pytest.approx(1, abs=1e-5)
    assert half["relative distance of a row to itself now"] == pytest.approx(0.5, abs=1e-5)


def test_weights_of_one_bank_agree_with_themselves():
    weights = torch.rand(3, 50)
    assert streaming.compare(weights, weights) == {
        "mean difference of omega": 0,
        "correlation of omega": pytest.approx(1),
    }
    other = streaming.compare(weights, 1 - weights)
    assert other["correlation of omega"] == pytest.approx(-1)


def test_a_small_run_has_a_row_for_every_look_and_interval(tmp_path):
    results = tmp_path / "rows.json"
    options = "--at 1 3 --intervals 2 0 --per-class 5 --scenes 40 20 --judged 20".split()
    streaming.main([*options, "--cache", str(tmp_path), "--results", str(results)])
    rows = json.loads(results.read_text())["rows"]
    looks = [(row["iteration"], row["collected"]) for row in rows]
    other = "another sample of the fresh pass"
    assert looks == [(i, how) for i in (1, 3) for how in (other, 2, 0)]
    seen = {look: row.get("instances") for look, row in zip(looks, rows, strict=True)}
    assert seen[3, 2] < seen[3, 0]  # it forgot
