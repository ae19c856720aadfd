"""Does a low omega find wrong labels? python -m benchmarks.digits.label_errors --images docs/images

A share of the training labels and boxes is made wrong on purpose, a student is distilled on them,
and every training instance is scored by its omega and by the obvious alternatives (`RULES`). The
results file is written after every training, and what it already holds is not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from global_kd import Distiller
from global_kd.instances import assign_levels
from workshop import storage
from workshop.coco_eval import evaluate
from workshop.detection_data import DetectionData, box_id, first_batches, load_digits
from workshop.detectors import SHIPPED_TEACHER, build_detector
from workshop.digit_scenes import SceneSettings
from workshop.distillation import STUDIED
from workshop.environment import environment
from workshop.plots import draw_prototypes_by_level
from workshop.source_digest import source_digest
from workshop.training import Interrupted, Recipe, Scores, Trainer

from .corruption import CLEAN, KINDS, LABEL, MOVED, SHIFTED, Corrupted, corrupt
from .label_plots import draw_label_errors, draw_omega
from .suspicion import RULES, area_under_roc, precision_at, suspicions

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "digits" / "label_errors.json"
KNOWLEDGE = dataclasses.replace(STUDIED, prototype_images=300)
SHARE = 0.05  # of wrong labels, of wrong boxes, and of the instances a person would look at
BATCH = 25
EVERY = 50  # iterations between two looks at omega, and between two sets of prototypes
QUESTIONS = {
    "label": (LABEL,),
    "shifted": (SHIFTED,),
    "moved": (MOVED,),
    "box": (SHIFTED, MOVED),
    "any": (LABEL, SHIFTED, MOVED),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One training on corrupted scenes, and the search for the errors in them.

    `teacher` is "clean" (the shipped one, which never saw a wrong label, nor these scenes) or
    "noisy": trained on the same corrupted scenes as the student.
    """

    teacher: str
    seed: int
    iterations: int
    teacher_iterations: int
    scenes: tuple[int, int]
    held_out: int
    cache: Path

    @property
    def key(self) -> str:
        """Name of the job in the results file."""
        return f"{self.teacher} teacher, {self.iterations} iterations, seed {self.seed}"

    @property
    def scene_settings(self) -> SceneSettings:
        """Another seed than the default: the shipped teacher was trained on other scenes."""
        return SceneSettings(*self.scenes, seed=1)

    @property
    def training(self) -> dict[str, Any]:
        """Everything the trained student depends on."""
        clean = self.teacher == "clean"
        shipped = hashlib.sha256(SHIPPED_TEACHER.read_bytes()).hexdigest()[:16]
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "teacher": shipped if clean else dataclasses.asdict(self.teacher_recipe),
            "knowledge": dataclasses.asdict(KNOWLEDGE),
            "scenes": self.scene_settings.fingerprint(),
            "share": SHARE,
            "corruption": source_digest(str(HERE / "corruption.py"))[:16],
            "held-out scenes": self.held_out,
        }

    @property
    def settings(self) -> dict[str, Any]:
        """Everything the numbers depend on; another value means another job."""
        return {**self.training, "rules": source_digest(str(HERE / "suspicion.py"))[:16]}

    @property
    def recipe(self) -> Recipe:
        """How the student is trained; it looks at omega at every "evaluation"."""
        looks = max(1, self.iterations // EVERY)
        return Recipe(self.iterations, seed=self.seed, evaluations=looks)

    @property
    def teacher_recipe(self) -> Recipe:
        """How a noisy teacher is trained."""
        return Recipe(self.teacher_iterations, seed=self.seed, evaluations=1)

    @cached_property
    def clean_data(self) -> DetectionData:
        """The scenes as they are."""
        return load_digits(self.cache, self.scene_settings)

    @cached_property
    def corrupted(self) -> Corrupted:
        """The training scenes with errors; the seed decides which."""
        return corrupt(self.clean_data.train, SHARE, self.seed)  # type: ignore[arg-type]

    @cached_property
    def data(self) -> DetectionData:
        """What is trained on: training scenes with errors, validation scenes without."""
        return dataclasses.replace(self.clean_data, train=self.corrupted.scenes)

    def _state(self, name: str) -> Path:
        """File of a training in the cache; trainings that differ in anything have other files."""
        text = json.dumps(self.training, sort_keys=True)
        return self.cache / f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:16]}.pt"

    def make_teacher(self) -> nn.Module:
        """The shipped teacher, or one trained on the errors, as far as it is not yet trained."""
        classes = self.data.num_classes
        if self.teacher == "clean":
            return build_detector("small-teacher", classes, weights=str(SHIPPED_TEACHER))
        torch.manual_seed(self.seed)
        trainer = Trainer(build_detector("small-teacher", classes), self.teacher_recipe)
        state = self._state("teacher")
        if state.is_file():
            trainer.load(state)
        trainer.fit(self.data.train, label=f"teacher, seed {self.seed}", state=state)
        return trainer.model

    def train(self) -> tuple[Trainer, Distiller, nn.Module]:
        """The student, its distiller and its teacher, as far as they are not yet trained.

        Prototypes are made anew at every look at omega, in eval mode, from the first training
        scenes, errors included.
        """
        teacher, data, recipe = self.make_teacher(), self.data, self.recipe
        torch.manual_seed(self.seed)
        student = build_detector("small-student", data.num_classes)
        kd = KNOWLEDGE.distiller(student, teacher, data.num_classes, recipe.iterations, recipe.seed)
        trainer, state = Trainer(student, recipe, kd), self._state("student")

        def look(model: nn.Module) -> Scores:
            images = first_batches(data.train, KNOWLEDGE.prototype_images, BATCH)
            kd.refresh(images, progress=False)
            return mean_omega(kd, data, self.held_out)

        if state.is_file():
            trainer.load(state)
        else:
            trainer.run.scores.append({"iteration": 0, **look(student)})
        trainer.fit(data.train, label=self.key, state=state, evaluate=look)
        return trainer, kd, teacher

    def score(self, kd: Distiller, student: nn.Module, teacher: nn.Module) -> dict[str, Tensor]:
        """Every training instance by every rule, with prototypes of all training scenes."""
        everything = len(self.data.train)
        kd.refresh(first_batches(self.data.train, everything, BATCH), progress=False)
        batches = first_batches(self.data.train, everything, BATCH)
        return suspicions(kd, student, teacher, batches, KNOWLEDGE.finest_scale)

    def run(self) -> dict[str, Any]:
        """Train, score, and see which rule finds the errors."""
        trainer, kd, teacher = self.train()
        values, kind = self.score(kd, trainer.model, teacher), self.corrupted.kind
        return {
            "key": self.key,
            "teacher": self.teacher,
            "seed": self.seed,
            "instances": {name: int((kind == k).sum()) for k, name in enumerate(KINDS)},
            "rules": {rule: judge(value, kind) for rule, value in values.items()},
            "mean omega": {
                name: float(1 - values["omega"][kind == k].mean()) for k, name in enumerate(KINDS)
            },
            "wrong prototypes": wrong_prototypes(kd, self.corrupted),
            "omega over training": trainer.run.scores,
            "student": evaluate(trainer.model, self.data, label=None),
            "teacher AP": evaluate(teacher, self.data, label=None)["AP"],
            "settings": self.settings,
            "environment": environment(),
        }


