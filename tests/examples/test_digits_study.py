import json

import pytest

import digits_study

from .conftest import EXAMPLES


@pytest.fixture
def study(tmp_path):
    results = tmp_path / "results" / "study.json"
    options = f"--scenes 40 16 --iterations 2 --cache {tmp_path} --results {results}".split()
    options += ["--teacher", str(EXAMPLES / "teacher_digits.pt")]

    def run(*more):
        digits_study.main([*options, *map(str, more)])
        return json.loads(results.read_text())

    return run


@pytest.mark.slow
def test_results_and_table(study, capsys):
    results = study("--seeds", 0, 1, "--arms", "none", "all")
    assert len(results) == 4
    for key, result in results.items():
        assert result["key"] == key and 0 <= result["AP"] <= 1 and result["seconds"] > 0
        assert result["settings"]["recipe"]["seed"] == result["seed"]
        assert result["environment"].keys() >= {"torch", "commit", "threads"}
    table = capsys.readouterr().out.splitlines()
    assert table[-2].startswith("none") and table[-1].startswith("all")
    assert table[-1].count("±") == 7  # six metrics and the gain over "none"


def test_what_is_known_is_not_trained_again(study, monkeypatch):
    first = study("--seeds", 0, "--arms", "none")
    trained = []
    monkeypatch.setattr(digits_study.Job, "run", lambda job: trained.append(job.arm) or {
        **first[next(iter(first))], "key": job.key, "arm": job.arm})  # fmt: skip
    study("--seeds", 0, "--arms", "none", "relation")
    assert trained == ["relation"]
    # An arm whose definition changed is another arm.
    monkeypatch.setitem(digits_study.ARMS, "none", digits_study.FULL)
    study("--seeds", 0, "--arms", "none")
    assert trained == ["relation", "none"]


@pytest.mark.slow
def test_a_warm_start_is_shared_by_the_arms(study, tmp_path):
    cold = study("--seeds", 0, "--arms", "none")
    results = study("--seeds", 0, "--arms", "none", "imitation", "--warm-start")
    assert len(list(tmp_path.glob("warm_*.pt"))) == 1
    assert len(results) == 3 and results.items() >= cold.items()
