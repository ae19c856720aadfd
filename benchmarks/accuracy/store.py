"""What is kept of trials: one JSON each for good, weights and unfinished trainings in the cache."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from workshop.digit_scenes import load_digit_scenes

from . import pictures
from .declaration import TRAINING_SCENES_SEED, Pictures, Trial

# In the folder that `environment.commit` leaves out when it asks whether the code was changed.
RESULTS = Path(__file__).parents[1] / "results" / "accuracy"


@dataclasses.dataclass(frozen=True)
class Store:
    """Results of one kind of device in `results`, whatever can be made again in `cache`.

    `root` is the checkout that real pictures are read from.
    """

    results: Path
    cache: Path
    root: Path | None = None

    def result(self, trial: Trial) -> dict[str, Any] | None:
        """What a finished trial gave."""
        file = self.results / f"{trial.identity}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def failed(self, trial: Trial) -> bool:
        """Whether it was tried and diverged."""
        result = self.result(trial)
        return result is not None and "failed" in result

    def write(self, trial: Trial, result: dict[str, Any]) -> None:
        """Keep a result; the first one stays."""
        file = self.results / f"{trial.identity}.json"
        if file.is_file():
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(".tmp")
        fresh.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(fresh, file)

    def weights(self, trial: Trial) -> Path:
        """The file of the detector that a trial without distillation ended with."""
        return self.cache / "weights" / f"{trial.identity}.pt"

    def state(self, trial: Trial) -> Path:
        """The file to resume an unfinished training from."""
        return self.cache / "state" / f"{trial.identity}.pt"

    def scenes(self, trial: Trial) -> dict[str, Path]:
        """The folder of each split's scenes, as they were drawn."""
        if isinstance(trial.data, Pictures):
            return {}
        seeds = {"train": TRAINING_SCENES_SEED, "validation": trial.validation_seed}
        return {
            split: self.cache / "scenes" / trial.data.settings(seed).fingerprint()
            for split, seed in seeds.items()
        }

    def draw_scenes(self, trial: Trial) -> None:
        """Draw the scenes that no trial needed before, so that no two processes do so at once.

        Pictures are read and resized.
        """
        if isinstance(trial.data, Pictures):
            pictures.resized(trial.data.source, trial.data.side, self.root, self.cache)
            return
        for split, folder in self.scenes(trial).items():
            if not (folder / f"digit_scenes_{split}.pt").is_file():
                seed = TRAINING_SCENES_SEED if split == "train" else trial.validation_seed
                load_digit_scenes(split, trial.data.settings(seed), folder)

    def startable(self, trial: Trial) -> list[Trial]:
        """The trial itself, or those that come first; none if one of them diverged."""
        if any(self.failed(x) for x in trial.needs):
            return []
        missing = [x for x in trial.needs if not self.weights(x).is_file()]
        return [first for x in missing for first in self.startable(x)] if missing else [trial]
