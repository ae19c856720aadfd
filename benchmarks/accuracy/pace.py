"""How long the steps of several trainings take, measured by turns."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from workshop.detection_data import Batch
from workshop.training import Trainer

WARM_UP, STEPS = 5, 25  # of the reduced grid one renewal of the prototypes


def seconds(trainers: Sequence[Trainer], batches: Sequence[Batch]) -> list[float]:
    """Seconds that each takes for the same batches, without the first `WARM_UP`."""
    spent = [0.0] * len(trainers)
    for trainer in trainers:
        trainer.model.train()
    for n, batch in enumerate(batches):
        for i, trainer in enumerate(trainers):
            began = _now(trainer.device)
            trainer.step(batch)
            spent[i] += (n >= WARM_UP) * (_now(trainer.device) - began)
    return spent


def _now(device: torch.device) -> float:
    """Seconds; on a CPU those of this process, which stand still while others have the core."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()
