"""transformers' Trainer with a teacher: trains, stops, goes on, leaves plain checkpoints."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

import transformers

from global_kd.losses import PKD
from global_kd.trainers.transformers import DistillationTrainer

from ..detectors.test_transformers import batch_of, detector, gk

pytestmark = pytest.mark.filterwarnings("ignore")  # of the Trainer


def collate(items):
    values = torch.stack([x["pixel_values"] for x in items])
    return {"pixel_values": values, "labels": [dict(x["labels"]) for x in items]}


def trainer(folder, losses=None, steps=4, name="rt_detr", share=None):
    torch.manual_seed(0)
    batch = batch_of(name)
    items = [
        {"pixel_values": x, "labels": y} for x, y in zip(batch["pixel_values"], batch["labels"])
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        optim="sgd",  # Adam divides by what rounding leaves of a gradient near 0
        learning_rate=1e-3,
        per_device_train_batch_size=3,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
    )
    return DistillationTrainer(
        detector(name),
        arguments,
        train_dataset=items,
        data_collator=collate,
        teacher=detector(name),
        losses=losses,
        share=share,
    )


def numbers(trainer):
    return [p.detach().clone() for p in (*trainer.model.parameters(), *trainer.kd.parameters())]


def test_it_stops_and_goes_on(tmp_path):
    whole = trainer(tmp_path / "whole", [gk(), PKD()])
    before = numbers(whole)
    whole.train()
    assert [loss.step for loss in whole.kd.losses.values()] == [4, 4]
    assert [loss.total_steps for loss in whole.kd.losses.values()] == [20, 4]  # given, found out
    assert sum(not torch.equal(a, b) for a, b in zip(before, numbers(whole))) > len(before) / 2
    later = trainer(tmp_path / "whole", [gk(), PKD()])
    later.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    # Weights read from a file lie in memory otherwise, and convolutions round otherwise.
    torch.testing.assert_close(numbers(whole), numbers(later), rtol=1e-4, atol=1e-5)


def test_a_share_sets_the_weights_once(tmp_path):
    it = trainer(tmp_path, PKD(), share=1e-3)
    own = it.kd.loss.weights[""]
    it.train()
    found = it.kd.loss.weights[""]
    assert found != own and it.kd.loss.calibrated
    later = trainer(tmp_path, PKD(), share=1e-3)
    later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert later.kd.loss.weights[""] == found


def test_checkpoints_hold_the_student_alone(tmp_path):
    it = trainer(tmp_path, PKD(adapter="conv1x1"), steps=2)
    it.train()
    saved = type(it.model).from_pretrained(tmp_path / "checkpoint-2")
    assert list(saved.state_dict()) == list(detector("rt_detr").state_dict())


def test_an_optimizer_made_early_holds_the_adapters_once(tmp_path):
    """As ``kd.check(optimizer=...)`` before ``train()`` needs it."""
    it = trainer(tmp_path, PKD(adapter="conv1x1"), steps=2)
    optimizer = it.create_optimizer()
    it.create_optimizer()
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert {id(p) for p in it.kd.parameters()} <= set(held)
    it.train()


def test_without_a_loss_it_is_global_knowledge(tmp_path):
    it = trainer(tmp_path)
    assert list(it.kd.losses) == ["global_knowledge"]
    assert it.kd.loss.total_steps == 4 and it.kd.loss.refresh_every == 1
