"""Lightning's callback: the module and its checkpoints stay as they are."""

import pytest
import torch

lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")

from global_kd.losses import PKD  # noqa: E402
from global_kd.trainers.lightning import Distillation  # noqa: E402

from ..test_distiller import BOXES, IMAGES, Detector  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = Detector(4)

    def training_step(self, batch, batch_index):
        return sum(x.square().mean() for x in self.model(batch[0]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class WarmedUp(Module):
    """A learning rate that begins at 0, as a warm-up does."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def fit(folder, epochs, callback=None, checkpoint=None, module=None, **options):
    module = module or Module()
    torch.manual_seed(1)
    callback = callback or Distillation(
        "model", Detector(9), losses=PKD(), example_inputs=(IMAGES,)
    )
    trainer = lightning.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    loader = torch.utils.data.DataLoader([(IMAGES, BOXES)] * 3, batch_size=None)
    trainer.fit(module, loader, ckpt_path=checkpoint)
    path = folder / f"after-{epochs}.ckpt"
    trainer.save_checkpoint(path)
    return module, callback, trainer, path


def test_it_trains_logs_and_leaves_a_plain_module(tmp_path):
    module, callback, trainer, path = fit(tmp_path, 1)
    assert callback.kd.loss.step == 3 and callback.kd.loss.total_steps == 3
    assert trainer.callback_metrics["kd_pkd"] > 0
    plain = Module()
    assert list(module.state_dict()) == list(plain.state_dict())
    saved = torch.load(path, weights_only=True)
    plain.load_state_dict(saved["state_dict"])
    assert "training_step" not in vars(module)
    assert not any(m._forward_hooks for m in module.model.modules())


def test_it_goes_on_where_it_stopped(tmp_path):
    _, first, _, path = fit(tmp_path, 1)
    kept = [p.detach().clone() for p in first.kd.parameters()]
    start = []

    class Watch(Distillation):
        def on_train_start(self, trainer, module):
            start.extend(p.detach().clone() for p in self.kd.parameters())

    watch = Watch("model", Detector(9), losses=PKD(), example_inputs=(IMAGES,))
    watch.__class__.__qualname__ = Distillation.__qualname__  # its state goes by name
    _, later, _, _ = fit(tmp_path, 2, watch, path)
    assert later.kd.loss.step == 6
    assert all(torch.equal(a, b) for a, b in zip(kept, start, strict=True))


def test_adapters_follow_the_learning_rate_schedule(tmp_path):
    start = []

    class Watch(Distillation):
        def on_train_start(self, trainer, module):
            start.extend(p.detach().clone() for p in weights(self.kd))

    def weights(kd):
        # Not the biases: PKD standardises each channel, so their gradient is rounding at most.
        return [p for name, p in kd.named_parameters() if name.endswith("weight")]

    watch = Watch("model", Detector(9), losses=PKD(), example_inputs=(IMAGES,))
    _, _, trainer, _ = fit(tmp_path, 2, watch, module=WarmedUp())
    (group,) = trainer.optimizers[0].param_groups
    assert {id(p) for p in watch.kd.parameters()} <= {id(p) for p in group["params"]}
    assert group["lr"] == pytest.approx(0.1 * 6 / 10)
    assert start
    for before, after in zip(start, weights(watch.kd), strict=True):
        assert (after - before).abs().max() > 0.01


def test_calls_are_counted_where_gradients_accumulate(tmp_path):
    _, callback, _, _ = fit(tmp_path, 2, accumulate_grad_batches=3)
    assert callback.kd.loss.step == callback.kd.loss.total_steps == 6


def test_options_reach_the_distiller(tmp_path):
    options = {"losses": PKD(), "example_inputs": (IMAGES,), "share": 0.3}
    with pytest.raises(ValueError, match="share: expected None for a student of no known"):
        fit(tmp_path, 1, Distillation("model", Detector(9), **options))


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="num_classes: expected the number of classes"):
        Distillation("model", Detector(9))
