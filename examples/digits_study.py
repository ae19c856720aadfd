"""Which knowledge helps the small student? python examples/digits_study.py --seeds 0 1 2

Every arm trains the student of `torchvision_frcnn.py` from the same start and on the same
batches; arms differ in what they take from the teacher. The results file is written after every
training, and what it already holds is not trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torchvision

import storage
from coco_eval import METRICS, evaluate
from detection_data import load_digits
from detectors import SHIPPED_TEACHER, build_detector
from digit_scenes import SceneSettings
from distillation import STUDIED, Experiment, Knowledge
from training import Recipe

FULL = STUDIED
NOTHING = dataclasses.replace(FULL, foreground=0, background=0, relation=0, logits=0)

# One arm a line: what it transfers. Add a line to ask another question.
ARMS: dict[str, Knowledge | None] = {
    "none": None,
    "imitation": dataclasses.replace(FULL, relation=0, logits=0),
    "logits": dataclasses.replace(NOTHING, logits=FULL.logits),
    "relation": dataclasses.replace(NOTHING, relation=FULL.relation),
    "imitation + logits": dataclasses.replace(FULL, relation=0),
    "all": FULL,
}
RESULTS = Path(__file__).parent / "results" / "digits_study.json"


@dataclasses.dataclass(frozen=True)
class Job:
    """One training: an arm, a seed, and what all jobs of a study share."""

    arm: str
    seed: int
    iterations: int
    warm_start: bool
    scenes: tuple[int, int]
    cache: Path
    teacher: Path

    @property
    def key(self) -> str:
        """Name of the training in the results file."""
        start = "warm" if self.warm_start else "cold"
        return f"{start}, {self.iterations} iterations, {self.arm}, seed {self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """Everything the numbers depend on; another value means another training."""
        known = ARMS[self.arm]
        return {
            "knowledge": None if known is None else dataclasses.asdict(known),
            "recipe": dataclasses.asdict(Recipe(self.iterations, seed=self.seed, evaluations=1)),
            "scenes": SceneSettings(*self.scenes).fingerprint(),
            "teacher": hashlib.sha256(self.teacher.read_bytes()).hexdigest()[:16],
            "warm_start": self.warm_start,
        }

    def run(self) -> dict[str, Any]:
        """Train and evaluate; the first training of a warm start is shared by the arms."""
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        data = load_digits(self.cache, SceneSettings(*self.scenes))
        classes = data.num_classes
        recipe = Recipe(self.iterations, seed=self.seed, evaluations=1)
        teacher = build_detector("small-teacher", classes, weights=str(self.teacher))
        experiment = Experiment(
            data, lambda: build_detector("small-student", classes), recipe, teacher, curve_images=1
        )
        start = None
        if self.warm_start:
            stamp = f"{SceneSettings(*self.scenes).fingerprint()}_{self.iterations}_{self.seed}"
            state = self.cache / f"warm_{stamp}.pt"
            first = experiment.train("first", state=state, resume=True)
            start = first.model.state_dict()
        trainer = experiment.train(self.key, ARMS[self.arm], start=start)
        return {
            "key": self.key,
            "arm": self.arm,
            "seed": self.seed,
            **evaluate(trainer.model, data),
            "seconds": round(trainer.run.seconds, 1),
            "settings": self.settings,
            "environment": environment(),
        }


def environment() -> dict[str, Any]:
    """Where the numbers were made."""
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True
    )
    return {
        "commit": commit.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def missing(jobs: Sequence[Job], results: dict[str, Any]) -> list[Job]:
    """The jobs the results do not hold, or hold with other settings."""
    return [
        job for job in jobs if results.get(job.key, {}).get("settings") != as_json(job.settings)
    ]


def as_json(value: Any) -> Any:
    """`value` as it comes back from a file."""
    return json.loads(json.dumps(value))


def work(jobs: Sequence[Job], processes: int) -> Iterator[dict[str, Any]]:
    """The results of the jobs, as they come."""
    if processes == 1:
        yield from (job.run() for job in jobs)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(job.run) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def table(results: Sequence[dict[str, Any]]) -> str:
    """Mean and standard deviation of each arm, and the difference to "none" seed by seed."""
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        by_arm.setdefault(result["arm"], {})[result["seed"]] = result
    plain = by_arm.get("none", {})
    lines = [f"{'arm':28} seeds" + "".join(f"{m:>13}" for m in METRICS) + "   AP gain   seconds"]
    for arm, runs in by_arm.items():
        cells = "".join(f"{_spread([100 * r[m] for r in runs.values()]):>13}" for m in METRICS)
        gains = [100 * (runs[seed]["AP"] - plain[seed]["AP"]) for seed in runs if seed in plain]
        gain = _spread(gains) if gains and arm != "none" else "-"
        seconds = mean(run["seconds"] for run in runs.values())
        lines.append(f"{arm:28} {len(runs):>5}{cells}{gain:>14}{seconds:>8.0f}")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.1f} ± {stdev(values) if len(values) > 1 else float('nan'):.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--warm-start", action="store_true", help="all arms from a trained student")
    parser.add_argument("--scenes", type=int, nargs=2, default=(8000, 600))
    parser.add_argument("--teacher", type=Path, default=SHIPPED_TEACHER)
    parser.add_argument("--cache", type=Path, default=storage.cache_folder())
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--processes", type=int, default=1, help="trainings at a time, a core each")
    args = parser.parse_args(arguments)
    shared = args.iterations, args.warm_start, tuple(args.scenes), args.cache, args.teacher
    jobs = [Job(arm, seed, *shared) for seed in args.seeds for arm in args.arms]
    results = json.loads(args.results.read_text()) if args.results.is_file() else {}
    load_digits(args.cache, SceneSettings(*args.scenes))  # drawn once, before all processes want it
    try:
        for result in work(missing(jobs, results), args.processes):
            results[result["key"]] = result
            args.results.parent.mkdir(parents=True, exist_ok=True)
            args.results.write_text(json.dumps(results, indent=1) + "\n")
    except KeyboardInterrupt:
        raise SystemExit("Interrupted; the same command goes on after the last result.") from None
    print(table([results[job.key] for job in jobs]))


if __name__ == "__main__":
    main()
