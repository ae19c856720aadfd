"""How far are streamed prototypes from those of a fresh pass? python -m benchmarks.digits.streaming

While the student of `torchvision_frcnn.py` is distilled, observers collect the rows that the loss
collects and forget them at intervals of their own. At some iterations each makes its prototypes.
Beside them stand those of a fresh pass over all training images, and those of the same pass with
another sample: so much lies in the choice of the sample alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from global_kd import PrototypeBank, PrototypeGenerator, Targets
from global_kd.functional import robust_weights
from global_kd.instances import pool_levels
from workshop import storage
from workshop.detection_data import Batch, epoch_batches, first_batches, load_digits
from workshop.detectors import SHIPPED_TEACHER, build_detector
from workshop.digit_scenes import SceneSettings
from workshop.distillation import STUDIED
from workshop.environment import environment
from workshop.training import Recipe, Trainer

RESULTS = Path(__file__).parents[1] / "results" / "digits" / "streaming.json"
BATCH = 25


class Observer:
    """A generator that is emptied every so many iterations; 0: never."""

    def __init__(self, generator: PrototypeGenerator, interval: int) -> None:
        self.generator, self.interval = generator, interval

    def begin(self, iteration: int) -> None:
        """Before an iteration."""
        if self.interval and iteration % self.interval == 0:
            self.generator.reset()


@torch.no_grad()
def pooled(
    model: Any, batches: Iterable[Batch], strides: Sequence[float]
) -> tuple[Tensor, Targets]:
    """Rows `(L, R, C)` of all boxes, in eval mode, and the boxes."""
    training = model.training
    model.eval()
    rows, parts = [], []
    for images, targets in batches:
        transformed, truth = model.transform(list(images), [dict(t) for t in targets])
        parts.append(Targets.from_list(truth))
        maps = list(model.backbone(transformed.tensors).values())[: len(strides)]
        rows.append(pool_levels(maps, parts[-1], strides))
    model.train(training)
    columns = [torch.cat([getattr(p, n) for p in parts]) for n in ("boxes", "labels", "ids")]
    return torch.cat(rows, dim=1), Targets(
        columns[0], columns[1], torch.zeros_like(columns[1]), columns[2]
    )


def omega(bank: PrototypeBank, rows: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
    """Robust weights `(L, R)` under a bank."""
    g_s, g_t, classes = bank.flat()
    return robust_weights(*rows, g_s, g_t, classes, labels)


def staleness(bank: PrototypeBank, rows: Tensor, ids: Tensor) -> dict[str, float]:
    """Streamed student rows beside the rows of the same instances in the fresh pass."""
    order = ids.argsort()
    level, _, _ = bank.valid.nonzero().T
    place = order[torch.searchsorted(ids[order], bank.ids[bank.valid])]
    mine, now = bank.student[bank.valid], rows[level, place]
    gap = (mine - now).norm(dim=1) / now.norm(dim=1)
    return {
        "cosine of a row to itself now": float(nn.functional.cosine_similarity(mine, now).mean()),
        "relative distance of a row to itself now": float(gap.mean()),
    }


def compare(weights: Tensor, others: Tensor) -> dict[str, float]:
    """Two sets of robust weights of the same instances."""
    pair = torch.stack([weights.flatten(), others.flatten()])
    return {
        "mean difference of omega": float((weights - others).abs().mean()),
        "correlation of omega": float(torch.corrcoef(pair)[0, 1]),
    }


def study(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One training; a row for every iteration looked at and every way to collect."""
    torch.set_num_threads(1)
    data = load_digits(args.cache, SceneSettings(*args.scenes))
    teacher = build_detector("small-teacher", data.num_classes, weights=str(SHIPPED_TEACHER))
    torch.manual_seed(args.seed)
    student = build_detector("small-student", data.num_classes)
    knowledge, recipe = STUDIED, Recipe(max(args.at), seed=args.seed)
    kd = knowledge.distiller(student, teacher, data.num_classes, recipe.iterations, args.seed)
    trainer, strides = Trainer(student, recipe, kd), kd.loss.rdm.strides

    def generator(seed: int = 0) -> PrototypeGenerator:
        return PrototypeGenerator(
            data.num_classes,
            knowledge.num_prototypes,
            min_side=knowledge.min_side,
            max_instances=args.per_class,
            seed=seed,
        )

    observers = [Observer(generator(), interval) for interval in args.intervals]
    collect = kd.loss.generator.add

    def fan(mine: Tensor, theirs: Tensor, targets: Targets) -> None:
        collect(mine, theirs, targets)
        for observer in observers:
            observer.generator.add(mine, theirs, targets)

    kd.loss.generator.add = fan  # type: ignore[assignment, method-assign]
    count = len(data.train)
    # The teacher is frozen: its rows are the same in every pass.
    theirs, truth = pooled(teacher, first_batches(data.train, count, BATCH), strides)
    held, judged = pooled(teacher, first_batches(data.validation, args.judged, BATCH), strides)
    assert truth.ids is not None
    found: list[dict[str, Any]] = []
    epoch, last = 0, max(args.at)
    while True:
        for batch in epoch_batches(data.train, 16, seed=args.seed, epoch=epoch, flip=recipe.flip):
            now = trainer.run.iteration
            if now in args.at:
                print(f"iteration {now}", flush=True)
                mine, _ = pooled(student, first_batches(data.train, count, BATCH), strides)
                seen, _ = pooled(
                    student, first_batches(data.validation, args.judged, BATCH), strides
                )
                fresh = [generator(seed) for seed in (0, 1)]
                for each in fresh:
                    each.add(mine, theirs, truth)
                banks = [each.generate() for each in fresh]
                weights = [omega(bank, (seen, held), judged.labels) for bank in banks]
                found.append(
                    {
                        "iteration": now,
                        "collected": "another sample of the fresh pass",
                        **compare(weights[1], weights[0]),
                    }
                )
                for observer in observers:
                    bank = observer.generator.generate()
                    found.append(
                        {
                            "iteration": now,
                            "collected": observer.interval,
                            "instances": len(observer.generator),
                            **compare(omega(bank, (seen, held), judged.labels), weights[0]),
                            **staleness(bank, mine, truth.ids),
                        }
                    )
            if now == last:
                return found
            for observer in observers:
                observer.begin(now)
            trainer.step(batch)
        epoch += 1


