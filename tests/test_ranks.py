"""Several processes make what one would have made, and none waits for one that failed."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import fsdp

from global_kd.ranks import MeanGradients, Ranks
from tests import ranks_at_work as work

ROOT = Path(__file__).parents[1]
PROTOTYPES = [
    "prototypes",
    "prototypes_without_ids",
    "prototypes_of_instances_seen_by_all",
    "prototypes_after_a_checkpoint_of_rank_0",
    "prototypes_after_a_checkpoint_of_all_ranks",
]
OTHERS = ["traffic", "nobody_has_a_row", "one_rank_fails", "ranks_do_not_fit"]
OTHERS += ["gradients_in_buckets"]
TRAINING = [
    "training",
    "training_with_several_losses",
    "training_with_frozen_adapters",
    "training_with_the_loss_wrapped",
    "training_with_gradients_in_buckets",
    "training_with_a_static_graph",
    "training_sharded",
]
FSDP2 = hasattr(fsdp, "fully_shard")  # since torch 2.6


def launch(size: int, folder: Path, *scenarios: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={size}", "-m", "tests.ranks_at_work", str(folder), *scenarios),
        ],
        cwd=ROOT,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module", params=[2, 4], ids="{0} ranks".format)
def results(request, tmp_path_factory):
    """``results(scenario)``: what each rank returned."""
    folder, size = tmp_path_factory.mktemp("ranks"), request.param
    scenarios = [*PROTOTYPES, *OTHERS, *(x for x in TRAINING if FSDP2 or x != "training_sharded")]
    done = launch(size, folder, *scenarios)
    assert done.returncode == 0, done.stderr[-4000:]
    return lambda name: [
        torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(size)
    ]


def equal(a, b):
    same = [torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a]
    return all(same) and list(a) == list(b)


@pytest.mark.parametrize("scenario", PROTOTYPES)
def test_every_rank_ends_with_the_prototypes_of_one(results, scenario):
    alone = getattr(work, scenario)(0, 1)
    assert alone["valid"][:, [0, 1, 2, 4]].any(dim=2).all()
    assert not alone["valid"][:, 3].any()
    for bank in results(scenario):
        assert equal(bank, alone)


def test_the_sample_had_to_choose():
    """Else the equality above would not say much."""
    generator = work.collected(0, 1)
    seen = {(int(i), int(k)) for _, _, t in work.stream() for i, k in zip(t.ids, t.labels)}
    assert generator.counts().tolist() == [8, 8, 8, 0, 3]
    assert all(sum(k == c for _, k in seen) > 8 for c in (0, 1, 2))


def test_no_row_is_sent_that_nobody_needs(results):
    ranks = results("traffic")
    sent = [sum(rank["sent"]) for rank in ranks]
    assert sum(sent) == 8 + 8 + 8 + 3  # the sample of all, once
    assert sum(rank["held"] for rank in ranks) > sum(sent) or len(ranks) == 2


def test_without_a_row_anywhere(results):
    for said in results("nobody_has_a_row"):
        assert "no instances were added" in said["said"]


def test_a_rank_that_fails_takes_the_others_along_without_a_wait(results):
    ranks = results("one_rank_fails")
    failed = len(ranks) - 1
    for rank in ranks:
        assert f"rank {failed} of {len(ranks)} failed: ZeroDivisionError" in rank["said"]
        assert torch.equal(rank["valid"], work.prototypes(0, 1)["valid"])


def test_ranks_that_do_not_fit_together_are_told(results):
    for said in results("ranks_do_not_fit"):
        assert "seed" in said["said"]


@pytest.mark.parametrize("scenario", TRAINING)
def test_training_on_several_ranks_equals_one_with_all_batches(results, scenario):
    if scenario == "training_sharded" and not FSDP2:
        pytest.skip("needs torch 2.6")
    ranks = results(scenario)
    own = ("training_with_several_losses", "training_with_frozen_adapters")
    train = getattr(work, scenario if scenario in own else "training")
    alone = train(0, 1, ranks=len(ranks))
    assert alone["bank"]["valid"].any()
    for rank in ranks:
        for part in ("adapters", "bank"):
            assert equal(rank[part], ranks[0][part]), part
        for part in ("student", "adapters", "bank"):
            torch.testing.assert_close(rank[part], alone[part], rtol=1e-4, atol=1e-6)


def test_buckets_of_another_owner_are_averaged_once(results):
    """`gradient_as_bucket_view`: the gradients are views of what is being summed."""
    for rank in results("gradients_in_buckets"):
        found, expected = rank["found"].unbind(dim=1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "device", "place"),
    [
        ("cpu:gloo,cuda:nccl", "cuda:3", "cuda:3"),  # init_process_group() without a backend
        ("cpu:gloo,cuda:nccl", "cpu", "cpu"),
        ("cpu:gloo,cuda:gloo", "cuda:3", "cpu"),
        ("cpu:gloo", "cuda:3", "cpu"),
        ("cuda:nccl", "cuda:3", "cuda:3"),
        ("cuda:nccl", "cpu", "cuda:1"),
        ("cpu:gloo,xpu:xccl", "xpu:2", "xpu:2"),
    ],
)
def test_tensors_are_sent_from_where_they_lie_if_they_can(monkeypatch, config, device, place):
    for name, value in {
        "is_initialized": True,
        "get_world_size": 2,
        "get_rank": 1,
        "get_backend_config": config,
    }.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    ranks = Ranks()
    assert ranks.place(torch.device(device)) == torch.device(place)
    assert Ranks(together=False).place(torch.device(device)) == torch.device(device)
    found = ranks.common([None, "cpu", "cuda"])
    assert found == torch.device("cuda", 1) if "nccl" in config else torch.device("cpu")


def test_a_backward_that_broke_off_is_forgotten(monkeypatch):
    """Its callback is lost; without `begin` no later backward would be averaged."""
    layer = torch.nn.Linear(2, 1)
    ranks = Ranks(together=False)
    added = []
    monkeypatch.setattr(ranks, "add", lambda *tensors: added.append(tensors))
    joined = MeanGradients(layer.parameters(), ranks)

    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise ZeroDivisionError

    for _ in range(2):
        joined.begin()
        x = Breaks.apply(torch.ones(1, 2, requires_grad=True))
        with pytest.raises(ZeroDivisionError):
            layer(x).sum().backward()
    joined.begin()
    before = len(added)
    layer(torch.ones(1, 2)).sum().backward()
    assert len(added) == before + 1


def test_gradients_keep_their_precision():
    layer = torch.nn.Linear(5, 3).double()
    joined = MeanGradients(layer.parameters(), Ranks(together=False))
    images = torch.rand(2, 5, dtype=torch.float64)
    joined.begin()
    layer(images).square().sum().backward()
    expected = torch.autograd.grad(layer(images).square().sum(), list(layer.parameters()))
    assert [p.grad.tolist() for p in layer.parameters()] == [x.tolist() for x in expected]


def test_a_copy_averages_the_gradients_of_its_own_parameters(monkeypatch):
    ranks = Ranks(together=False)
    layer = torch.nn.Linear(2, 1)
    joined, twin = copy.deepcopy((MeanGradients(layer.parameters(), ranks), layer))
    added = []
    monkeypatch.setattr(joined._ranks, "add", lambda *tensors: added.append(tensors))
    joined.begin()
    twin(torch.ones(1, 2)).sum().backward()
    assert len(added) == 1


def test_a_rank_killed_in_a_refresh_ends_the_job(tmp_path):
    """With an error and within seconds; the last checkpoint loads."""
    started = time.monotonic()
    done = launch(2, tmp_path, "killed_in_a_refresh")
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    assert time.monotonic() - started < 59  # the process group's timeout is 60
    assert not list(tmp_path.glob("killed_in_a_refresh-*"))
    generator = work.new_generator()
    generator.load_state_dict(torch.load(tmp_path / "checkpoint-1.pt", weights_only=True))
    assert len(generator) > 0 and generator.generate().valid.any()
