"""Training a torchvision detector, with or without distillation; resumable to the last bit."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from global_kd import Distiller

from . import storage
from .detection_data import Batch, DetectionSet, epoch_batches, to_device

Scores = dict[str, float]
_FIRST = 5  # iterations that may be slower; as many are timed
LONG = 1800.0  # seconds; who trains longer is told so


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train: AdamW, a one-cycle learning rate (warm-up, then a cosine), clipping.

    `evaluations` is how often on the way the detector is evaluated, evenly spread; `lr` is the
    highest learning rate; `clip` bounds the norm of the gradient; `seed` decides the data order.
    """

    iterations: int
    batch_size: int = 16
    lr: float = 3e-3
    weight_decay: float = 0.02
    warmup: float = 0.1
    clip: float = 5.0
    seed: int = 0
    flip: bool = False
    evaluations: int = 6
    amp: bool = False

    def rate(self, iteration: int) -> float:
        """Learning rate of an iteration, counted from 0."""
        progress = (iteration + 1) / self.iterations
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        done = (progress - self.warmup) / (1 - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(done, 0.999)))


@dataclasses.dataclass
class Run:
    """What a training has done so far: rows with their "iteration", and the time.

    Where there are `scores`, there is `telemetry` of the distillation, if there is one.
    `seconds` is time spent training, evaluation not counted.
    """

    iteration: int = 0
    seconds: float = 0.0
    losses: list[Scores] = dataclasses.field(default_factory=list)
    scores: list[Scores] = dataclasses.field(default_factory=list)
    telemetry: list[Scores] = dataclasses.field(default_factory=list)


class Interrupted(Exception):
    """The user asked to stop; the state file is up to date."""


