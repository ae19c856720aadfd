"""How long a training will take on this machine, said before it begins."""

from __future__ import annotations

import copy
import time

import torch
from torch import nn

from .detection_data import DetectionData, first_batches, to_device
from .training import LONG, Recipe


def forecast(name: str, model: nn.Module, data: DetectionData, recipe: Recipe) -> float:
    """Seconds that `recipe` will take, from steps on two pictures; printed where it is long.

    A copy of the detector is trained; neither it nor the random state changes.
    """
    device = next(model.parameters()).device
    images, targets = next(to_device(first_batches(data.train, 2, 2), device))
    taken = []
    with torch.random.fork_rng():
        trial = copy.deepcopy(model).train()
        for _ in range(2):  # the first one is slower
            start = time.perf_counter()
            sum(trial(images, targets).values()).backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - start)
    step = taken[-1] * recipe.batch_size / len(images)
    if step * recipe.iterations > LONG:
        print(
            f"{name} will take about {step * recipe.iterations / 3600:.1f} hours here: "
            f"{recipe.iterations} iterations of {recipe.batch_size} pictures, {step:.1f} s each on "
            f"{device}, the teacher's part and evaluation not counted. Fewer iterations, a smaller "
            "--batch-size, a smaller detector or a GPU make it shorter.",
            flush=True,
        )
    return step * recipe.iterations
