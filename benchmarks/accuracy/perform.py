"""One trial from its declaration to its result; resumable, on a CPU to the last bit."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from global_kd import Distiller
from global_kd.instances import assign_levels
from workshop import storage
from workshop.coco_eval import evaluate
from workshop.detection_data import DetectionData, first_batches, pair_scenes, to_device
from workshop.detectors import SHIPPED_TEACHER, load_weights, teacher_fingerprint
from workshop.digit_scenes import DigitScenes, load_digit_scenes
from workshop.distillation import Experiment
from workshop.small_detectors import SIZES, Size, small_faster_rcnn
from workshop.training import Recipe

from ..digits.disturbances import KINDS, Disturbance, disturb
from ..digits.suspicion import area_under_roc
from ..environment import environment
from . import pace, pictures
from .declaration import TRAINING_SCENES_SEED, Data, Others, Pictures, Table, Trial, declared
from .store import Store

EVALUATIONS = 4  # points of the AP curve
PICTURES_EVALUATIONS = 2  # the same where scoring is a larger part of the work
CURVE_SCENES = 100  # behind each of them; the final scores are those of all validation scenes
OMEGA_SCENES = 1000  # in which disturbed instances are looked for
BATCH = 25
CALIBRATED = 4  # batches on which shares of the gradient are measured


def perform(trial: Trial, store: Store, device: str = "cpu") -> None:
    """Train as far as it is not trained, evaluate, and keep the result.

    Raises:
        Interrupted: On SIGINT or SIGTERM while it trains; called again, it goes on from there.
    """
    began = time.perf_counter()
    if device == "cpu":
        torch.set_num_threads(1)  # or several threads would add gradients up in a random order
        torch.use_deterministic_algorithms(True, warn_only=True)
    data, disturbed = load_data(trial, store)
    described: dict[str, Any] = {
        "identity": trial.identity,
        "declaration": declared(trial),
        "environment": environment(torch.device(device)),
    }
    if isinstance(trial.data, Pictures):
        described["data"] = pictures.described(trial.data, data)
    if (teacher := shipped(trial)) is not None:
        teacher.to(device)
        storage.save(teacher.state_dict(), store.weights(trial))
        scores = evaluate(teacher, data, label=None)
        store.write(trial, {**described, "scores": scores, "shipped": SHIPPED_TEACHER.name})
        return
    state = store.state(trial)
    iterations = trial.iterations
    if trial.time_of is not None:
        iterations = equal_time(trial, trial.time_of, data, store, device)
    experiment = experiment_of(trial, data, store, device, iterations)
    state.parent.mkdir(parents=True, exist_ok=True)
    try:
        trainer = experiment.train(
            trial.identity,
            trial.method,
            start=None if trial.start is None else trained(trial.start, store).state_dict(),
            state=state,
            resume=True,
            begin=lambda kd: begin(trial, kd, data, device),
        )
    except SystemExit as error:
        if not str(error).startswith("Training diverged"):
            raise
        # Where arms diverge they must not go missing from the tables.
        store.write(trial, {**described, "failed": str(error)})
        state.unlink(missing_ok=True)
        return
    run = trainer.run
    result: dict[str, Any] = {
        **described,
        "scores": evaluate(trainer.model, data, label=None),
        "iterations": run.iteration,
        "seconds": round(run.seconds, 3),
        "curve": run.scores,
        "losses": run.losses[:: max(1, len(run.losses) // 50)],
        "telemetry": run.telemetry,
    }
    if trainer.kd is not None and disturbed.any() and by_omega(trainer.kd):
        result["omega_separates"] = separation(trainer.kd, data, disturbed, device)
    result["last_slice_seconds"] = round(time.perf_counter() - began, 1)
    if trial.method is None:  # teachers and warm starts are such
        storage.save(trainer.model.state_dict(), store.weights(trial))
    store.write(trial, result)
    state.unlink(missing_ok=True)


def experiment_of(
    trial: Trial, data: DetectionData, store: Store, device: str, iterations: int
) -> Experiment:
    """The experiment of which a trial is one training."""
    return Experiment(
        data,
        lambda: build(trial),
        Recipe(
            iterations,
            trial.batch_size,
            trial.lr,
            seed=trial.training_seed,
            flip=data.flip,
            evaluations=EVALUATIONS if isinstance(trial.data, Data) else PICTURES_EVALUATIONS,
        ),
        None if trial.teacher is None else trained(trial.teacher, store).to(device),
        device=device,
        curve_images=CURVE_SCENES,
    )


def by_omega(kd: Distiller) -> bool:
    """Whether there are robust weights of prototypes."""
    keeper: Any = dict(kd.losses.items()).get("global_knowledge")
    return keeper is not None and keeper.rdm.robust_by == "omega" and bool(keeper.bank.valid.any())


def begin(trial: Trial, kd: Distiller, data: DetectionData, device: str) -> None:
    """What a method does before the first iteration."""
    if isinstance(trial.method, Others):
        images = CALIBRATED * trial.batch_size
        batches = first_batches(data.train, images, trial.batch_size)
        trial.method.begin(kd, to_device(batches, device))


def equal_time(trial: Trial, other: Trial, data: DetectionData, store: Store, device: str) -> int:
    """As many iterations without distillation as take the time of `other`.

    By the pace of both by turns, half of it from their start, half from the weights that a
    training without distillation ends with. An unfinished training keeps the number it began with.
    """
    if (state := store.state(trial)).is_file():
        return int(storage.load(state)["recipe"]["iterations"])
    images = (pace.WARM_UP + pace.STEPS) * trial.batch_size
    batches = [*to_device(first_batches(data.train, images, trial.batch_size), device)]
    plain = trial.plain()
    starts = [None if trial.start is None else trained(trial.start, store), trained(plain, store)]
    spent = torch.zeros(2)
    for start in starts:
        trainers = [
            experiment_of(x, data, store, device, trial.iterations).prepare(
                x.method, None if start is None else start.state_dict()
            )
            for x in (other, plain)
        ]
        spent += torch.tensor(pace.seconds(trainers, batches))
    return max(1, round(trial.iterations * float(spent[0] / spent[1])))


def steps(table: Table, store: Store, device: str = "cpu") -> list[float]:
    """Seconds that steps of each arm take, by turns in one process, from random weights."""
    data, _ = load_data(table.arms[0].trial, store)
    images = (pace.WARM_UP + pace.STEPS) * table.arms[0].trial.batch_size
    batch_size = table.arms[0].trial.batch_size
    batches = [*to_device(first_batches(data.train, images, batch_size), device)]
    trainers = []
    for arm in table.arms:
        trial = arm.trial
        trainer = experiment_of(trial, data, store, device, trial.iterations).prepare(trial.method)
        if trainer.kd is not None:
            begin(trial, trainer.kd, data, device)
        trainers.append(trainer)
    return pace.seconds(trainers, batches)


def load_data(trial: Trial, store: Store) -> tuple[DetectionData, Tensor]:
    """The data of a trial, and bool (R, 4): which training instances are disturbed how.

    Of pictures (R, 1): whose label is wrong.
    """
    if isinstance(trial.data, Pictures):
        found, wrong = pictures.load(trial.data, store.root, store.cache)
        return found, wrong[:, None]
    folders = store.scenes(trial)
    train = load_digit_scenes("train", trial.data.settings(TRAINING_SCENES_SEED), folders["train"])
    validation = load_digit_scenes(
        "validation", trial.data.settings(trial.validation_seed), folders["validation"]
    )
    train, disturbed = disturb(
        first_scenes(train, round(trial.data.share * len(train))), trial.data.disturbance
    )
    return pair_scenes(train, validation), disturbed


def first_scenes(scenes: DigitScenes, count: int) -> DigitScenes:
    """The first `count` scenes."""
    end = int(scenes.first[count])
    return DigitScenes(
        scenes.images[:count], scenes.boxes[:end], scenes.labels[:end], scenes.first[: count + 1]
    )


def build(trial: Trial) -> nn.Module:
    """The student of a trial with random weights, or those of ImageNet where it declares them."""
    classes, side = len(trial.class_names), trial.data.side
    if isinstance(trial.student, Size):
        return small_faster_rcnn(trial.student, classes, side)
    return trial.student.detector(classes, side)


def trained(trial: Trial, store: Store) -> nn.Module:
    """The detector that a finished trial ended with."""
    model = build(trial)
    load_weights(model, store.weights(trial), len(trial.class_names))
    return model


def shipped(trial: Trial) -> nn.Module | None:
    """The teacher that lies beside the examples, where this trial is how it was trained."""
    data = trial.data
    if not isinstance(data, Data):
        return None
    whole = data.share == 1 and data.disturbance == Disturbance()
    plain = trial.method is None and trial.start is None
    if not (plain and whole and trial.student == SIZES["small-teacher"]):
        return None
    recipe = Recipe(trial.iterations, trial.batch_size, trial.lr, seed=trial.training_seed)
    stored = storage.load(SHIPPED_TEACHER)
    settings = data.settings(TRAINING_SCENES_SEED)
    if not isinstance(stored, dict) or stored.get("fingerprint") != teacher_fingerprint(
        settings, recipe
    ):
        return None
    model = build(trial)
    load_weights(model, SHIPPED_TEACHER, len(trial.class_names))
    return model


def separation(
    kd: Distiller, data: DetectionData, disturbed: Tensor, device: str
) -> dict[str, float]:
    """For each kind, how well a low omega tells disturbed instances from clean ones.

    The area under the ROC curve on the first training scenes: 1 is apart, 0.5 is chance. Omega is
    that of the level of the box's size.
    """
    omegas = []
    batches = first_batches(data.train, OMEGA_SCENES, BATCH)
    for images, targets in to_device(batches, device):
        boxes, omega = kd.weigh(images, targets)
        level = assign_levels(boxes.boxes, kd.loss.rdm.strides, kd.loss.rdm.finest_scale)
        omegas.append(omega.gather(0, level[None])[0].cpu())
    low = 1 - torch.cat(omegas)
    disturbed = disturbed[: len(low)]
    clean = ~disturbed.any(dim=1)
    areas = {}
    for n, kind in enumerate(KINDS[: disturbed.shape[1]]):
        met = disturbed[:, n]
        if met.any() and clean.any():
            asked = met | clean
            areas[kind] = area_under_roc(low[asked], met[asked])
    return areas
