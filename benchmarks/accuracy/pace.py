"""How long the steps of several trainings take, measured by turns."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from workshop.detection_data import Batch
from workshop.training import Trainer

from .declaration import Table

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


def write(table: Table, spent: Sequence[float], file: Path) -> None:
    """The steps of a table's arms as multiples of the first arm's, beside those of other tables."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    ratios = [round(x / spent[0], 3) for x in spent]
    known[table.name] = dict(zip([arm.name for arm in table.arms], ratios, strict=True))
    file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