def table(rows: Sequence[dict[str, Any]]) -> str:
    """As text."""
    names = [
        "mean difference of omega",
        "correlation of omega",
        "cosine of a row to itself now",
        "relative distance of a row to itself now",
    ]
    lines = [
        f"{'iteration':>9}  {'forgets every':>32}  omega differs  correlates  cosine  distance"
    ]
    for row in rows:
        how = row["collected"]
        how = {0: "never"}.get(how, f"{how} iterations") if isinstance(how, int) else how
        values = [f"{row[n]:.3f}" if n in row else "-" for n in names]
        lines.append(
            f"{row['iteration']:>9}  {how:>32}  {values[0]:>13}  {values[1]:>10}  {values[2]:>6}  "
            f"{values[3]:>8}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--at", type=int, nargs="+", default=(100, 200, 400, 800), help="iterations to look at"
    )
    parser.add_argument("--intervals", type=int, nargs="+", default=(25, 100, 400, 0))
    parser.add_argument("--per-class", type=int, default=200, help="sample of every generator")
    parser.add_argument("--scenes", type=int, nargs=2, default=(2000, 600))
    parser.add_argument("--judged", type=int, default=200, help="validation images for omega")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=storage.cache_folder())
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    rows = study(args)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(args).items() if k not in ("cache", "results")}
    result = {"rows": rows, "settings": settings, "environment": environment()}
    args.results.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
