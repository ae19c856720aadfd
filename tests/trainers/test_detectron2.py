"""Detectron2's trainer with a teacher: the terms are losses of the log, checkpoints stay plain."""

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from global_kd.losses import PKD  # noqa: E402
from global_kd.trainers.detectron2 import DistillationTrainer, num_classes  # noqa: E402

from ..detectors.test_detectron2 import batch, detector, tiny_config  # noqa: E402


def trainer(folder, losses, steps=4, share=None):
    torch.manual_seed(0)
    cfg = tiny_config("faster")
    cfg.OUTPUT_DIR = str(folder)
    cfg.SOLVER.MAX_ITER = steps
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.DATASETS.TEST = ()
    cfg.SOLVER.BASE_LR = 1e-4
    cfg.SOLVER.WARMUP_ITERS = 0

    class Trainer(DistillationTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return [batch("faster")] * 100

    return Trainer(cfg, detector("faster"), losses, share=share)


def numbers(trainer):
    return [p.detach().clone() for p in (*trainer.model.parameters(), *trainer.kd.parameters())]


def test_it_trains_stops_and_goes_on(tmp_path):
    it = trainer(tmp_path, PKD(adapter="conv1x1"))
    before = numbers(it)
    it.train()
    assert it.kd.loss.step == 4 and it.kd.loss.total_steps == 4
    assert any(not torch.equal(a, b) for a, b in zip(before, numbers(it)))
    assert it.storage.history("kd_pkd").latest() > 0
    saved = torch.load(tmp_path / "model_final.pth", weights_only=False)
    assert list(saved["model"]) == list(it.model.state_dict())
    later = trainer(tmp_path, PKD(adapter="conv1x1"), steps=6)
    later.resume_or_load(resume=True)
    assert all(torch.equal(a, b) for a, b in zip(numbers(it), numbers(later)))
    later.train()
    assert later.kd.loss.step == 6


def test_a_share_sets_the_weights_once(tmp_path):
    it = trainer(tmp_path, PKD(), share=1e-3)
    own = it.kd.loss.weights[""]
    it.train()
    assert it.kd.loss.weights[""] != own and it.kd.loss.calibrated


def test_without_a_loss_it_is_global_knowledge(tmp_path):
    it = trainer(tmp_path, None)
    assert list(it.kd.losses) == ["global_knowledge"]
    assert it.kd.loss.generator.num_classes == num_classes(it.cfg) == 3
