"""Bugs planted on purpose, to see whether a test notices: `python -m tests.planted [--only WORD]`.

Each is one replacement in a copy of this checkout, and the tests that should turn red. It prints
what was noticed and what survived, and exits with 1 if anything did. Some take as long as their
tests, minutes for all of them; `tests/test_planted.py` keeps the list in step with the source.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = ("global_kd", "tests", "examples", "benchmarks", "docs")


class Plant(NamedTuple):
    """What is wrong, where, what stands there, what is put there, and who should notice."""

    what: str
    file: str
    right: str
    wrong: str
    tests: str


PLANTS = [
    Plant(
        "imitation in half precision: half the gradient on a processor",
        "ops/imitation.py",
        "factor *= 2\n",
        "factor *= 1\n",
        "tests/losses/test_imitation.py tests/ops",
    ),
    Plant(
        "a zero row has a gradient",
        "ops/cosine.py",
        "torch.where(zero, torch.zeros_like(x), scaled / length)",
        "scaled / length",
        "tests/test_robust.py tests/losses/test_relation.py",
    ),
    Plant(
        "soft labels take the omega of another box where boxes are proposals",
        "losses/global_knowledge.py",
        "row = row[positives.rows]",
        "row = row[: len(positives.student_logits)]",
        "tests/losses/test_global_knowledge.py",
    ),
    Plant(
        "soft labels take the omega of the first box",
        "losses/robust_distill.py",
        "[0][logit_box]",
        "[0][logit_box * 0]",
        "tests/losses/test_robust_distill.py",
    ),
    Plant(
        "no omega where only soft labels are weighed",
        "losses/robust_distill.py",
        'or ("logits" in self.robust and self.logits > 0)',
        "or False",
        "tests/losses/test_robust_distill.py",
    ),
    Plant(
        "only the student's prototypes are centred",
        "losses/robust_distill.py",
        "t - middle_t, g_t - middle_t",
        "t - middle_t, g_t",
        "tests/losses/test_robust_distill.py",
    ),
    Plant(
        "the mean of a half-empty bank counts its empty slots",
        "losses/robust_distill.py",
        "filled.sum(dim=1, keepdim=True).clamp(min=1)",
        "filled.shape[1]",
        "tests/losses/test_robust_distill.py",
    ),
    Plant(
        "padding is not repainted where the values are equal",
        "detectors/pixels.py",
        "repaint = convert or (source is not None and source.pad != pad)",
        "repaint = convert",
        "tests/detectors/test_pixels.py",
    ),
    Plant(
        "a backward that broke off is not forgotten",
        "ranks.py",
        "        self._queued = False\n        for p in self.parameters:",
        "        for p in self.parameters:",
        "tests/test_ranks.py",
    ),
    Plant(
        "the doctor compares boxes of unlike scales",
        "doctor/boxes.py",
        "x.boxes[keep].float() / scale",
        "x.boxes[keep].float()",
        "tests/doctor/test_boxes.py",
    ),
    Plant(
        "the doctor asks the teacher for its loss with dropout",
        "doctor/untouched.py",
        "(nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)",
        "nn.modules.batchnorm._BatchNorm",
        "tests/doctor/test_unchecked.py",
    ),
    Plant(
        "the doctor asks the teacher for its loss on boxes of the student's scale",
        "doctor/teacher.py",
        "step.seen.truth.boxes * pair.scale",
        "step.seen.truth.boxes",
        "tests/doctor/test_unchecked.py",
    ),
    Plant(
        "an epoch begins one call late",
        "schedules.py",
        "done * self.steps + 1e-9",
        "done * self.steps",
        "tests/test_schedules.py",
    ),
    Plant(
        "levels by their place where a pyramid leaves out a stride",
        "instances.py",
        "octave >= math.log2(stride / strides[0])",
        "octave >= strides.index(stride)",
        "tests/test_pyramid.py",
    ),
    Plant(
        "calibrate: batches without a term count in its mean",
        "doctor/calibration.py",
        "(total[0] / total[1].clamp(min=1))",
        "(total[0] / total[1].max())",
        "tests/doctor/test_calibration.py",
    ),
    Plant(
        "FGD: a box without weight is background",
        "losses/fgd.py",
        "outside = (member == 0)",
        "outside = (foreground == 0)",
        "tests/losses/test_fgd.py",
    ),
    Plant(
        "CWD: no square of the temperature",
        "losses/cwd.py",
        "temperature**2 * total",
        "temperature * total",
        "tests/losses/test_cwd.py",
    ),
    Plant(
        "PKD: standard deviations of a population",
        "ops/correlation.py",
        "(count - 1).clamp(min=1)",
        "count.clamp(min=1)",
        "tests/losses/test_pkd.py",
    ),
    Plant(
        "lists are recorded as they are, whoever overwrites them",
        "hooks/record.py",
        "    if type(value) is list:\n        items = twins.add(value, [])",
        "    if type(value) is list:\n        return value\n        items = twins.add(value, [])",
        "tests/hooks/test_record.py",
    ),
    Plant(
        "boxes in xywh are taken for xyxy",
        "targets.py",
        'if kind == "XYXY":',
        'if kind in ("XYXY", "XYWH"):',
        "tests/test_bad_input.py tests/detectors/test_module.py",
    ),
    Plant(
        "rows without a box weigh what the first box does",
        "losses/weighing.py",
        "own[box.clamp(min=-1)]",
        "own[box.clamp(min=0)]",
        "tests/losses/test_rows.py",
    ),
]


def noticed(plant: Plant, where: Path) -> bool:
    """Put a bug into a copy of the checkout, run its tests, and take it out again."""
    path = where / "global_kd" / plant.file
    source = path.read_text()
    path.write_text(source.replace(plant.right, plant.wrong))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow and not soak"]
    # No bytecode: within a second of each other two versions of a file have one time stamp.
    fresh = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    try:
        run = subprocess.run(
            [*command, *plant.tests.split()], cwd=where, env=fresh, capture_output=True, text=True
        )
    finally:
        path.write_text(source)
    if run.returncode not in (0, 1):
        raise RuntimeError(f"{plant.what}: the tests did not run\n{run.stdout}{run.stderr}")
    return run.returncode == 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="those whose description has this in it")
    only = parser.parse_args(argv).only
    plants = [plant for plant in PLANTS if only in plant.what]
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        for name in COPIED:
            shutil.copytree(ROOT / name, where / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in ROOT.iterdir():
            if path.is_file():
                shutil.copy(path, where)
        for plant in plants:
            seen = noticed(plant, where)
            survived += not seen
            print(f"{'noticed ' if seen else 'SURVIVED'}  {plant.what}", flush=True)
    print(f"{len(plants) - survived} of {len(plants)} noticed")
    return int(survived > 0)


if __name__ == "__main__":
    raise SystemExit(main())