class Trainer:
    """One training: a detector, its optimizer and, if there is one, its `Distiller`."""

    def __init__(
        self, model: nn.Module, recipe: Recipe, kd: Distiller | None = None, workers: int = 0
    ) -> None:
        self.model, self.recipe, self.kd, self.workers = model, recipe, kd, workers
        self.run = Run()
        self._last: dict[str, Tensor] = {}
        self._since = 0.0
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if kd is not None:
            self.parameters += list(kd.parameters())
        self.device = self.parameters[0].device
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        half = recipe.amp and self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler("cuda", enabled=half)  # bfloat16 needs no scaling

    def precision(self) -> torch.autocast:
        """The region in which the losses are computed."""
        kind = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        return torch.autocast(self.device.type, kind, enabled=self.recipe.amp)

    def update(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """One step down the sum of these terms, which come back detached."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.run.iteration)
        total = sum(losses.values(), torch.zeros((), device=self.device))
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.run.iteration += 1
        self._last = {name: loss.detach() for name, loss in losses.items()}
        return self._last

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One iteration on a batch that is on the device; returns each term of the loss."""
        images, targets = batch
        with self.precision():
            losses: dict[str, Tensor] = self.model(images, targets)
            if self.kd is not None:
                losses = losses | self.kd(images, targets)
        return self.update(losses)

    def batches(
        self,
        data: DetectionSet,
        *,
        label: str,
        line: int = 0,
        state: Path | None = None,
        evaluate: Callable[[nn.Module], Scores] | None = None,
        log: Callable[[str, float, int], None] | None = None,
        before_epoch: Callable[[], None] | None = None,
    ) -> Iterator[Batch]:
        """Batches to the recipe's last iteration, from wherever `load` or a former run left off.

        Call `update` or `step` once for each. `state` is written after each epoch, at the end and
        on Ctrl-C (then `Interrupted` is raised). `log` gets (name, value, iteration);
        `before_epoch` may renew the prototypes.
        """
        recipe, run = self.recipe, self.run
        per_epoch = max(1, len(data) // recipe.batch_size)
        marks = {
            round(recipe.iterations * k / recipe.evaluations)
            for k in range(1, recipe.evaluations + 1)
        }
        self.model.train()
        total, done = recipe.iterations, run.iteration
        bar = tqdm(total=total, initial=done, desc=label, unit="it", position=line)
        with bar, _interrupts() as interrupts:
            while run.iteration < recipe.iterations:
                epoch, skip = divmod(run.iteration, per_epoch)
                start = time.perf_counter()
                if before_epoch is not None and skip == 0:
                    before_epoch()
                batches = epoch_batches(
                    data,
                    recipe.batch_size,
                    seed=recipe.seed,
                    epoch=epoch,
                    flip=recipe.flip,
                    skip=skip,
                    workers=self.workers,
                )
                for batch in to_device(batches, self.device):
                    yield batch
                    run.seconds += time.perf_counter() - start
                    bar.update()
                    self._estimate(bar, run.iteration - done)
                    self._note(self._last, bar, log)
                    if evaluate is not None and run.iteration in marks:
                        scores = evaluate(self.model)
                        run.scores.append({"iteration": run.iteration, **scores})
                        if self.kd is not None:
                            numbers = self.kd.telemetry()
                            run.telemetry.append({"iteration": run.iteration, **numbers})
                        if log is not None:
                            for name, value in scores.items():
                                log(name, value, run.iteration)
                    if run.iteration == recipe.iterations or interrupts:
                        break
                    start = time.perf_counter()
                if state is not None:
                    self.save(state)
                if interrupts:
                    raise Interrupted

    def _estimate(self, bar: Any, steps: int) -> None:
        """After the first steps: how long the rest will take, where that is long."""
        if steps == _FIRST:
            self._since = self.run.seconds
        if steps == 2 * _FIRST:
            each = (self.run.seconds - self._since) / _FIRST
            left = each * (self.recipe.iterations - self.run.iteration)
            if left > LONG:
                bar.write(f"{bar.desc}: {each:.1f} s an iteration, {left / 3600:.1f} hours to go.")

    def fit(self, data: DetectionSet, **options: Any) -> Run:
        """Train to the recipe's last iteration; the options are those of `batches`."""
        for batch in self.batches(data, **options):
            self.step(batch)
        return self.run

    def _note(
        self, terms: dict[str, Tensor], bar: Any, log: Callable[[str, float, int], None] | None
    ) -> None:
        """Keep every tenth iteration's losses; a loss that is not finite ends the run."""
        if self.run.iteration % 10 and self.run.iteration != self.recipe.iterations:
            return
        losses = {name: float(loss) for name, loss in terms.items()}
        total = sum(losses.values())
        if not math.isfinite(total):
            bad = ", ".join(name for name, value in losses.items() if not math.isfinite(value))
            raise SystemExit(
                f"Training diverged at iteration {self.run.iteration} ({bad} is not finite); "
                "try a lower --lr."
            )
        bar.set_postfix(loss=f"{total:.3f}")
        self.run.losses.append({"iteration": self.run.iteration, "total": total, **losses})
        if log is not None:
            for name, value in losses.items():
                log(name, value, self.run.iteration)

    def save(self, path: Path) -> None:
        """Everything needed to go on, in one file that is complete or not there at all."""
        cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        storage.save(
            {
                "recipe": dataclasses.asdict(self.recipe),
                "run": dataclasses.asdict(self.run),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "kd": None if self.kd is None else self.kd.state_dict(),
                "random": {"cpu": torch.get_rng_state(), "cuda": cuda},
            },
            path,
        )

    def load(self, path: Path) -> None:
        """Go back to where `save` was called."""
        state = storage.load(path)
        if not isinstance(state, dict) or "recipe" not in state:
            raise SystemExit(f"Cannot resume: {path} is damaged; delete it to start it anew.")
        if state["recipe"] != dataclasses.asdict(self.recipe):
            raise SystemExit(f"Cannot resume: {path} was written by a run with other options.")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.kd is not None:
            self.kd.load_state_dict(state["kd"])
        torch.set_rng_state(state["random"]["cpu"])
        if state["random"]["cuda"]:
            torch.cuda.set_rng_state_all(state["random"]["cuda"])
        self.run.__dict__.update(state["run"])


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C (or SIGTERM); a second Ctrl-C stops at once."""
    caught: list[int] = []

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    former: dict[signal.Signals, Any] = {}
    with contextlib.suppress(ValueError):  # not in the main thread: nobody presses Ctrl-C there
        for number in (signal.SIGINT, signal.SIGTERM):
            former[number] = signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