def mean_omega(kd: Distiller, data: DetectionData, scenes: int) -> Scores:
    """Mean omega of the instances in the first validation scenes, on the level of their size.

    Of all of them, and of the "small", "medium" and "large" by the areas of the data set.
    """
    omegas, areas = [], []
    for batch in first_batches(data.validation, scenes, BATCH):
        boxes, omega = kd.weigh(*batch)
        level = assign_levels(boxes.boxes, kd.loss.rdm.strides, KNOWLEDGE.finest_scale)
        omegas.append(omega.gather(0, level[None])[0])
        areas.append((boxes.boxes[:, 2:] - boxes.boxes[:, :2]).prod(dim=1))
    omega, area = torch.cat(omegas), torch.cat(areas)
    size = torch.bucketize(area, torch.tensor(data.areas))
    found = {"all": float(omega.mean())}
    for number, name in enumerate(("small", "medium", "large")):
        if bool((size == number).any()):
            found[name] = float(omega[size == number].mean())
    return found


def judge(suspicion: Tensor, kind: Tensor) -> dict[str, dict[str, float]]:
    """For each of the `QUESTIONS`, how well a rule tells these errors from clean instances."""
    found = {}
    for question, kinds in QUESTIONS.items():
        wrong = torch.isin(kind, torch.tensor(kinds))
        asked = wrong | (kind == CLEAN)
        value, wrong = suspicion[asked], wrong[asked]
        found[question] = {
            "area under ROC": area_under_roc(value, wrong),
            "precision": precision_at(value, wrong, SHARE),
            "share wrong": float(wrong.float().mean()),
        }
    return found


