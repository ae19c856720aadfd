"""Which weight tells wrong labels on real pictures: omega, or the teacher's confidence?"""

from __future__ import annotations

from typing import Any

import torch

from global_kd import Distiller
from workshop.detection_data import first_batches

from ..digits.suspicion import RULES, area_under_roc, suspicions
from .declaration import CLASSES, Pictures
from .perform import trained
from .pictures import load, mislabelled
from .real import Real
from .store import Store

SHARE = 0.3
BATCH = 8


def areas(source: str, store: Store) -> dict[str, Any]:
    """Areas under the ROC curve by rule, of `SHARE` wrong labels on pictures not trained on.

    Prototypes are those of the training pictures, as many of whose labels are wrong; the student is
    that of the first seed without distillation, the teacher knew better.

    Raises:
        SystemExit: That student was not trained yet.
    """
    real = Real(source)
    start = real.student()
    if not store.weights(start).is_file():
        raise SystemExit(f"Train the student first: run --data {source} --only {source}-q1-time")
    student, teacher = trained(start, store), trained(real.teacher(), store)
    data, _ = load(Pictures(source, wrong_labels=SHARE), store.root, store.cache)
    held_out: Any = data.validation
    seen, wrong = mislabelled(held_out, SHARE, len(CLASSES[source]))
    method = real.method()
    kd: Distiller = method.distiller(student, teacher, len(CLASSES[source]), 10**6, 0)
    kd.refresh(first_batches(data.train, len(data.train), BATCH), progress=False)
    batches = first_batches(seen, len(seen), BATCH)
    found = suspicions(kd, student, teacher, batches, method.finest_scale)
    kd.detach()
    return {
        "student": start.identity,
        "share": SHARE,
        "instances": len(wrong),
        "areas": {rule: round(area_under_roc(found[rule], wrong), 4) for rule in RULES},
        "mean confidence": {
            name: round(float(torch.exp(-found["teacher class"][mask]).mean()), 4)
            for name, mask in (("right", ~wrong), ("wrong", wrong))
        },
    }