def wrong_prototypes(kd: Distiller, corrupted: Corrupted) -> list[float]:
    """Of each level's prototypes, the share that are corrupted instances."""
    wrong = torch.tensor(sorted(wrong_numbers(corrupted)))
    return [
        float(torch.isin(ids[valid], wrong).float().mean())
        for ids, valid in zip(kd.loss.bank.ids, kd.loss.bank.valid, strict=True)
    ]


def wrong_numbers(corrupted: Corrupted) -> set[int]:
    """The numbers (`box_id`) of the corrupted instances."""
    rows = (corrupted.kind != CLEAN).nonzero()[:, 0]
    first = corrupted.scenes.first
    scene = torch.searchsorted(first, rows, right=True) - 1
    boxes = (rows - first[scene]).tolist()
    return {box_id(image, box) for image, box in zip(scene.tolist(), boxes, strict=True)}


def table(results: Sequence[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds of one teacher, as Markdown."""
    columns = ("label", "shifted", "moved", "any")
    looked_at = ("label", "box", "any")
    head = [
        "rule",
        *(f"ROC: {name}" for name in columns),
        *(f"top {SHARE:.0%}: {name}" for name in looked_at),
    ]
    lines = [_row(head), _row(["---"] * len(head))]
    for rule, text in RULES.items():
        judged = [result["rules"][rule] for result in results]
        areas = [_spread([j[name]["area under ROC"] for j in judged]) for name in columns]
        hits = [f"{mean(j[name]['precision'] for j in judged):.0%}" for name in looked_at]
        lines.append(_row([text, *areas, *hits]))
    chance = [f"{mean(r['rules']['omega'][q]['share wrong'] for r in results):.0%}"
              for q in looked_at]  # fmt: skip
    lines.append(_row(["chance", *["0.50"] * len(columns), *chance]))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}"


def draw(job: Job, results: Sequence[dict[str, Any]], folder: Path) -> None:
    """The pictures: of the instances from one job, of numbers from all results of its teacher."""
    trainer, kd, teacher = job.train()
    values = job.score(kd, trainer.model, teacher)
    folder.mkdir(parents=True, exist_ok=True)
    corrupted, data = job.corrupted, job.data
    draw_label_errors(corrupted, values, data.class_names, folder / "label_errors.png")
    draw_omega(results, data.areas, folder / "omega_over_training.png")
    path = folder / "prototypes_by_level.png"
    draw_prototypes_by_level(kd, data, path, marked=wrong_numbers(corrupted))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--teachers", nargs="+", choices=("clean", "noisy"), default=["clean"])
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--teacher-iterations", type=int, default=800, help="of a noisy teacher")
    parser.add_argument("--scenes", type=int, nargs=2, default=(2000, 300))
    parser.add_argument("--cache", type=Path, default=storage.cache_folder() / "label_errors")
    parser.add_argument("--results", type=Path, help=f"default {RESULTS}")
    parser.add_argument("--images", type=Path, help="folder for the pictures, of the first seed")
    parser.add_argument("--quick", action="store_true", help="a try of seconds; nothing to quote")
    args = parser.parse_args(arguments)
    if args.quick:
        args.iterations, args.teacher_iterations, args.scenes = 2, 2, (60, 20)
        args.cache = args.cache / "quick"  # or it would take the place of the real scenes
        args.results = args.results or args.cache / "label_errors.json"
    args.results = args.results or RESULTS
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    shared = args.iterations, args.teacher_iterations, tuple(args.scenes), 150, args.cache
    jobs = [Job(teacher, seed, *shared) for teacher in args.teachers for seed in args.seeds]
    results = json.loads(args.results.read_text()) if args.results.is_file() else {}
    try:
        for job in jobs:
            as_kept = json.loads(json.dumps(job.settings))
            if results.get(job.key, {}).get("settings") != as_kept:
                results[job.key] = job.run()
                args.results.parent.mkdir(parents=True, exist_ok=True)
                args.results.write_text(json.dumps(results, indent=1) + "\n")
        for teacher in args.teachers:
            mine = [results[job.key] for job in jobs if job.teacher == teacher]
            print(f"\n{teacher} teacher\n\n{table(mine)}")
        if args.images is not None:
            first = args.teachers[0]
            mine = [results[job.key] for job in jobs if job.teacher == first]
            draw(jobs[0], mine, args.images)
    except (Interrupted, KeyboardInterrupt):
        raise SystemExit("Interrupted; the same command goes on where it stopped.") from None


if __name__ == "__main__":
    main()
